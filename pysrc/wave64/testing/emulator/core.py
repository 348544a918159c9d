"""The core in C: executes the instructions that it has handlers for, on the machine's arrays, and leaves the others to
NumPy, which also says what is wrong where the core finds that something is.

It is compiled once by the clang of PyPI's ziglang (the extra `emulator` names it), and found by all processes after
that; see built.py. Without one, or on a processor older than x86-64-v3, NumPy executes everything.
"""

import ctypes
import functools
import importlib.metadata
import logging
import platform
from pathlib import Path

import numpy as np

from wave64.testing import built
from wave64.testing.emulator import arithmetic
from wave64.testing.emulator.checks import Hazards, OneValue, SharedMemory, Unwritten, Waits
from wave64.testing.emulator.cost import Counting, seen
from wave64.testing.emulator.lanes import ATOMIC, READ, WRITE
from wave64.testing.emulator.lower import lower
from wave64.testing.emulator.lowered import LAYOUT, Lowered

log = logging.getLogger("wave64")
SOURCE = Path(__file__).parent / "core"
NEEDED = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}  # of /proc/cpuinfo: x86-64-v3
#: -ffp-contract: an operation rounds once, unless it is written as fused
FLAGS = ("cc", "-O2", "-mcpu=x86_64_v3", "-std=gnu2x", "-shared", "-fPIC", "-nostdlib", "-ffreestanding",
         "-fno-strict-aliasing", "-fno-sanitize=undefined", "-ffp-contract=off", "-fno-math-errno")
CHECKS = (Waits, SharedMemory, OneValue, Unwritten, Hazards)  # what the core does too, or leaves to NumPy
OK, NUMPY, JUMP, END, BARRIER, PART = range(6)
STORES = 4096  # of LDS that are kept between two barriers
_p, _i = ctypes.c_void_p, ctypes.c_int64


class _State(ctypes.Structure):
    """`Core` of core.h."""

    _fields_ = [
        *((name, _p) for name in ("v", "s", "scc", "overflow", "states", "pcs", "counts", "ops", "reached", "exchanges",
                                  "fp8", "bf8")),
        *((name, _i) for name in ("n", "length", "group_waves", "groups")),
        *((name, _p) for name in ("lds", "scratch", "load_start", "load_end", "store_start", "store_end")),
        *((name, _i) for name in ("ranges", "lds_stride", "lds_bytes", "scratch_bytes")),
        ("addresses", _p), ("at", _p), ("changes", _i * 2), ("counting", _i), ("fnuz", _i),
        ("issued", _p * 2), ("done", _p * 2), ("due", _p * 2), ("unordered", _p * 2), ("busy", _p), ("met_with", _p),
        ("stores", _p), ("stored", _i), ("store_capacity", _i), ("special", _i),
        ("direct_due", _p), ("direct_by", _p), ("known", _p), ("sure", _p), ("written", _p),
        ("private", _p), ("first", _p * 3), ("last", _p * 3), ("dirty", _p), ("atomics", _p), ("one_value", _i),
        *((name, _i) for name in ("start", "step", "count", "pc")), ("fresh", _p), ("enabled", _p)]


STORED = np.dtype([("count", np.int64), ("lanes", np.uint64), ("wave", np.int32), ("width", np.int32),
                   ("offset", np.int32, 64)])
EXCHANGE = np.dtype([("lane", np.uint8, 64), ("there", np.uint64), ("written", np.uint64), ("zero", np.uint64)])


@functools.cache
def unfit() -> str | None:
    """Why the core cannot be compiled here, or would not run; None: it can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"{platform.system()} on {platform.machine()}"
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    if missing := NEEDED - set(flags.split()):
        return f"a processor without {', '.join(sorted(missing))}"
    try:
        importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        return "no package ziglang, which compiles the core; pip install 'wave64[emulator]'"
    return None


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled core, or the reason why it is missing."""
    if why := unfit():
        return why
    try:
        found = ctypes.CDLL(str(built.build(".so", SOURCE, [SOURCE],
                                            lambda work: [(*FLAGS, "-o", work / "made.so", "core.c")])))
    except (built.CompileError, OSError) as e:
        return str(e)
    if (found.size_of_op(), found.size_of_core()) != (LAYOUT.size, ctypes.sizeof(_State)):
        return "a core whose structures are other than here"
    found.run.restype = _i
    found.run.argtypes = [ctypes.POINTER(_State), _i, _i, ctypes.POINTER(_i)]
    return found


