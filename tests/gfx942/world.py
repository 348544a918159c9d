"""The state that one instruction runs on, drawn at random to suit it, and the instruction's execution by the emulator.

Two waves of a workgroup. Memory is a buffer of 64 KiB whose middle the addresses point to; of LDS there is as much as
the largest offsets reach. Sources get numbers of the type that AMD's tables of operands say: all sizes, and zeros,
infinities, NaNs, denormals, extremes, and equal ones.
"""

from types import SimpleNamespace

import numpy as np

from wave64.testing.emulator import forms
from wave64.testing.emulator.binding import Binding, masks_of
from wave64.testing.emulator.code_object import Kernel
from wave64.testing.emulator.decode import EXEC, M0, Instruction, decode
from wave64.testing.emulator.machine import Machine, Program, Shape
from wave64.testing.emulator.memory import Buffer

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
WAVES, LANES = 2, 64
AGPRS = 256                # where they begin in the vector register file
MEMORY, MIDDLE = 65536, 32768
LDS = 200 * 1024
START = 40000              # of the instruction in its code, far from both ends
SLOTS = 1024               # of 16 bytes, that addresses are drawn from
RECORDS = 12000            # bytes of a buffer resource: a third of what is drawn lies behind

_FLOATS = {
    "f": (U32, np.float32, 20, (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, -3.4e38, 0.5, 2.5,
                                -1.5, 2.0**-126, -(2.0**-149), 65504.0, 65520.0, 447.0, 464.0, 240.0, 248.0, 2.0**31)),
    "h": (U16, np.float16, 6, (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 6e-8, -6e-8, 65504.0, -65504.0, 0.5, 2.5,
                               -1.5, 6.1e-5)),
    "d": (U64, np.float64, 200, (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 5e-324, -1e-310, 1.7e308, 0.5, 2.5,
                                 -1.5, 2.0**31, -(2.0**31) - 1, 1e20)),
}


