"""DS instructions: LDS loads, stores and atomics, and the lane exchanges that go through the LDS unit's crossbar."""

from collections.abc import Callable
from typing import cast

import numpy as np

from wave64.testing.emulator import atomics
from wave64.testing.emulator.binding import Binding, Known
from wave64.testing.emulator.lanes import ATOMIC, READ, WRITE, active, give, receive
from wave64.testing.emulator.memory import EmulationError

I64, U32 = np.int64, np.uint32
LANES = np.arange(64)
#: mnemonic -> bytes, and the signed type that it extends from
READS: dict[str, tuple[int, type | None]] = {
    "b32": (4, None), "b64": (8, None), "b96": (12, None), "b128": (16, None), "u8": (1, None), "i8": (1, np.int8),
    "u16": (2, None), "i16": (2, np.int16)}
WRITES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}


def _offset(b: Binding) -> int:
    return b.fields.offset0 | b.fields.offset1 << 8


def _where(b: Binding, offset: int, access: int) -> Callable[..., np.ndarray]:
    """Offsets into the LDS of all workgroups, for accesses of some bytes (stores: of words); raises where one leaves
    its workgroup's."""
    checks = b.machine.checks
    machine = b.machine
    if b.fields.gds:
        raise NotImplementedError("global data share")
    lanes = b.vector(b.number("addr"), "u")()
    starts = (b.party.group * machine.lds_stride)[:, None] + np.zeros(64, I64)
    size = machine.shape.lds_bytes

    def where(width: int, words: np.ndarray | None = None) -> np.ndarray:
        got = active(b, lanes).astype(I64) + offset
        if got.size and int(got.max()) + width > size:
            raise EmulationError(f"LDS bytes {int(got.max())} to {int(got.max()) + width}, of {size} allocated")
        got = got + active(b, starts)
        for check in checks:
            check.lds(b, got, width, access, words)
        return got
    return where


def _read(width: int, signed: type | None, half: int | None = None) -> Callable:
    def bind(b: Binding) -> Callable:
        space, where = b.machine.lds, _where(b, _offset(b), READ)
        write = receive(b, b.number("vdst"), width, signed, half, bool(b.fields.acc))
        return lambda: write(space.load(where(width), width))
    return bind


def _read2(width: int, unit: int) -> Callable:
    def bind(b: Binding) -> Callable:
        space, acc = b.machine.lds, bool(b.fields.acc)
        first, second = (_where(b, offset * unit, READ) for offset in (b.fields.offset0, b.fields.offset1))
        write = receive(b, b.number("vdst"), 2 * width, None, agpr=acc)

        def run() -> None:
            write(np.concatenate([space.load(first(width), width), space.load(second(width), width)], axis=1))
        return run
    return bind


def _write(width: int, high: bool = False) -> Callable:
    def bind(b: Binding) -> Callable:
        space, where = b.machine.lds, _where(b, _offset(b), WRITE)
        read = give(b, b.number("data0"), width, high, bool(b.fields.acc))

        def run() -> None:
            words = read()
            space.store(where(width, words), width, words)
        return run
    return bind


def _write2(width: int, unit: int) -> Callable:
    def bind(b: Binding) -> Callable:
        space, acc = b.machine.lds, bool(b.fields.acc)
        first, second = (_where(b, offset * unit, WRITE) for offset in (b.fields.offset0, b.fields.offset1))
        one, other = (give(b, b.number(field), width, agpr=acc) for field in ("data0", "data1"))

        def run() -> None:
            for where, words in ((first, one()), (second, other())):
                space.store(where(width, words), width, words)
        return run
    return bind


def _atomic(kind: type, change: Callable, returns: bool, compare: bool) -> Callable:
    size = np.dtype(kind).itemsize

    def bind(b: Binding) -> Callable:
        space, where, acc = b.machine.lds, _where(b, _offset(b), ATOMIC), bool(b.fields.acc)
        fields = ("data1", "data0") if compare else ("data0",)  # the new value; what is expected
        reads = [give(b, b.number(field), size, agpr=acc) for field in fields]
        write = receive(b, b.number("vdst"), size, None, agpr=acc) if returns else None

        def run() -> None:
            old = atomics.apply(space, where(size), kind, change, [read() for read in reads], returns)
            if write is not None:
                write(cast(np.ndarray, old))
        return run
    return bind


def _bpermute(b: Binding) -> Callable:
    """Lane i gets what lane addr[i] / 4 has, 0 where EXEC lacks that lane."""
    party, offset = b.party, _offset(b)
    lanes, data = b.vector(b.number("addr"), "u")(), b.vector(b.number("data0"), "u")()
    write = b.sink(b.number("vdst"), "u")

    def source() -> np.ndarray:
        return ((lanes + U32(offset)) >> U32(2) & U32(63)).astype(np.intp)

    def follow(known: Known) -> list:
        of_address, of_data = known(0)[0], known(1)[0] | ~party.mask
        return [(0, of_address & np.take_along_axis(of_data, source(), 1), None)]
    b.follow = follow

    def run() -> None:
        got = np.take_along_axis(data, source(), 1)
        if not party.full:
            got = np.where(np.take_along_axis(party.mask, source(), 1), got, U32(0))
        write(got)
    return run


