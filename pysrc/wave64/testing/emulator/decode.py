"""Bytes to instructions. The decoder is tinygrad's, generated from AMD's machine-readable ISA; what they do is ours.

An `Instruction` keeps the decoder's fields (`fields.vdst.offset`, `fields.opsel`, ...) under the manual's mnemonic,
without the suffix of its encoding, which is `family`.
"""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

#: register numbers of the scalar space, and of what a source operand may name besides registers
VCC, M0, EXEC = 106, 124, 126
MFMA_LD_SCALE = 0xD3AC  # the upper half of the word that scaled matrix instructions begin with
VCCZ, EXECZ, SCC, LITERAL, VGPR0 = 251, 252, 253, 255, 256


class Fields:
    """The decoder's fields of an instruction. It takes them out of the word each time; here they are kept."""

    def __init__(self, decoded: Any):
        self._decoded, self._names = decoded, _names(type(decoded))

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(name)
        value = getattr(self._decoded, name)
        self.__dict__[name] = value
        return value


@functools.cache
def _names(encoding: type) -> frozenset[str]:
    return frozenset(name for name, _ in encoding._fields)


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


#: by the first word of instructions seen, which says how long they are: their bytes
_lengths: dict[bytes, int] = {}


def decode(code: bytes) -> Instruction:
    """The instruction that `code` starts with. Raises NotImplementedError where the decoder knows none."""
    length = _lengths.get(code[:4])
    if length is None:
        length = _lengths[code[:4]] = 4 * _decode(code).words
    return _decode(code[:length])


@functools.lru_cache(maxsize=2**16)
def _decode(code: bytes) -> Instruction:
    """The same for the same bytes, which kernels have in common by the thousand."""
    from tinygrad.renderer.amd import decode_inst

    # only the scaled matrix instructions have 16 bytes, and the decoder takes for one any two of which the second fits
    prefixed = int.from_bytes(code[2:4], "little") == MFMA_LD_SCALE
    try:
        fields: Any = decode_inst(code if prefixed else code[:8], "cdna")
    except (ValueError, AssertionError) as e:
        raise NotImplementedError(f"no CDNA instruction starts with {code[:8].hex(' ', 4)} ({e})") from None
    name = fields.op.name.lower().removesuffix("_e32").removesuffix("_e64")
    family = type(fields).__name__.removesuffix("_LIT")
    size = fields.size()
    if fields._literal is None and any(getattr(getattr(fields, source, None), "offset", 0) == LITERAL
                                       for source in ("src0", "src1", "src2", "ssrc0", "ssrc1")):
        raise NotImplementedError(f"{name}: a literal in an encoding without one")
    return Instruction(name, family, size // 4, Fields(fields))
