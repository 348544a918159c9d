"""Two bits of MODE that change what vector instructions do, wave by wave: VSKIP, under which they are skipped
(arithmetic, memory and LDS; skipped memory instructions count for no s_waitcnt), and GPR_IDX_EN, under which M0 says
which of an instruction's vector registers lie behind the ones that it names, and by how many.

While one of these is set for a wave, NumPy executes it.
"""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import M0, VGPR0, Fields, Instruction
from wave64.testing.emulator.memory import EmulationError

U32 = np.uint32
INDEX, WHICH = 0xFF, 12          # of M0: the low bits, and where those begin that say which operands are relative
OPERANDS = (("src0",), ("src1", "vsrc1"), ("src2",), ("vdst",))   # by bit of the latter
_MEMORY = ("DS", "GLOBAL", "FLAT", "SCRATCH", "MUBUF")
#: instructions of which the manuals do not say which of their registers an index moves
_REFUSED = ("v_readlane", "v_readfirstlane", "v_swap", "v_permlane", "v_mfma", "v_smfmac", "v_movrel")
_ACCUMULATES = ("v_fmac", "v_mac", "v_pk_fmac", "v_dot2c", "v_dot4c", "v_dot8c")


def is_vector(instruction: Instruction) -> bool:
    return instruction.family.startswith("VOP") or instruction.family in _MEMORY


def keys(m0: np.ndarray, indexed: np.ndarray) -> np.ndarray:
    """What tells apart how waves take a vector instruction: the bits of M0 that matter; 0: as it is written."""
    got = m0 & U32(INDEX | 15 << WHICH)
    return np.where(indexed & (got & U32(INDEX) != 0) & (got >> U32(WHICH) != 0), got, U32(0))


def relative(instruction: Instruction, key: int) -> Instruction:
    """The instruction with its vector registers moved as a key says. Raises NotImplementedError where the manuals do
    not say how."""
    index, which, name = key & INDEX, key >> WHICH, instruction.name
    if not instruction.family.startswith("VOP"):
        return instruction
    if instruction.family.endswith(("_DPP16", "_SDWA", "_SDWA_SDST")) or name.startswith(_REFUSED) \
            or name.startswith(_ACCUMULATES) and which & 12:
        raise NotImplementedError(f"{instruction.text} with relative registers")
    fields = instruction.fields
    layout, raw = fields._layout, fields._raw
    for bit, names in enumerate(OPERANDS):
        for field in names:
            if not which >> bit & 1 or field not in layout.fields or name.startswith("v_cmp") and field == "vdst":
                continue
            register = getattr(fields, field).offset
            if field in ("src0", "src1", "src2") and register < VGPR0:
                continue
            if register % VGPR0 + index >= VGPR0:
                raise EmulationError(f"v{register % VGPR0} and an index of {index} in M0 name no vector register")
            raw += index << layout.fields[field][0]
    return Instruction(name, instruction.family, instruction.words, Fields(raw, layout))


# ---- what sets them

def _skip(b: Binding) -> Callable:
    """s_setvskip"""
    word, bit = b.scalar(b.fields.ssrc0.offset, "u"), b.scalar(b.fields.ssrc1.offset, "u")
    machine, to = b.machine, b.machine.skips[b.party.waves]

    def run() -> None:
        to[...] = word() >> (bit() & U32(31)) & U32(1)
        machine.modes_changed()
    return run


def _index(on: bool) -> Callable:
    def bind(b: Binding) -> Callable:
        machine, to = b.machine, b.machine.indexed[b.party.waves]
        change = _to_m0(b, INDEX | 15 << WHICH, b.fields.ssrc1.offset << WHICH) if on else None

        def run() -> None:
            if change:
                change()
            to[...] = on
            machine.modes_changed()
        return run
    return bind


def _to_m0(b: Binding, bits: int, constant: int) -> Callable[[], None]:
    """What sets some bits of M0, of the first source where there is one, and of a constant."""
    column = b.party.S[:, M0]
    get = b.scalar(b.fields.ssrc0.offset, "u") if hasattr(b.fields, "ssrc0") else None
    b.writes.append(("s", M0, 1))

    def run() -> None:
        new = U32(constant) if get is None else get() & U32(INDEX) | U32(constant)
        column[...] = column & ~U32(bits) | new & U32(bits)
    return run


FORMS: dict[str, Callable] = {
    "s_setvskip": _skip, "s_set_gpr_idx_on": _index(True), "s_set_gpr_idx_off": _index(False),
    "s_set_gpr_idx_idx": lambda b: _to_m0(b, INDEX, 0),
    "s_set_gpr_idx_mode": lambda b: _to_m0(b, 15 << WHICH, (b.fields.simm16 & 15) << WHICH),
}