class World:
    """v: [512 registers, waves, 64]; s: [waves, 128]; scc: [waves]; lds, memory: bytes; pc: of the next instruction,
    None where waves part."""

    def __init__(self, v, s, scc, lds, memory):
        self.v, self.s, self.scc, self.lds, self.memory = v, s, scc, lds, memory
        self.pc: list[int] = []

    def copy(self) -> "World":
        return World(*(x.copy() for x in (self.v, self.s, self.scc, self.lds, self.memory)))

    @property
    def exec(self) -> np.ndarray:
        return self.s.view(U64)[:, EXEC // 2]


class Trial:
    """One instruction, before and after. part: with some lanes off. mode, ieee: what the kernel starts with."""

    def __init__(self, code: bytes, arch: str, seed: int, part: bool, mode: int = 0xF0, ieee: bool = True):
        text = np.full(2 * START * 4, 0, U8)
        text[START * 4:START * 4 + len(code)] = np.frombuffer(code, U8)
        loaded = SimpleNamespace(image=text, text=(0, len(text)), arch=arch)
        kernel = Kernel("one", 0, 512, AGPRS, LDS, 16, 0, (), (0, 0), (), 0, mode, ieee, True, False, ())
        self.arch, self.part = arch, part
        self.program, self.kernel = Program(loaded), kernel
        self.machine = Machine(self.program, kernel, Shape(1, WAVES, LDS), core="numpy")
        self.instruction: Instruction = decode(code + bytes(16))
        self.random = np.random.default_rng(seed)
        self._storage = np.empty(MEMORY + 64, U8)
        start = -self._storage.ctypes.data % 64
        self.memory = self._storage[start:start + MEMORY]
        self.machine.memory.register([Buffer("memory", self.memory.ctypes.data, MEMORY)])
        self.before = self._draw()
        self.emulated = self._execute()

    @property
    def middle(self) -> int:
        return self.memory.ctypes.data + MIDDLE

    # ---- the state before

    def _draw(self) -> World:
        random, machine = self.random, self.machine
        machine.start(1)
        world = World(random.integers(0, 2**32, machine.vgprs.shape, dtype=U32),
                      random.integers(0, 2**32, machine.sgprs.shape, dtype=U32), random.random(WAVES) < 0.5,
                      random.integers(0, 256, machine.lds.u8.shape, dtype=U8),
                      random.integers(0, 256, MEMORY, dtype=U8))
        for name in ("src0", "vsrc0", "src1", "vsrc1", "src2", "ssrc0", "ssrc1"):
            if hasattr(self.instruction.fields, name):
                self._fill(world, getattr(self.instruction.fields, name).offset, self.kind(name))
        if hasattr(self.instruction.fields, "vdst") and self.instruction.family.startswith("VOP"):
            self._fill(world, self.instruction.fields.vdst.offset, self.kind("vdst"))  # fmac reads it
        if "scalef32" in self.instruction.name and self.instruction.fields.src2.offset >= 256:  # by no infinity, no NaN
            scale = world.v[self.instruction.fields.src2.offset - 256]
            scale[(scale & 0x7F800000) == 0x7F800000] ^= 0x00800000
        if self.instruction.family in ("SOP2", "SOPC"):
            self._alike(world)
        lanes = random.random((WAVES, LANES)) < (0.6 if self.part else 1)
        world.s.view(U64)[:, EXEC // 2] = masks_of(lanes)
        self._address(world)
        return world

    def kind(self, name: str) -> str:
        """A letter for the type that the operand in this field has, "" where it is plain bits."""
        from tinygrad.runtime.autogen.amd.cdna.operands import OPERANDS

        operands = OPERANDS.get(self.instruction.fields.op, {})
        found = operands.get(name) or operands.get(name.removeprefix("v")) or operands.get("v" + name)
        text = found[0].name.removeprefix("FMT_NUM_") if found else ""
        for letter, ends in (("p", ("PK_F16", "PK2_F16")), ("f", ("F32",)), ("h", ("F16",)), ("d", ("F64",)),
                             ("i", ("I32", "U32", "I64", "U64", "I16", "U16", "I24", "U24"))):
            if text.endswith(ends):
                return letter
        return ""

    def _fill(self, world: World, code: int, kind: str) -> None:
        if not (code >= 256 or code < 106):
            return
        first = code - 256 if code >= 256 else code
        to = world.v[first:first + 2] if code >= 256 else world.s[:, first:first + 2].T
        if kind == "d":
            pair = self._numbers("d", to.shape[1:]).view(U32).reshape(*to.shape[1:], 2)
            to[...] = np.moveaxis(pair, -1, 0)
        elif kind in ("h", "p"):
            to[...] = self._numbers("h", (*to.shape, 2)).view(U32)[..., 0]
        elif kind == "f":
            to[...] = self._numbers("f", to.shape)
        else:
            to[...] = self._integers(to.shape)
        if code >= 256 and self.random.random() < 0.5:  # some lanes alike, for comparisons
            world.v[first, :, 40:48] = world.v[(first + 1) % 256, :, 40:48] = self.random.choice(to[0].ravel())

    def _alike(self, world: World) -> None:
        """One wave's sources equal, sometimes: a register takes what the other, or a small constant, is."""
        one, other = (getattr(self.instruction.fields, name).offset for name in ("ssrc0", "ssrc1"))
        one, other = (other, one) if one >= 106 else (one, other)
        if one < 106 and (other < 106 or 128 <= other <= 192) and self.random.random() < 0.5:
            world.s[1, one] = world.s[1, other] if other < 106 else other - 128

    def _numbers(self, kind: str, shape: tuple) -> np.ndarray:
        unsigned, real, spread, awkward = _FLOATS[kind]
        random = self.random
        with np.errstate(all="ignore"):
            usual = (random.standard_normal(shape) * 2.0 ** random.integers(-spread, spread, shape)).astype(real)
            near = random.uniform(-150, 150, shape).astype(real)
        any_bits = random.integers(0, 2 ** (8 * real().itemsize), shape, dtype=unsigned)
        choices = [usual.view(unsigned), near.view(unsigned), any_bits,
                   random.choice(np.array(awkward, real), shape).view(unsigned)]
        return np.choose(random.choice(4, shape, p=(0.4, 0.15, 0.15, 0.3)), choices)

    def _integers(self, shape: tuple) -> np.ndarray:
        random = self.random
        any_bits = random.integers(0, 2**32, shape, dtype=U32)
        extremes = np.array([0, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 1, 31, 0x8000, 0x7FFF7FFF], U32)
        choices = [any_bits, random.integers(-40, 40, shape).astype(np.int64).astype(U32),
                   random.choice(extremes, shape),
                   any_bits >> random.integers(0, 32, shape, dtype=U32)]
        return np.choose(random.choice(4, shape, p=(0.35, 0.25, 0.25, 0.15)), choices)

    # ---- addresses

    def _address(self, world: World) -> None:
        family, fields, name = self.instruction.family, self.instruction.fields, self.instruction.name
        if family == "SMEM":
            low, high = self.middle & 0xFFFFFFFF, self.middle >> 32
            world.s[:, fields.sbase.offset], world.s[:, fields.sbase.offset + 1] = low, high
            if not fields.imm or fields.soffset_en:
                world.s[:, fields.soffset.offset if fields.soffset_en else fields.offset & 0x7F] = 64
        elif family == "DS" and not name.startswith(("ds_bpermute", "ds_permute", "ds_swizzle")):
            world.v[fields.addr.offset - 256] = self._lds_addresses(world)
        elif family in ("GLOBAL", "FLAT"):
            slots = self._slots(16, 8 if "atomic" in name else SLOTS)
            offset = fields.offset if family == "FLAT" else (fields.offset ^ 0x1000) - 0x1000
            if family == "GLOBAL" and fields.saddr.offset != 127:
                world.s[:, fields.saddr.offset], world.s[:, fields.saddr.offset + 1] = (
                    self.middle - 8192 & 0xFFFFFFFF, self.middle - 8192 >> 32)
                world.v[fields.addr.offset - 256] = slots + 8192 - offset
            else:
                whole = (slots + self.middle - offset).astype(U64)
                pair = world.v[fields.addr.offset - 256:fields.addr.offset - 254]
                pair[0], pair[1] = whole & U64(0xFFFFFFFF), whole >> U64(32)
        if "_lds_" in name or family == "MUBUF":  # loads that go to LDS at M0
            world.s[:, M0] = 1024
        if family == "MUBUF":
            resource = world.s[:, fields.srsrc.offset:fields.srsrc.offset + 4]
            resource[:] = (self.middle & 0xFFFFFFFF, self.middle >> 32, RECORDS, 0x00027000)
            if fields.soffset.offset < 106:
                world.s[:, fields.soffset.offset] = 160
            if fields.offen:
                slots = self._slots(16, 8 if "atomic" in name else SLOTS)
                far = self.random.random(slots.shape) < 0.2
                world.v[fields.vaddr.offset - 256] = np.where(far, 0x80000000, slots)

    def _slots(self, size: int, count: int) -> np.ndarray:
        """Multiples of `size`, all different where there are enough."""
        if count >= WAVES * LANES:
            return size * self.random.permutation(count)[:WAVES * LANES].reshape(WAVES, LANES)
        return size * self.random.integers(0, count, (WAVES, LANES))

    def _lds_addresses(self, world: World) -> np.ndarray:
        """Atomics meet; of what else a lane touches, no other lane touches anything."""
        fields, name = self.instruction.fields, self.instruction.name
        if not name.startswith(("ds_read", "ds_write")):
            return self._slots(16, 8)
        unit = 0
        if "2" in name.split("_")[1]:
            unit = (8 if name.endswith("64") else 4) * (64 if "st64" in name else 1)
        offsets = (fields.offset0 * unit, fields.offset1 * unit) if unit else (0,)
        taken, got = set(), np.zeros(WAVES * LANES, np.int64)
        for lane in range(WAVES * LANES):
            while True:
                slot = int(self.random.integers(0, 2048))
                touched = {slot + offset // 16 + i for offset in offsets for i in (0, 1)}
                if not touched & taken:
                    break
            taken |= {slot + offset // 16 for offset in offsets} | {slot + offset // 16 + 1 for offset in offsets
                                                                    if offset % 16}
            got[lane] = 16 * slot
        return got.reshape(WAVES, LANES)

    # ---- the emulator's

    def _execute(self) -> World:
        machine, before = self.machine, self.before
        machine.vgprs[...], machine.sgprs[...], machine.scc[...] = before.v, before.s, before.scc
        machine.lds.u8[...], self.memory[...] = before.lds, before.memory
        party = machine.party(0, WAVES, 1)
        party.exec_changed()
        binding = Binding(party, self.instruction, START)
        with np.errstate(all="ignore"):
            outcome = forms.lookup(self.instruction)(binding)()
        self.binding = binding
        after = World(machine.vgprs, machine.sgprs, machine.scc, machine.lds.u8, self.memory).copy()
        ahead = START + self.instruction.words
        if outcome is None or isinstance(outcome, str):
            after.pc = [ahead] * WAVES
        else:
            after.pc = np.broadcast_to(outcome, WAVES).tolist()
        return after

    def by_core(self) -> World | None:
        """The same, executed by the core in C; None where that leaves the instruction to NumPy."""
        machine, before = Machine(self.program, self.kernel, Shape(1, WAVES, LDS), core="c"), self.before
        machine.memory.register(self.machine.memory.buffers)
        machine.start(1)
        machine.vgprs[...], machine.sgprs[...], machine.scc[...] = before.v, before.s, before.scc
        machine.lds.u8[...], self.memory[...] = before.lds, before.memory
        machine.core.reached[START] = 7
        machine.core.code.at(machine, START)
        outcome, pc, left = machine.core.run(machine.party(0, WAVES, 1), START, machine.program.length, 1)
        if outcome == machine.core.NUMPY:
            return None
        after = World(machine.vgprs, machine.sgprs, machine.scc, machine.lds.u8, self.memory).copy()
        ends = self.instruction.name in ("s_endpgm", "s_barrier")  # NumPy's gives no pc
        after.pc = (machine.pcs.tolist() if outcome == machine.core.PART else
                    [START + self.instruction.words if ends else pc] * WAVES)
        return after

    def unnoted(self) -> list[str]:
        """Registers that changed, but that the emulator's checks were not told of."""
        noted = {(kind, first + i) for kind, first, count in self.binding.writes for i in range(count)}
        changed = [("v", int(r)) for r in np.flatnonzero((self.before.v != self.emulated.v).any((1, 2)))]
        changed += [("s", int(r)) for r in np.flatnonzero((self.before.s != self.emulated.s).any(0))]
        return [f"{kind}{r}" for kind, r in changed if (kind, r) not in noted]
