"""Memory instructions besides LDS: SMEM; GLOBAL, FLAT and SCRATCH; MUBUF.

A buffer access is first held against its resource, as hardware does it: out of range, loads give 0 and stores vanish.
Whatever then reaches memory must lie inside a registered buffer, which hardware does not ask. With an index a resource
is an array of records: linear, or swizzled, which keeps words of as many records as its index stride says together.
"""

import time
from collections.abc import Callable
from typing import cast

import numpy as np

from wave64.testing.emulator import atomics
from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import M0
from wave64.testing.emulator.lanes import HALF_LOADS, LOADS, STORES, WRITE, active, give, receive, store
from wave64.testing.emulator.memory import EmulationError, Memory, OutOfBounds, Space

I64, U32, U64 = np.int64, np.uint32, np.uint64
NO_SADDR = 127
ELEMENT = 4  # bytes that swizzled resources keep together: gfx9 has no field for it, and AMD's manual 4 for structures
Where = Callable[..., np.ndarray]  # (bytes of an access, whether it writes) -> offsets of the lanes' accesses


# ---- SMEM

def _scalar_offset(b: Binding) -> Callable[[], np.ndarray]:
    """What an SMEM instruction adds to its base: [waves]."""
    fields, party = b.fields, b.party
    immediate = ((fields.offset ^ 0x100000) - 0x100000) if fields.imm else 0
    more = b.scalar(fields.soffset.offset, "u") if fields.soffset_en else None
    if not fields.imm and more is None:
        more = b.scalar(fields.offset & 0x7F, "u")
    constant = np.full(party.count, immediate, I64)
    return lambda: constant if more is None else constant + more()