@functools.cache
def available() -> bool:
    """True if the core is available; if not, logs the reason once."""
    found = library()
    if isinstance(found, str):
        log.info("the emulator executes with NumPy alone, which takes many times as long: %s", found)
    return not isinstance(found, str)


@functools.cache
def _address(handler: str) -> int:
    found = library()
    try:
        return ctypes.cast(getattr(found, handler), _p).value or 0 if handler else 0
    except AttributeError:
        return 0


class Code:
    """What a program's instructions are to the core, lowered as they are reached, for all machines of a kernel."""

    def __init__(self, length: int, counting: bool):
        """counting: what `Counting` has to see is left to NumPy."""
        self.counting = counting
        self.ops = np.zeros(length * LAYOUT.size, np.uint8)
        self.reached = np.zeros(length, np.uint8)  # what the checks have seen: see core.h
        self.lowered: dict[int, Lowered] = {}
        self.exchanges = np.zeros(64, EXCHANGE)
        self.numbers: dict[bytes, int] = {}

    def at(self, machine, pc: int) -> Lowered:
        found = self.lowered.get(pc)
        if found is None:
            found = self.lowered[pc] = lower(machine.program.at(pc), machine.kernel, machine.arch)
            if self.counting and seen(found.instruction):
                found.handler = ""
            address = _address(found.handler)
            if address:
                packed = found.pack(address, self._exchange(found))
                self.ops[pc * LAYOUT.size:(pc + 1) * LAYOUT.size] = np.frombuffer(packed, np.uint8)
        return found

    def _exchange(self, low: Lowered) -> int:
        if low.exchange is None:
            return 0
        source, there, written, zero = low.exchange
        record = np.zeros((), EXCHANGE)
        record["lane"], record["zero"] = source, zero
        record["there"], record["written"] = (np.packbits(mask, bitorder="little").view(np.uint64)[0]
                                              for mask in (there, written))
        key = record.tobytes()
        if key not in self.numbers:
            if len(self.numbers) == len(self.exchanges):
                self.exchanges = np.concatenate([self.exchanges, np.zeros_like(self.exchanges)])
            self.exchanges[len(self.numbers)] = record
            self.numbers[key] = len(self.numbers)
        return self.numbers[key]


