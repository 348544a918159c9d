"""Operands of one instruction for one party, resolved once: registers to views of the register arrays, constants to
arrays, modifiers to functions. What an instruction reads and writes is noted on the way, for the checks.

A kind is a letter: f h d floating point of 32, 16, 64 bits; u w U unsigned integers of 32, 16, 64; i s I signed ones.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from wave64.testing.emulator import arithmetic
from wave64.testing.emulator.decode import EXEC, EXECZ, LITERAL, M0, SCC, VCC, VCCZ, VGPR0, Instruction

KINDS = {"f": np.float32, "h": np.float16, "d": np.float64, "u": np.uint32, "w": np.uint16, "U": np.uint64,
         "i": np.int32, "s": np.int16, "I": np.int64}
SIZES = {kind: np.dtype(dtype).itemsize for kind, dtype in KINDS.items()}
FLOATS = "fhd"
END, BARRIER = "end", "barrier"  # what s_endpgm and s_barrier give instead of a pc to go on from
CONSTANTS = {240: 0.5, 241: -0.5, 242: 1.0, 243: -1.0, 244: 2.0, 245: -2.0, 246: 4.0, 247: -4.0,
             248: 0.15915494309189532}
#: what looks at the bits of floats whatever MODE says; and what the manuals do not say of flushed denormals
BITWISE, DENORMALS_MATTER = ("v_cmp_class", "v_cmpx_class", "v_cndmask"), ("v_frexp", "v_div_", "v_dot")
#: SHARED_BASE and SHARED_LIMIT, PRIVATE_BASE and PRIVATE_LIMIT: as Linux's kfd lays them out on gfx9, and of 64 bits
APERTURES = {235: 1 << 48, 236: 1 << 48 | 0xFFFFFFFF, 237: 2 << 48, 238: 2 << 48 | 0xFFFFFFFF}
Source = Callable[[], np.ndarray]
#: known(i) gives, of the registers of reads[i], in which lanes somebody wrote them: [waves, 64] each, of scalar ones
#: [waves, 1]
Known = Callable[[int], list[np.ndarray]]
#: from that, before the instruction runs: of the registers of writes[i] the same, one for all of them or one each, and
#: the lanes that are written; None: those of EXEC. [(i, known, lanes)]
Follow = Callable[[Known], list[tuple[int, np.ndarray, np.ndarray | None]]]


def inline_constant(code: int, kind: str) -> Any:
    """A constant that a source operand's code stands for, but literals, as a NumPy scalar of `kind`."""
    dtype, size = KINDS[kind], SIZES[kind]
    if code in APERTURES and size == 8:
        return np.uint64(APERTURES[code]).view(dtype)
    if code in CONSTANTS:
        if kind in "wus" and size == 2:
            return np.float16(CONSTANTS[code]).view(dtype)
        real = {2: np.float16, 4: np.float32, 8: np.float64}[size]
        return real(CONSTANTS[code]).view(dtype)
    if not 128 <= code <= 208:
        raise NotImplementedError(f"source operand {code}")
    value = code - 128 if code <= 192 else 192 - code
    return np.dtype(f"i{size}").type(value).view(dtype)


def literal_constant(value: int, kind: str) -> Any:
    """The 32 bits behind an instruction, as a NumPy scalar of `kind`."""
    dtype, size = KINDS[kind], SIZES[kind]
    if kind == "d":
        return np.uint64(value << 32).view(np.float64)
    if kind == "I":
        return np.int64(value - (value >> 31 << 32))
    return np.dtype(f"u{size}").type(value & (1 << 8 * size) - 1).view(dtype)


