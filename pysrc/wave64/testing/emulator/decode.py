"""Bytes to instructions. The decoder is tinygrad's, generated from AMD's machine-readable ISA; what they do is ours.

An `Instruction` keeps the decoder's fields (`fields.vdst.offset`, `fields.opsel`, ...) under the manual's mnemonic,
without the suffix of its encoding, which is `family`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

#: register numbers of the scalar space, and of what a source operand may name besides registers
VCC, M0, EXEC = 106, 124, 126
MFMA_LD_SCALE = 0xD3AC  # the upper half of the word that scaled matrix instructions begin with
VCCZ, EXECZ, SCC, LITERAL, VGPR0 = 251, 252, 253, 255, 256


class Operand(NamedTuple):
    """A register or constant that a field names, by its number in the space of all."""

    offset: int


OPERANDS = tuple(Operand(i) for i in range(512))


class Fields:
    """The decoder's fields of an instruction, taken out of its bytes as they are asked for, and kept."""

    def __init__(self, raw: int, layout: "Layout"):
        self._raw, self._layout = raw, layout

    def __getattr__(self, name: str) -> Any:
        where = self._layout.fields.get(name)
        if where is None:
            raise AttributeError(name)
        low, mask, base, shift, operand = where
        value = (self._raw >> low & mask) << shift
        value = OPERANDS[value + base] if operand else self._layout.op if name == "op" else value
        self.__dict__[name] = value
        return value

    @cached_property
    def _decoded(self) -> Any:
        """As the decoder has it."""
        return self._layout.kind.from_bytes(self._raw.to_bytes(4 * self._layout.words, "little"))


@dataclass(frozen=True)
class Layout:
    """What instructions have in common that differ in registers, constants and modifiers only."""

    name: str
    family: str
    words: int
    kind: type   # the decoder's
    op: Any
    #: field -> (lowest bit, mask, and of operands what is added to it, how far it is shifted and True)
    fields: dict[str, tuple[int, int, int, int, bool]]


@dataclass(frozen=True)
class Instruction:
    """One decoded instruction."""

    name: str
    family: str    # SOP2, VOP3, ...; with _DPP16 and _SDWA where a modifier dword follows
    words: int     # of 4 bytes
    fields: Fields

    @cached_property
    def text(self) -> str:
        """As error messages show it."""
        return f"{self.name} {repr(self.fields._decoded).split('(', 1)[1].removesuffix(')')}".strip()

    @property
    def literal(self) -> int | None:
        return getattr(self.fields, "literal", None)

    def number(self, field: str) -> int:
        """The register number in `field`, in the space of its kind: VGPRs count from 0."""
        offset = getattr(self.fields, field).offset
        return offset - VGPR0 if offset >= VGPR0 else offset


#: (shift, value above it, bits of the first word that say which instruction it is, its sources that may be a literal or
#: modifiers); the first that fits counts. Of AMD's manual; the others are decoded each time
_ENCODINGS = (
    (23, 0x17D, 0xFF80FF00, 1), (23, 0x17E, 0xFFFF0000, 2), (23, 0x17F, 0xFFFF0000, 0), (28, 0xB, 0xFF800000, 0),
    (30, 0x2, 0xFF800000, 2), (25, 0x3F, 0xFE01FE00, 3), (25, 0x3E, 0xFFFE0000, 3), (31, 0x0, 0xFE000000, 3),
    (26, 0x34, 0xFFFF0000, 0), (26, 0x36, 0xFFFE0000, 0), (26, 0x37, 0xFFFCC000, 0), (26, 0x38, 0xFFFC0000, 0),
    (26, 0x30, 0xFFFC0000, 0))
_layouts: dict[int, Layout] = {}


def decode(code: bytes) -> Instruction:
    """The instruction that `code` starts with. Raises NotImplementedError where the decoder knows none."""
    first = int.from_bytes(code[:4], "little")
    encoding = next((each for each in _ENCODINGS if first >> each[0] == each[1]), None)
    if encoding is None:
        return _slowly(code)
    _, value, mask, sources = encoding
    key = first & mask
    if sources == 3:
        key = key << 9 | (first & 511 if first & 511 in (249, 250, LITERAL) else 0)
    elif sources:
        key = key << 9 | (first & 255 == LITERAL or sources == 2 and first >> 8 & 255 == LITERAL)
    else:
        key = key << 9
        if value == 0x34 and (first >> 16 == MFMA_LD_SCALE or _names_literal(code)):
            return _slowly(code)
    layout = _layouts.get(key)
    if layout is None:
        found = _slowly(code)
        _layouts[key] = found.fields._layout
        return found
    return Instruction(layout.name, layout.family, layout.words,
                       Fields(int.from_bytes(code[:4 * layout.words], "little"), layout))


def _names_literal(code: bytes) -> bool:
    second = int.from_bytes(code[4:8], "little")
    return LITERAL in (second & 511, second >> 9 & 511, second >> 18 & 511)


def missing() -> str | None:
    """Why no instruction can be decoded here, and what to do; None: it can."""
    try:
        import tinygrad.renderer.amd  # noqa: F401
    except ImportError as e:
        why = "is not installed" if e.name == "tinygrad" else f"is another version ({e})"
        return f"the package tinygrad, whose tables decode machine code, {why}; pip install 'wave64[emulator]'"
    return None


def _slowly(code: bytes) -> Instruction:
    """By the decoder."""
    from tinygrad.renderer.amd import decode_inst
    from tinygrad.renderer.amd.dsl import AlignedSGPRField, SrcField

    # only the scaled matrix instructions have 16 bytes, and the decoder takes for one any two of which the second fits
    prefixed = int.from_bytes(code[2:4], "little") == MFMA_LD_SCALE
    try:
        decoded: Any = decode_inst(code if prefixed else code[:8], "cdna")
    except (ValueError, AssertionError) as e:
        raise NotImplementedError(f"no CDNA instruction starts with {code[:8].hex(' ', 4)} ({e})") from None
    name = decoded.op.name.lower().removesuffix("_e32").removesuffix("_e64")
    if decoded._literal is None and any(getattr(getattr(decoded, source, None), "offset", 0) == LITERAL
                                        for source in ("src0", "src1", "src2", "ssrc0", "ssrc1")):
        raise NotImplementedError(f"{name}: a literal in an encoding without one")
    fields = {}
    for field, bits in decoded._fields:
        base = bits._valid_range[0] if isinstance(bits, SrcField) else 0
        shift = bits._align.bit_length() - 1 if isinstance(bits, AlignedSGPRField) else 0
        fields[field] = bits.lo, bits.mask, base, shift, isinstance(bits, SrcField | AlignedSGPRField)
    layout = Layout(name, type(decoded).__name__.removesuffix("_LIT"), decoded.size() // 4, type(decoded), decoded.op,
                    fields)
    return Instruction(name, layout.family, layout.words, Fields(decoded._raw, layout))