def _smem(dwords: int, buffer: bool) -> Callable:
    def bind(b: Binding) -> Callable:
        fields, party, memory = b.fields, b.party, b.machine.memory
        further = _scalar_offset(b)
        base, first = fields.sbase.offset, fields.sdata.offset
        b.reads.append(("s", base, 4 if buffer else 2))
        b.writes.append(("s", first, dwords))
        to, column, steps = party.S[:, first:first + dwords], party.S64[:, base // 2], np.arange(dwords)

        def run() -> None:
            offset = further()
            if not buffer:
                at = memory.locate((column + offset.view(U64)) & U64(2**64 - 4), 4 * dwords)
                to[...] = memory.u32[(at >> 2)[:, None] + steps]
                return
            if (column >> U64(48)).any():
                raise NotImplementedError(f"{b.instruction.name} from a buffer resource with a stride")
            at = (column & U64(0xFFFFFFFFFFFF))[:, None] + ((offset & -4)[:, None] + 4 * steps).view(U64)
            inside = (offset & -4)[:, None] + 4 * steps + 4 <= party.S[:, base + 2:base + 3]
            words = np.zeros(inside.shape, U32)
            words[inside] = memory.u32[memory.locate(at[inside], 4, which=inside) >> 2]
            to[...] = words
        return run
    return bind


def _scalar_words(b: Binding, count: int) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
    """The scalar registers that a store or an atomic of SMEM has for data: [waves, count]; and what gives where it
    goes, for accesses of some bytes."""
    base, first, memory = b.fields.sbase.offset, b.fields.sdata.offset, b.machine.memory
    further, column = _scalar_offset(b), b.party.S64[:, b.fields.sbase.offset // 2]
    b.reads += [("s", base, 2), ("s", first, count)]

    def where(size: int) -> np.ndarray:
        return memory.locate((column + further().view(U64)) & U64(2**64 - 4), size, True)
    return b.party.S[:, first:first + count], where


def _scalar_store(dwords: int) -> Callable:
    def bind(b: Binding) -> Callable:
        words, where = _scalar_words(b, dwords)
        return lambda: b.machine.memory.store(where(4 * dwords), 4 * dwords, words)
    return bind


def _scalar_atomic(kind: type, change: Callable, compare: bool) -> Callable:
    size = np.dtype(kind).itemsize

    def bind(b: Binding) -> Callable:
        words, where = _scalar_words(b, size // 4 * (1 + compare))
        returns, memory = bool(b.fields.glc), b.machine.memory
        if returns:
            b.writes.append(("s", b.fields.sdata.offset, size // 4))

        def run() -> None:
            operands = [np.ascontiguousarray(part) for part in np.split(words, 1 + compare, axis=1)]
            old = atomics.apply(memory, where(size), kind, change, operands, returns)
            if returns:
                words[:, :size // 4] = cast(np.ndarray, old)
        return run
    return bind


def _clock(b: Binding) -> Callable:
    """s_memrealtime, which counts at 100 MHz, of this machine's time."""
    first = b.fields.sdata.offset
    b.writes.append(("s", first, 2))
    to = b.party.S[:, first:first + 2]

    def run() -> None:
        ticks = time.monotonic_ns() // 10
        to[:, 0], to[:, 1] = ticks & 0xFFFFFFFF, ticks >> 32
    return run


# ---- addresses

def _global(b: Binding) -> tuple[Space, Where]:
    fields, memory = b.fields, b.machine.memory
    flat = b.instruction.family == "FLAT"
    offset = U64((fields.offset if flat else (fields.offset ^ 0x1000) - 0x1000) & 2**64 - 1)
    register, base = b.number("addr"), fields.saddr.offset
    if flat or base == NO_SADDR:
        get = b.vector(register, "U")
        return memory, lambda width, writes=False: memory.locate(active(b, get()) + offset, width, writes)
    lanes, scalar = b.vector(register, "u")(), b.source(base, "U")
    return memory, lambda width, writes=False: memory.locate(active(b, lanes + (scalar() + offset)), width, writes)


def _scratch(b: Binding) -> tuple[Space, Where]:
    fields, machine = b.fields, b.machine
    offset = (fields.offset ^ 0x1000) - 0x1000
    lanes = b.vector(b.number("addr"), "u")() if fields.sve else None
    scalar = b.source(fields.saddr.offset, "u") if fields.saddr.offset != NO_SADDR else None
    size = machine.scratch_bytes
    starts = (b.party.numbers[:, None] * 64 + np.arange(64)) * size

    def where(width: int, writes: bool = False) -> np.ndarray:
        at = np.full((b.party.count, 1), offset, I64)
        for part in (lanes, None if scalar is None else scalar()):
            if part is not None:
                at = at + part
        got = active(b, at)
        if got.size and not (got.min() >= 0 and got.max() + width <= size):
            raise EmulationError(f"private memory at {int(got.min())} to {int(got.max()) + width}, of {size} bytes")
        got = got + active(b, starts)
        for check in machine.checks:
            check.scratch(b, got, width, writes)
        return got
    return machine.scratch, where


SPACES = {"global": _global, "flat": _global, "scratch": _scratch}


def _data(b: Binding) -> str:
    return "vdata" if b.instruction.family == "MUBUF" else "data"


def _load(address_of: Callable, width: int, signed: type | None, half: int | None) -> Callable:
    def bind(b: Binding) -> Callable:
        space, where = address_of(b)
        write = receive(b, b.number("vdst"), width, signed, half, bool(b.fields.acc))

        def run() -> None:
            write(space.load(where(width), width))
        return run
    return bind


def _store(address_of: Callable, width: int, high: bool) -> Callable:
    def bind(b: Binding) -> Callable:
        space, where = address_of(b)
        read = give(b, b.number("data"), width, high, bool(b.fields.acc))

        def run() -> None:
            store(b, space, where(width, True), width, read())
        return run
    return bind


def _atomic(address_of: Callable, kind: type, change: Callable, compare: bool) -> Callable:
    size = np.dtype(kind).itemsize

    def bind(b: Binding) -> Callable:
        space, where = address_of(b)
        acc, data = bool(b.fields.acc), b.number(_data(b))
        reads = [give(b, data + i * size // 4, size, agpr=acc) for i in range(2 if compare else 1)]
        returns = bool(b.fields.sc0)
        to = "vdata" if b.instruction.family == "MUBUF" else "vdst"
        write = receive(b, b.number(to), size, None, agpr=acc) if returns else None

        def run() -> None:
            old = atomics.apply(space, where(size, True), kind, change, [read() for read in reads], returns)
            if write is not None:
                write(cast(np.ndarray, old))
        return run
    return bind


def _load_to_lds(address_of: Callable, width: int) -> Callable:
    """Lane i's bytes go to LDS at M0 + offset + i * width, never through a register."""
    def bind(b: Binding) -> Callable:
        space, where = address_of(b)
        deposit = _deposit(b, width)
        return lambda: deposit(space.load(where(width), width))
    return bind


def _deposit(b: Binding, width: int) -> Callable[[np.ndarray], None]:
    machine, m0 = b.machine, b.source(M0, "u")
    starts = (b.party.group * machine.lds_stride)[:, None] + np.arange(64) * max(4, width)
    inner = np.arange(64) * max(4, width) + b.fields.offset

    def deposit(words: np.ndarray) -> None:
        base = m0().astype(I64)
        if base.size and int(base.max()) + int(inner.max()) + max(4, width) > machine.shape.lds_bytes:
            raise EmulationError(f"a load to LDS ends past its {machine.shape.lds_bytes} bytes")
        offsets = active(b, starts + base + b.fields.offset)
        for check in machine.checks:
            check.lds(b, offsets, max(4, width), WRITE, words)
        machine.lds.store(offsets, max(4, width), words)
    return deposit


# ---- MUBUF

def _buffer(b: Binding) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """What gives, for accesses of some bytes, their addresses and how many bytes of the resource lie behind each."""
    fields, party = b.fields, b.party
    register = b.number("vaddr")
    index = b.vector(register, "u")() if fields.idxen else None
    lanes = b.vector(register + fields.idxen, "u")() if fields.offen else None
    scalar = b.scalar(fields.soffset.offset, "u")
    first, immediate = fields.srsrc.offset, U32(fields.offset)
    b.reads.append(("s", first, 4))
    words = party.S[:, first:first + 4]

    def where(width: int) -> tuple[np.ndarray, np.ndarray]:
        low, high, records, kind = (words[:, i:i + 1] for i in range(4))
        if (kind >> U32(23) & U32(1)).any():
            raise NotImplementedError("a buffer resource that adds lane ids")
        base = low.astype(U64) | (high & U32(0xFFFF)).astype(U64) << U64(32)
        within = immediate if lanes is None else lanes + immediate  # in 32 bits: -4 + 4 is in range
        offset = scalar().astype(I64)[:, None]
        if index is None:
            if (high >> U32(31)).any():
                raise NotImplementedError("a swizzled buffer resource without an index")
            offset = offset + within
            left = records.astype(I64) - offset
        else:
            offset = offset + _of_record(index, within, high, kind, width)
            left = np.where(index < records, I64(2**32), I64(0))
        return active(b, base + offset.view(U64)), active(b, left)
    return where


def _of_record(index: np.ndarray, within: np.ndarray | np.generic, high: np.ndarray, kind: np.ndarray, width: int
               ) -> np.ndarray:
    """Where in its resource, of whose words two are given, an access of `width` bytes to a record is."""
    stride, swizzled = (high >> U32(16) & U32(0x3FFF)).astype(I64), high >> U32(31) != 0
    if not stride.all():
        raise NotImplementedError("an index into a buffer resource without a stride")
    if swizzled.any() and width > ELEMENT:
        raise NotImplementedError(f"{width} bytes at once of a swizzled buffer resource")
    index, within, together = index.astype(I64), within.astype(I64), I64(8) << (kind >> U32(21) & U32(3)).astype(I64)
    element, rest = within // ELEMENT * ELEMENT, within % ELEMENT
    spread = (index // together * stride + element) * together + index % together * ELEMENT + rest
    return np.where(swizzled, spread, index * stride + within)


def _within(memory: Memory, addresses: np.ndarray, inside: np.ndarray, width: int, writes: bool) -> np.ndarray:
    """Offsets for the accesses that the resource lets through."""
    try:
        return memory.locate(addresses[inside], width, writes, inside)
    except OutOfBounds as e:
        raise OutOfBounds(int(np.flatnonzero(inside)[e.access]), str(e)) from None


def _buffer_load(width: int, signed: type | None, half: int | None) -> Callable:
    def bind(b: Binding) -> Callable:
        memory, where = b.machine.memory, _buffer(b)
        if b.fields.lds:
            write = _deposit(b, width)
        else:
            write = receive(b, b.number("vdata"), width, signed, half, bool(b.fields.acc))
        unit = min(width, 4)

        def run() -> None:
            addresses, left = where(width)
            if not left.size:
                return
            if left.min() >= width:
                write(memory.load(memory.locate(addresses, width), width))
                return
            words = np.zeros((len(left), max(1, width // 4)), U32)
            for i in range(words.shape[1]):
                inside = left >= 4 * i + unit
                at = _within(memory, addresses + U64(4 * i), inside, unit, False)
                words[inside, i] = memory.load(at, unit)[:, 0]
            write(words)
        return run
    return bind


def _buffer_store(width: int, high: bool) -> Callable:
    def bind(b: Binding) -> Callable:
        memory, where = b.machine.memory, _buffer(b)
        read = give(b, b.number("vdata"), width, high, bool(b.fields.acc))
        unit, checks = min(width, 4), b.machine.checks

        def run() -> None:
            addresses, left = where(width)
            words = read()
            if not left.size:
                return
            for check in checks:
                check.buffer_store(b, left >= unit)
            if left.min() >= width:
                store(b, memory, memory.locate(addresses, width, True), width, words)
                return
            for i in range(words.shape[1]):
                inside = left >= 4 * i + unit
                at = _within(memory, addresses + U64(4 * i), inside, unit, True)
                store(b, memory, at, unit, words[inside, i:i + 1])
        return run
    return bind


def _buffer_atomic(kind: type, change: Callable, compare: bool) -> Callable:
    size = np.dtype(kind).itemsize

    def bind(b: Binding) -> Callable:
        memory, where = b.machine.memory, _buffer(b)
        acc, data = bool(b.fields.acc), b.number("vdata")
        reads = [give(b, data + i * size // 4, size, agpr=acc) for i in range(2 if compare else 1)]
        returns = bool(b.fields.sc0)
        write = receive(b, data, size, None, agpr=acc) if returns else None

        def run() -> None:
            addresses, left = where(size)
            inside = left >= size
            operands = [read()[inside] for read in reads]
            old = atomics.apply(memory, _within(memory, addresses, inside, size, True), kind, change, operands, returns)
            if write is not None:
                words = np.zeros((len(left), size // 4), U32)
                words[inside] = cast(np.ndarray, old)
                write(words)
        return run
    return bind


def _nothing(b: Binding) -> Callable:
    return lambda: None


def _forms() -> dict[str, Callable]:
    forms: dict[str, Callable] = dict.fromkeys((
        "s_dcache_inv", "s_dcache_wb", "s_dcache_inv_vol", "s_dcache_wb_vol", "buffer_wbl2", "buffer_inv",
        "buffer_wbinvl1", "buffer_wbinvl1_vol"), _nothing)
    forms["s_memrealtime"] = _clock
    for dwords in (1, 2, 4, 8, 16):
        suffix = "dword" if dwords == 1 else f"dwordx{dwords}"
        forms[f"s_load_{suffix}"] = _smem(dwords, False)
        forms[f"s_buffer_load_{suffix}"] = _smem(dwords, True)
    kinds = [(*atomics.FLOAT[name], name) for name in atomics.FLOAT]
    for name in atomics.INTEGER:
        plain = {"min_i": "smin", "min_u": "umin", "max_i": "smax", "max_u": "umax"}.get(name, name)
        kinds += [(*atomics.integer(name, size), plain + suffix) for size, suffix in ((4, ""), (8, "_x2"))]
    for dwords, suffix in ((1, ""), (2, "x2"), (4, "x4")):
        forms[f"s_store_dword{suffix}"] = _scalar_store(dwords)
    for kind, change, name in kinds:
        compare = name.startswith("cmpswap")
        if issubclass(kind, np.integer) and not name.startswith("pk_"):
            forms[f"s_atomic_{name}"] = _scalar_atomic(kind, change, compare)
        for space, address_of in (("global", _global), ("flat", _global)):
            forms[f"{space}_atomic_{name}"] = _atomic(address_of, kind, change, compare)
        forms[f"buffer_atomic_{name}"] = _buffer_atomic(kind, change, compare)
    for space, address_of in SPACES.items():
        for name, (width, signed) in LOADS.items():
            forms[f"{space}_load_{name}"] = _load(address_of, width, signed, None)
            forms[f"{space}_load_lds_{name}"] = _load_to_lds(address_of, width)
        for name, (width, signed) in HALF_LOADS.items():
            forms[f"{space}_load_{name}"] = _load(address_of, width, signed, 0)
            forms[f"{space}_load_{name}_hi"] = _load(address_of, width, signed, 1)
        for name, width in STORES.items():
            forms[f"{space}_store_{name}"] = _store(address_of, width, False)
            forms[f"{space}_store_{name}_d16_hi"] = _store(address_of, width, True)
    for name, (width, signed) in LOADS.items():
        forms[f"buffer_load_{name}"] = _buffer_load(width, signed, None)
    for name, (width, signed) in HALF_LOADS.items():
        forms[f"buffer_load_{name}"] = _buffer_load(width, signed, 0)
        forms[f"buffer_load_{name}_hi"] = _buffer_load(width, signed, 1)
    for name, width in STORES.items():
        forms[f"buffer_store_{name}"] = _buffer_store(width, False)
        forms[f"buffer_store_{name}_d16_hi"] = _buffer_store(width, True)
    return forms


FORMS = _forms()