class Binding:
    """What a form needs to make an instruction callable."""

    def __init__(self, party, instruction: Instruction, pc: int):
        self.party, self.instruction, self.pc = party, instruction, pc
        self.machine, self.fields = party.machine, instruction.fields
        self.reads: list[tuple[str, int, int]] = []    # ("v" or "s", first register, how many)
        self.writes: list[tuple[str, int, int]] = []
        #: where not every result depends on every source: (reads, writes) of each part; else empty
        self.parts: list[tuple[list, list]] = []
        #: where results come from other lanes than their own; see `unwritten.py`
        self.follow: Follow | None = None

    def number(self, field: str) -> int:
        """The register number in a field of the instruction."""
        return self.instruction.number(field)

    def literal(self) -> int:
        """The constant behind the instruction, which is there where a source says LITERAL."""
        assert self.instruction.literal is not None
        return self.instruction.literal

    # ---- sources

    def source(self, code: int, kind: str, *, negative=False, absolute=False, high=False, agpr=False) -> Source:
        """What a source operand gives: [waves, 64] of a vector register, [waves, 1] or [1, 1] of others."""
        if code >= VGPR0:
            get = self.vector(code - VGPR0, kind, high=high, agpr=agpr)
        elif code == LITERAL or 128 <= code <= 248:
            value = np.full((1, 1), self.constant(code, kind))
            if high and SIZES[kind] == 2 and code == LITERAL:
                value = np.full((1, 1), np.uint16(self.literal() >> 16)).view(KINDS[kind])
            get = _always(value)
        else:
            get = self._scalar_column(code, kind, high)
        if (negative or absolute) and kind not in FLOATS:
            raise NotImplementedError("a sign modifier on an integer")
        if absolute:
            get = _then(np.abs, get)
        if negative:
            get = _then(np.negative, get)
        return get

    def vector(self, register: int, kind: str, *, high=False, agpr=False) -> Source:
        """Lanes of a vector register or, for 64-bit kinds, of a pair."""
        file = self.party.A if agpr else self.party.V
        words = max(1, SIZES[kind] // 4)
        self.note(self.reads, register, words, agpr)
        if SIZES[kind] == 8:
            low, top, dtype = file[register], file[register + 1], KINDS[kind]
            shape = (*low.shape, 2)

            def get() -> np.ndarray:
                both = np.empty(shape, np.uint32)
                both[..., 0], both[..., 1] = low, top
                return both.view(dtype)[..., 0]
            return get
        if SIZES[kind] == 2:
            return _always(file[register].view(KINDS[kind])[:, int(high)::2])
        return _always(file[register].view(KINDS[kind]))

    def canonical(self, get: Source, kind: str) -> Source:
        """A floating-point source as the kernel's MODE has arithmetic take it."""
        kernel = self.machine.kernel
        if kind not in FLOATS or self.instruction.name.startswith(BITWISE):
            return get
        if kernel.flushes and self.instruction.name.startswith(DENORMALS_MATTER):
            raise NotImplementedError(f"{self.instruction.name} while fp32 denormals are flushed")
        if not kernel.ieee:
            get = _then(arithmetic.quieted, get)
        return _then(arithmetic.without_denormals, get) if kind == "f" and kernel.flushes else get

    def flushing(self, write: Callable[[np.ndarray], None], kind: str) -> Callable[[np.ndarray], None]:
        """What writes a result of `kind` as the kernel's MODE has it."""
        if kind != "f" or not self.machine.kernel.flushes:
            return write
        return lambda value: write(arithmetic.without_denormals(value))

    def words(self, register: int, count: int, agpr=False) -> list[np.ndarray]:
        """Views [waves, 64] uint32 of consecutive vector registers that are read."""
        self.note(self.reads, register, count, agpr)
        return list((self.party.A if agpr else self.party.V)[register:register + count])

    def scalar(self, code: int, kind: str) -> Source:
        """What a scalar operand gives: [waves] or [1]."""
        get = self.source(code, kind)
        if code in (VCCZ, EXECZ, SCC):
            return lambda: get()[:, 0]
        value = get()[:, 0]
        return _always(value)

    def lane_mask(self, code: int) -> Source:
        """A 64-bit scalar operand as bool [waves, 64]."""
        get = self.scalar(code, "U")
        return lambda: lanes_of(get())

    def constant(self, code: int, kind: str) -> Any:
        """An inline constant or literal, as a NumPy scalar of `kind`."""
        return literal_constant(self.literal(), kind) if code == LITERAL else inline_constant(code, kind)

    def _scalar_column(self, code: int, kind: str, high: bool) -> Source:
        party, dtype, size = self.party, KINDS[kind], SIZES[kind]
        if code == SCC:
            return lambda: party.scc.astype(f"u{size}")[:, None].view(dtype)
        if code in (VCCZ, EXECZ):
            column = party.S64[:, (VCC if code == VCCZ else EXEC) // 2]
            return lambda: (column == 0).astype(f"u{size}")[:, None].view(dtype)
        if not (code < 124 or code in (M0, EXEC, EXEC + 1)):
            raise NotImplementedError(f"source operand {code}")
        self.reads.append(("s", code, max(1, size // 4)))
        if size == 8:
            if code & 1:
                raise NotImplementedError("a 64-bit scalar operand that starts at an odd register")
            return _always(party.S64[:, code // 2:code // 2 + 1].view(dtype))
        if size == 2:
            at = 2 * code + int(high)
            return _always(self.machine.sgprs.view(np.uint16)[party.waves, at:at + 1].view(dtype))
        return _always(party.S[:, code:code + 1].view(dtype))

    # ---- destinations

    def note(self, into: list, register: int, count: int, agpr: bool = False) -> None:
        offset = self.machine.kernel.agpr_offset if agpr else 0
        if register + count + offset > self.machine.kernel.vgprs:
            raise NotImplementedError(f"v{register + count - 1} of {self.machine.kernel.vgprs} allocated registers")
        into.append(("v", register + offset, count))

    def sink(self, register: int, kind: str, *, agpr=False, high: bool | None = None) -> Callable[[np.ndarray], None]:
        """What writes [waves, 64] of `kind` to a vector register in the lanes that EXEC has. Of 16-bit kinds `high`
        says which half, the other one kept; None: the low half, the other one zero."""
        party, dtype = self.party, KINDS[kind]
        file = party.A if agpr else party.V
        self.note(self.writes, register, max(1, SIZES[kind] // 4), agpr)
        if SIZES[kind] == 8:
            low, top = file[register], file[register + 1]

            def write_pair(value: np.ndarray) -> None:
                both = np.ascontiguousarray(value).view(np.uint32).reshape(*value.shape, 2)
                if party.full:
                    low[...], top[...] = both[..., 0], both[..., 1]
                else:
                    np.copyto(low, both[..., 0], where=party.mask)
                    np.copyto(top, both[..., 1], where=party.mask)
            return write_pair

        def write(to: np.ndarray, value: np.ndarray) -> None:
            if party.full:
                to[...] = value
            else:
                np.copyto(to, value, where=party.mask)

        if SIZES[kind] == 2 and high is None:
            to = file[register]
            return lambda value: write(to, np.ascontiguousarray(value).view(np.uint16))
        to = file[register].view(dtype)
        if SIZES[kind] == 2:
            to = to[:, int(bool(high))::2]
        return lambda value: write(to, value)

    def scalar_sink(self, register: int, kind: str) -> Callable[[np.ndarray], None]:
        """What writes [waves] or [1] of `kind` to a scalar register or pair."""
        party, dtype = self.party, KINDS[kind]
        self.writes.append(("s", register, SIZES[kind] // 4))
        if SIZES[kind] == 8:
            if register & 1:
                raise NotImplementedError("a 64-bit scalar destination that starts at an odd register")
            to = party.S64[:, register // 2].view(dtype)
        else:
            to = party.S[:, register].view(dtype)
        if register not in (EXEC, EXEC + 1):
            def write(value: np.ndarray) -> None:
                to[...] = value
            return write

        def write_exec(value: np.ndarray) -> None:
            to[...] = value
            party.exec_changed()
        return write_exec

    def lane_mask_sink(self, register: int) -> Callable[[np.ndarray], None]:
        """What writes bool [waves, 64] to a scalar pair; lanes that EXEC lacks give 0."""
        write, party = self.scalar_sink(register, "U"), self.party

        def pack(value: np.ndarray) -> None:
            if value.shape != party.mask.shape:
                value = np.broadcast_to(value, party.mask.shape)
            write(masks_of(value if party.full else value & party.mask))
        return pack


def _always(value: np.ndarray) -> Source:
    return lambda: value


def _then(function: Callable, get: Source) -> Source:
    return lambda: function(get())


def lanes_of(masks: np.ndarray) -> np.ndarray:
    """64-bit lane masks [waves] as bool [waves, 64]."""
    octets = np.ascontiguousarray(masks).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(bool)


def masks_of(lanes: np.ndarray) -> np.ndarray:
    """Bool [waves, 64] as 64-bit lane masks."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint64)[:, 0]