class Core:
    """A machine's."""

    def __init__(self, machine):
        self.machine = machine
        counting = any(isinstance(check, Counting) for check in machine.checks)
        key = machine.kernel.name, any(type(check) is Hazards for check in machine.checks), counting
        self.code = machine.program.lowered.get(key) or Code(machine.program.length, counting)
        machine.program.lowered[key] = self.code
        self.reached = self.code.reached
        n = machine.count
        self.addresses = np.zeros(2 * n * 64, np.uint64)
        self.at_ = np.zeros(n * 64, np.int32)
        self.fresh, self.enabled = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
        self.outcome = _i()
        self.reaching = False
        found = library()
        assert not isinstance(found, str)
        self.run_ = found.run
        state = self.state = _State()
        self._reference = ctypes.byref(state)
        self.small = [np.ascontiguousarray(arithmetic.small(kind, machine.arch).decoded) for kind in ("fp8", "bf8")]
        state.fp8, state.bf8 = (table.ctypes.data for table in self.small)
        arrays = {"v": machine.vgprs, "s": machine.sgprs, "scc": machine.scc, "overflow": machine.fp16_overflow,
                  "states": machine.states, "pcs": machine.pcs, "counts": machine.counts, "ops": self.code.ops,
                  "reached": self.reached, "lds": machine.lds.u8, "scratch": machine.scratch.u8,
                  "addresses": self.addresses, "at": self.at_, "fresh": self.fresh, "enabled": self.enabled}
        for name, array in arrays.items():
            setattr(state, name, array.ctypes.data)
        shape = machine.shape
        state.n, state.length, state.group_waves, state.groups = n, machine.program.length, shape.waves, shape.groups
        state.lds_stride, state.lds_bytes = machine.lds_stride, shape.lds_bytes
        state.scratch_bytes = machine.scratch_bytes
        state.fnuz = machine.arch == "gfx942"
        checks = {type(check): check for check in machine.checks}
        self.waits, self.hazards = checks.get(Waits), checks.get(Hazards)
        if waits := self.waits:
            for i, counter in enumerate(("vm", "lgkm")):
                for name in ("issued", "done", "due", "unordered"):
                    getattr(state, name)[i] = getattr(waits, name)[counter].ctypes.data
            state.busy, state.met_with = waits.busy.ctypes.data, waits.met_with.ctypes.data
            if shape.waves > 1 and shape.lds_bytes:
                waits.log = np.zeros(STORES, STORED)
                state.stores, state.store_capacity = waits.log.ctypes.data, STORES
        if unwritten := checks.get(Unwritten):
            for name in ("known", "sure", "written", "private"):
                setattr(state, name, getattr(unwritten, name).ctypes.data)
        shared = checks.get(SharedMemory)
        if shared and shape.waves > 1:
            for i, kind in enumerate((READ, WRITE, ATOMIC)):
                state.first[i] = shared.accesses[kind].first.ctypes.data
                state.last[i] = shared.accesses[kind].last.ctypes.data
            state.dirty, state.atomics = shared.dirty.ctypes.data, shared.atomics.ctypes.data
        state.one_value = OneValue in checks

    def start(self) -> None:
        """A batch begins: memory is registered, the checks have started."""
        state, memory = self.state, self.machine.memory
        bounds = memory.loaded.starts, memory.loaded.ends, memory.stored.starts, memory.stored.ends
        self.ranges = [np.ascontiguousarray(each, np.uint64) for each in bounds]
        state.load_start, state.load_end, state.store_start, state.store_end = (
            each.ctypes.data for each in self.ranges)
        state.ranges, state.stored = len(self.ranges[0]), 0
        state.counting = memory.changes is not None

    def run(self, party, pc: int, limit: int, patience: int) -> tuple[int, int, int]:
        """(outcome, pc, steps left) of a party's run from `pc`. NUMPY: that must execute the instruction at pc."""
        state, machine, waits = self.state, self.machine, self.waits
        waves = party.waves
        state.start, state.step, state.count, state.pc = waves.start, waves.step, party.count, pc
        while True:
            if waits is not None:
                state.stored = waits.logged
                state.special = bool(waits.stores) or waits.unaligned or waits.late is not None
                if waits.direct is not None:
                    state.direct_due, state.direct_by = (each.ctypes.data for each in waits.direct)
                else:
                    state.direct_due = None
            state.exchanges = self.code.exchanges.ctypes.data
            patience = self.run_(self._reference, limit, patience, self.outcome)
            outcome, pc = self.outcome.value, state.pc
            if waits is not None:
                waits.logged = state.stored
            if outcome == NUMPY and 0 <= pc < len(self.reached) and not self.reached[pc] & 1:
                self._reach(pc)
                if self.code.lowered[pc].handler:
                    continue
            break
        if machine.memory.changes is not None:
            machine.memory.changes += state.changes[0]
            machine.lds.changes += state.changes[1]
            state.changes[0] = state.changes[1] = 0
        return outcome, pc, patience

    def _reach(self, pc: int) -> None:
        """A machine comes to an instruction for the first time."""
        self.reaching = True
        low = self.code.at(self.machine, pc)
        if low.handler and self.hazards is not None:
            low.machine, low.pc = self.machine, pc
            self.hazards.wrap(low, None)
        self.reached[pc] |= 1
        self.reaching = False

    OK, NUMPY, END, PART = OK, NUMPY, END, PART

    def at(self, pc: int) -> int:
        """The pc of what raised: that of `run`, where it was there that it did."""
        return self.state.pc if self.reaching else pc

    def branched(self, pc: int, outcome) -> None:
        """NumPy has executed the instruction at pc: where it jumped, and where not, the checks have seen it."""
        if outcome is None:
            self.reached[pc] |= 2
        elif isinstance(outcome, int):
            self.reached[pc] |= 4
        elif isinstance(outcome, np.ndarray):
            self.reached[pc] |= 6