def _permute(b: Binding) -> Callable:
    """Lane i gives to lane addr[i] / 4; of several the highest wins, and who gets nothing gets 0."""
    party, offset = b.party, _offset(b)
    lanes, data = b.vector(b.number("addr"), "u")(), b.vector(b.number("data0"), "u")()
    write = b.sink(b.number("vdst"), "u")

    def given(values: np.ndarray, default: int) -> np.ndarray:
        wave, lane = np.nonzero(party.mask)
        got = np.full_like(values, default)
        got[wave, (lanes[wave, lane] + U32(offset)) >> U32(2) & U32(63)] = values[wave, lane]
        return got

    def follow(known: Known) -> list:
        addressed = (known(0)[0] | ~party.mask).all(1, keepdims=True)  # a lane with no address gives to anybody
        return [(0, given(known(1)[0], True) & addressed, None)]
    b.follow = follow
    return lambda: write(given(data, 0))


def swizzle(offset: int) -> np.ndarray:
    """The lane that each lane reads from."""
    if offset >= 0xE000:  # for FFT: lanes of a group of 32, or less, by their bits reversed; offset: the bits kept
        keep = offset & 31
        reversed_bits = sum((LANES >> i & 1) << 4 - i for i in range(5))
        return LANES & 32 | reversed_bits >> keep.bit_count() | LANES & keep
    if offset >= 0xC000:
        direction, count, keep = offset >> 10 & 1, offset >> 5 & 31, offset & 31
        moved = LANES - count if direction else LANES + count
        return LANES & 32 | (LANES & keep | moved & 31 & ~keep)
    if offset & 0x8000:
        return LANES & ~3 | (offset >> 2 * (LANES & 3) & 3)
    keep, join, flip = offset & 31, offset >> 5 & 31, offset >> 10 & 31
    return LANES & 32 | ((LANES & 31 & keep | join) ^ flip)


def _swizzle(b: Binding) -> Callable:
    party, source = b.party, swizzle(_offset(b))
    data, write = b.vector(b.number("addr"), "u")(), b.sink(b.number("vdst"), "u")
    b.follow = lambda known: [(0, (known(0)[0] | ~party.mask)[:, source], None)]

    def run() -> None:
        got = data[:, source]
        write(got if party.full else np.where(party.mask[:, source], got, U32(0)))
    return run


def _transposed(width: int) -> Callable:
    """ds_read_b64_tr_b16 and its like of gfx950: 16 lanes load rows of 16 numbers of so many bits, 64 bits a lane (of 6
    bits: 96), so some lanes a row; and get a column each."""
    octets = 12 if width == 6 else 8
    rows, aligned = 8 * octets // width, 16 if width == 6 else 8

    def bind(b: Binding) -> Callable:
        if b.machine.arch != "gfx950":
            raise NotImplementedError(f"{b.instruction.name} is an instruction of gfx950")
        space, where, party = b.machine.lds, _where(b, _offset(b), READ), b.party
        write = receive(b, b.number("vdst"), octets, None, agpr=bool(b.fields.acc))

        def run() -> None:
            if not party.full:
                raise NotImplementedError("a transposing load with lanes off")
            starts = where(octets)
            if (starts % aligned).any():
                raise EmulationError(f"{b.instruction.name} from an address that is no multiple of {aligned}")
            bits = np.unpackbits(space.load(starts, octets).view(np.uint8), axis=-1, bitorder="little")
            columns = bits.reshape(-1, rows, 16, width).swapaxes(1, 2).reshape(-1, 8 * octets)
            write(np.packbits(columns, axis=-1, bitorder="little").view(U32))
        return run
    return bind


def _forms() -> dict[str, Callable]:
    forms = {"ds_bpermute_b32": _bpermute, "ds_permute_b32": _permute, "ds_swizzle_b32": _swizzle,
             "ds_read_b64_tr_b16": _transposed(16), "ds_read_b64_tr_b8": _transposed(8),
             "ds_read_b96_tr_b6": _transposed(6), "ds_read_b64_tr_b4": _transposed(4),
             "ds_nop": lambda b: lambda: None}
    for name, (width, signed) in READS.items():
        forms[f"ds_read_{name}"] = _read(width, signed)
    for name in ("u8", "i8", "u16"):
        for half, suffix in enumerate(("", "_hi")):
            forms[f"ds_read_{name}_d16{suffix}"] = _read(*READS[name], half)
    for name, width in WRITES.items():
        forms[f"ds_write_{name}"] = _write(width)
        if width <= 2:
            forms[f"ds_write_{name}_d16_hi"] = _write(width, True)
    for name, width in (("b32", 4), ("b64", 8)):
        forms[f"ds_read2_{name}"], forms[f"ds_write2_{name}"] = _read2(width, width), _write2(width, width)
        forms[f"ds_read2st64_{name}"] = _read2(width, 64 * width)
        forms[f"ds_write2st64_{name}"] = _write2(width, 64 * width)
        size = 8 * width
        for plain in atomics.INTEGER:
            kind, change = atomics.integer(plain, width)
            stem, _, letter = plain.partition("_")
            stem = {"swap": "wrxchg", "cmpswap": "cmpst"}.get(stem, stem)
            letter = letter or ("b" if stem in ("and", "or", "xor", "wrxchg", "cmpst") else "u")
            forms[f"ds_{stem}_{letter}{size}"] = _atomic(kind, change, False, stem == "cmpst")
            forms[f"ds_{stem}_rtn_{letter}{size}"] = _atomic(kind, change, True, stem == "cmpst")
    for name, (kind, change) in atomics.FLOAT_LDS.items():
        stem, _, kind_name = name.rpartition("_")
        forms[f"ds_{name}"] = _atomic(kind, change, False, False)
        forms[f"ds_{stem}_rtn_{kind_name}"] = _atomic(kind, change, True, False)
    return forms


FORMS = _forms()
