"""From an instruction to what the core executes. `lower` gives one without a handler where the core has none, or not
for these modifiers: NumPy executes it.
"""

import functools
import re
from collections.abc import Callable
from typing import cast

from wave64.testing.emulator import conversions, matrix, packed, scalar, vector, vmem
from wave64.testing.emulator import lower_memory as memory
from wave64.testing.emulator import lower_vector as alu
from wave64.testing.emulator.binding import SIZES
from wave64.testing.emulator.code_object import Kernel
from wave64.testing.emulator.decode import EXEC, SCC, VCC, VGPR0, Instruction
from wave64.testing.emulator.lowered import CONSTANT, MATTERS, NO_SOURCE, OWN, UNSEEN, VECTOR, Lowered, Unknown

#: where each half of a result depends on its own sources
IN_PARTS = ("v_mad_u64_u32", "v_mad_i64_i32", "v_lshl_add_u64", "v_lshlrev_b64", "s_lshl_b64", "v_pk_add_f32",
            "v_pk_mul_f32", "v_pk_fma_f32", "v_pk_mov_b32", "v_swap_b32")


# ---- scalar instructions

def _scalar(low: Lowered, specification: str) -> str:
    result, sources = specification.rstrip("!,").split("=")
    fields = low.fields
    operands = iter([getattr(fields, name).offset for name in ("ssrc0", "ssrc1") if hasattr(fields, name)])
    immediate = (fields.simm16 ^ 0x8000) - 0x8000 if hasattr(fields, "simm16") else 0
    for kind in sources:
        if kind in "kK":
            low.immediate(immediate if kind == "k" else immediate & 0xFFFF)
        elif kind == "D":
            low.source(fields.sdst.offset, result)
        elif kind != "c":
            low.source(fields.sdst.offset if "k" in sources.lower() else next(operands), kind)
    if "c" in sources:
        low.reads.append(("s", SCC, 1))
    if result:
        low.scalar_result(fields.sdst.offset, SIZES[result] // 4)
    if specification[-1] in "!," or not result:
        low.writes.append(("s", SCC, 1))
    return low.instruction.name


def _save_exec(low: Lowered) -> str:
    low.source(low.fields.ssrc0.offset, "U")
    low.scalar_result(low.fields.sdst.offset, 2)
    low.writes += [("s", SCC, 1), ("s", EXEC, 2)]
    return low.instruction.name


def _branch(low: Lowered) -> str:
    low.jump, low.rule = 1 + (low.fields.simm16 ^ 0x8000) - 0x8000, MATTERS
    for ending, register in (("scc", SCC), ("vcc", VCC), ("exec", EXEC)):
        if f"cbranch_{ending}" in low.instruction.name:
            low.reads.append(("s", register, 1 if register == SCC else 2))
    return low.instruction.name


def _waits(low: Lowered) -> str:
    low.rule, low.imm = UNSEEN, low.fields.simm16
    return low.instruction.name


def _unseen(handler: str) -> Callable[[Lowered], str]:
    def form(low: Lowered) -> str:
        low.rule = UNSEEN
        return handler
    return form


# ---- matrix instructions

def _matrix(low: Lowered) -> str:
    fields, name = low.fields, low.instruction.name
    family, result, size, _, depth, blocks, kinds = cast(re.Match, matrix.NAME.match(name)).groups()
    size, depth, blocks = int(size), int(depth), int(blocks or 1)
    if matrix.GFX950.search(name) and low.arch != "gfx950" or family == "smfmac" or result == "f64":
        raise Unknown
    mixed, scaled = kinds == "f8f6f4", family == "mfma_scale"
    if mixed:
        if max(fields.cbsz, fields.blgp) > 1 or fields.abid != scaled:
            raise Unknown
        both = matrix.MIXED[fields.cbsz], matrix.MIXED[fields.blgp]
    elif fields.cbsz or fields.abid or fields.blgp:
        raise Unknown
    else:
        both = matrix._of_each(kinds)
    held, registers_of = size * blocks * depth // 64, size * size * blocks // 64
    for i, kind in enumerate(both):
        code, words = getattr(fields, f"src{i}").offset, held * matrix.BITS[kind] // 32
        low.src.append((VECTOR, 0, low.note(low.reads, code - VGPR0, words, bool(fields.acc >> i & 1)), *NO_SOURCE[3:]))
    acc, addend = bool(fields.acc_cd), fields.src2.offset
    if addend >= VGPR0:
        low.src.append((VECTOR, 0, low.note(low.reads, addend - VGPR0, registers_of, acc), *NO_SOURCE[3:]))
    else:
        low.source(addend, {"f32": "f", "i32": "i"}[result])
        if low.src[-1][0] != CONSTANT:
            raise Unknown
    if scaled:
        for i, code in enumerate((fields.scale_src0, fields.scale_src1)):
            if fields.neg or fields.neg_hi or code < VGPR0:
                raise Unknown
            shift = 8 * (fields.opsel >> i & 1 | (fields.opsel_hi >> i & 1) << 1)
            low.src.append((VECTOR, 0, low.note(low.reads, code - VGPR0, 1), shift, *NO_SOURCE[4:]))
    low.vector_result(low.number("vdst"), registers_of, acc)
    low.unused = addend >= VGPR0 and 0 < abs(low.src[2][2] - low.dst) < registers_of  # C is read as D is written
    numbers = ("f32", "f16", "bf16", "i8", "fp8", "bf8")
    low.more = numbers.index(both[0]) | numbers.index(both[1]) << 4 | (result == "i32") << 8
    low.imm = size | blocks << 8 | held << 16 | mixed << 24
    low.rule = OWN
    return "mfma"


# ---- by mnemonic

def _forms() -> dict[str, Callable[[Lowered], str]]:
    forms: dict[str, Callable[[Lowered], str]] = {}
    for table in (scalar.SOP1, scalar.SOP2, scalar.SOPC, scalar.SOPK):
        forms |= {name: functools.partial(_scalar, specification=row[0]) for name, row in table.items()}
    forms |= {name: _save_exec for name in scalar.FORMS if "_saveexec_" in name or "_wrexec_" in name}
    forms |= {name: _branch for name in scalar.FORMS if name.startswith(("s_cbranch", "s_branch"))}
    forms |= {name: _unseen("nothing") for name, form in scalar.FORMS.items() if form is scalar._nothing}
    forms |= {"s_waitcnt": _waits, "s_endpgm": _unseen("s_endpgm"), "s_barrier": _unseen("s_barrier"),
              "v_nop": _unseen("v_nop")}
    for table in (*vector.TABLES, conversions.FOR_ARCH, conversions.GFX950):
        forms |= {name: functools.partial(alu.any_encoding, specification=row[0]) for name, row in table.items()}
    forms |= {"v_bitop3_b32": functools.partial(alu.bitop3, kind="u"),
              "v_bitop3_b16": functools.partial(alu.bitop3, kind="w"),
              "v_readfirstlane_b32": alu.to_scalar, "v_readlane_b32": alu.to_scalar, "v_writelane_b32": alu.write_lane,
              "v_swap_b32": alu.swap, "v_permlane16_swap_b32": alu.swap,
              "v_permlane32_swap_b32": alu.swap,
              "v_pk_mov_b32": alu.pk_mov, "v_dot2_f32_f16": functools.partial(alu.dot2, kind="h"),
              "v_dot2_f32_bf16": functools.partial(alu.dot2, kind="b"), "v_dot4_i32_i8": alu.dot4,
              "v_dot4_u32_u8": alu.dot4}
    forms |= {name: alu.accumulators for name in vector.FORMS if name.startswith("v_accvgpr")}
    forms |= {name: alu.mix for name in packed.FORMS if name.startswith("v_mad_mix")}
    for name in (name for name in packed.FORMS if name.startswith("v_pk_") and name != "v_pk_mov_b32"):
        kind = {"f16": "h", "f32": "f", "i16": "s"}.get(name.rpartition("_")[2], "w")
        count = 3 if "_fma_" in name or "_mad_" in name else 2
        forms[name] = functools.partial(alu.pair, kind=kind, count=count)
    forms |= {f"ds_{name}": memory.exchange for name in ("bpermute_b32", "permute_b32", "swizzle_b32")}
    forms |= {name: _unseen("nothing") for name, form in (vmem.FORMS | {"ds_nop": vmem._nothing}).items()
              if form is vmem._nothing}
    return forms


FORMS = _forms()
GFX950_ONLY = frozenset(conversions.GFX950) | {"v_bitop3_b32", "v_bitop3_b16", "v_permlane16_swap_b32",
                                               "v_permlane32_swap_b32"}


def lower(instruction: Instruction, kernel: Kernel, arch: str) -> Lowered:
    """Its `handler` is empty where NumPy has to execute the instruction."""
    low, name, family = Lowered(instruction, kernel, arch), instruction.name, instruction.family
    try:
        form = FORMS.get(name)
        if form is None:
            form = {"SMEM": memory.scalar_load if "_load_" in name else None, "DS": memory.lds_access,
                    **dict.fromkeys(("GLOBAL", "FLAT", "SCRATCH", "MUBUF"), memory.lanes_access)}.get(family)
        if form is None and matrix.NAME.match(name):
            form = _matrix
        if form is None or name in GFX950_ONLY and arch != "gfx950":
            return low
        handler = form(low)
    except Unknown:
        return low
    if ("s", EXEC) in {(kind, first) for kind, first, _ in low.writes} or ("s", EXEC + 1, 1) in low.writes \
            or name in IN_PARTS:
        low.rule = MATTERS
    low.handler = handler
    return low
