"""Dependencies that software must keep apart: each rule of the manuals' tables, broken by one wait state and kept by
none too many."""

import numpy as np
import pytest
from assembled import assemble, run

from wave64.testing.emulator.hazards import Hazards
from wave64.testing.emulator.memory import EmulationError

START = """
s_load_dwordx4 s[0:3], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
s_mov_b32 s6, 0x1000
s_mov_b32 s7, 0x27000
s_mov_b32 s8, 0
v_mov_b32_e32 v8, 0
s_waitcnt lgkmcnt(0)
s_mov_b32 s4, s2
s_mov_b32 s5, s3
v_mov_b32_e32 v9, s2
s_nop 15
s_nop 15
"""
XDL2 = "v_mfma_f32_4x4x4_16b_f16 v[20:23], v[10:11], v[12:13], {c}"
XDL4 = "v_mfma_f32_16x16x16_f16 v[20:23], v[10:11], v[12:13], {c}"
XDL8 = "v_mfma_f32_32x32x8_f16 v[20:35], v[10:11], v[12:13], {c}"
XDL16 = "v_mfma_f32_32x32x4_2b_f16 v[20:51], v[10:11], v[12:13], {c}"
XDL4_AGPR = "v_mfma_f32_16x16x16_f16 a[0:3], v[10:11], v[12:13], {c}"
SGEMM2 = "v_mfma_f32_4x4x1_16b_f32 v[20:23], v10, v12, {c}"
SGEMM8 = "v_mfma_f32_16x16x4_f32 v[20:23], v10, v12, {c}"
SGEMM16 = "v_mfma_f32_32x32x2_f32 v[20:35], v10, v12, {c}"
DGEMM = "v_mfma_f64_16x16x4_f64 v[20:27], v[10:11], v[12:13], {c}"
ZERO = {"c": "0"}
READ, WRITE = "v_add_u32_e32 v2, 1, v20", "v_mov_b32_e32 v20, 0"
STORE, LDS = "global_store_dword v1, v20, s[2:3]", "ds_write_b32 v1, v20"
FACTOR = "v_mfma_f32_16x16x16_f16 v[40:43], v[10:11], v[20:21], 0"
NEXT = XDL4.replace("v[20:23]", "v[22:25]")
CHAIN, BESIDE = "v[20:23]", "v[22:25]"
COMPARE = "v_cmp_eq_u32_e64 s[10:11], v1, v1"
MASK = "v_cmpx_eq_u32_e64 s[10:11], v1, v1"

#: (first instruction, second one, wait states on gfx942, and on gfx950; None: not there)
RULES = {
    # tables 37 and 38
    "VALU writes A": ("v_mov_b32_e32 v10, 0", XDL4.format(**ZERO), 2, 2),
    "VALU writes C": ("v_mov_b32_e32 v22, 0", XDL4.format(c=CHAIN), 2, 2),
    "VALU writes an AGPR that is C": ("v_accvgpr_write_b32 a1, 0", XDL4_AGPR.format(c="a[0:3]"), 2, 2),
    "dot product to MFMA": ("v_dot2_f32_f16 v10, v2, v3, v4", XDL4.format(**ZERO), 3, 3),
    "dot product to VALU": ("v_dot2_f32_f16 v20, v2, v3, v4", READ, 3, 3),
    "dot product overwritten": ("v_dot2_f32_f16 v20, v2, v3, v4", WRITE, 3, 3),
    "dot product stored": ("v_dot2_f32_f16 v20, v2, v3, v4", STORE, 3, 3),
    "dot product to the same's C": ("v_dot2_f32_f16 v20, v2, v3, v4", "v_dot2_f32_f16 v20, v2, v3, v20", 0, 0),
    "dot product to the same's A": ("v_dot2_f32_f16 v20, v2, v3, v4", "v_dot2_f32_f16 v20, v20, v3, v20", 3, 3),
    "XDL 2, same C": (XDL2.format(**ZERO), XDL2.format(c=CHAIN), 2, 2),
    "XDL 2, C adjacent": (XDL2.format(**ZERO), XDL2.format(c=BESIDE), 3, 4),
    "XDL 2, C of SGEMM": (XDL2.format(**ZERO), SGEMM2.format(c=CHAIN), 3, 3),
    "XDL 2, B": (XDL2.format(**ZERO), FACTOR, 5, 5),
    "XDL 2, VALU": (XDL2.format(**ZERO), READ, 5, 5),
    "XDL 2, C overwritten": (XDL2.format(c="v[30:33]"), "v_mov_b32_e32 v31, 0", 1, 1),
    "XDL 4, same C": (XDL4.format(**ZERO), XDL4.format(c=CHAIN), 0, 0),
    "XDL 4, same C in AGPRs": (XDL4_AGPR.format(**ZERO), XDL4_AGPR.format(c="a[0:3]"), 0, 0),
    "XDL 4, same C, fewer passes": (XDL4.format(**ZERO), XDL2.format(c=CHAIN), 5, 6),
    "XDL 4, C adjacent": (XDL4.format(**ZERO), XDL4.format(c=BESIDE), 5, 6),
    "XDL 4, C of SGEMM": (XDL4.format(**ZERO), SGEMM8.format(c=CHAIN), 5, 6),
    "XDL 4, B": (XDL4.format(**ZERO), FACTOR, 7, 8),
    "XDL 4, VALU": (XDL4.format(**ZERO), READ, 7, 8),
    "XDL 4, AGPR read": (XDL4_AGPR.format(**ZERO), "v_accvgpr_read_b32 v2, a3", 7, 8),
    "XDL 4, overwritten": (XDL4.format(**ZERO), WRITE, 7, 8),
    "XDL 4, stored": (XDL4.format(**ZERO), STORE, 7, 8),
    "XDL 4, to LDS": (XDL4.format(**ZERO), LDS, 7, 8),
    "XDL 4, C overwritten": (XDL4.format(c="v[30:33]"), "v_mov_b32_e32 v31, 0", 3, 3),
    "XDL 8, C adjacent": (XDL8.format(**ZERO), XDL4.format(c=BESIDE), 9, 10),
    "XDL 8, VALU": (XDL8.format(**ZERO), READ, 11, 12),
    "XDL 8, C overwritten": (XDL8.format(c="v[40:55]"), "v_mov_b32_e32 v41, 0", 7, 7),
    "XDL 16, C adjacent": (XDL16.format(**ZERO), XDL4.format(c=BESIDE), 17, 18),
    "XDL 16, B": (XDL16.format(**ZERO), FACTOR.replace("v[40:43]", "v[52:55]"), 19, 20),
    "XDL 16, VALU": (XDL16.format(**ZERO), READ, 19, 20),
    "XDL 16, C overwritten": (XDL16.format(c="a[0:31]").replace("v[20:51]", "a[0:31]"), "v_accvgpr_write_b32 a31, 0",
                              19, 20),
    "SGEMM 2, same C": (SGEMM2.format(**ZERO), SGEMM2.format(c=CHAIN), 2, 2),
    "SGEMM 8, same C": (SGEMM8.format(**ZERO), SGEMM8.format(c=CHAIN), 0, 0),
    "SGEMM 8, C adjacent": (SGEMM8.format(**ZERO), SGEMM8.format(c=BESIDE), 8, 8),
    "SGEMM 8, C of XDL": (SGEMM8.format(**ZERO), XDL4.format(c=CHAIN), 0, 0),
    "SGEMM 8, B": (SGEMM8.format(**ZERO), FACTOR, 10, 10),
    "SGEMM 16, VALU": (SGEMM16.format(**ZERO), READ, 18, 18),
    "SGEMM 16, stored": (SGEMM16.format(**ZERO), STORE, 18, 18),
    "SGEMM, C overwritten": (SGEMM8.format(c="v[30:33]"), "v_mov_b32_e32 v31, 0", 0, 0),
    "DGEMM, same C": (DGEMM.format(**ZERO), DGEMM.format(c="v[20:27]"), 0, 0),
    "DGEMM, C adjacent": (DGEMM.format(**ZERO), DGEMM.replace("v[20:27]", "v[36:43]").format(c="v[22:29]"), 9, 17),
    "DGEMM, C of XDL": (DGEMM.format(**ZERO), XDL4.format(c=CHAIN), 0, 0),
    "DGEMM, B": (DGEMM.format(**ZERO), FACTOR, 11, 19),
    "DGEMM, VALU": (DGEMM.format(**ZERO), READ, 11, 19),
    "DGEMM, stored": (DGEMM.format(**ZERO), STORE, 18, 18),
    "v_cmpx to MFMA": (MASK, XDL4.format(**ZERO), 4, 4),
    "FP8, 8 passes on gfx950": ("v_mfma_f32_16x16x128_f8f6f4 v[20:23], v[2:9], v[10:17], 0", READ, None, 12),
    # table 11
    "MODE set twice": ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1",
                       "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 0", 2, 2),
    "VCCZ as a source": ("v_cmp_eq_u32_e32 vcc, v1, v1", "v_mov_b32_e32 v2, src_vccz", 5, 5),
    "EXECZ as a source": (MASK, "v_mov_b32_e32 v2, src_execz", 5, 5),
    "lane to read": ("v_readfirstlane_b32 s10, v8", "v_readlane_b32 s12, v1, s10", 4, 4),
    "lane to write": ("v_readfirstlane_b32 s10, v8", "v_writelane_b32 v2, 1, s10", 4, 4),
    "VCC to v_div_fmas": ("v_cmp_eq_u32_e32 vcc, v1, v1", "v_div_fmas_f32 v2, v1, v1, v1", 4, 4),
    "data of a store": ("global_store_dwordx4 v1, v[20:23], s[2:3]", "v_mov_b32_e32 v22, 0", 2, 2),
    "data of three": ("global_store_dwordx3 v1, v[20:22], s[2:3]", "v_mov_b32_e32 v22, 0", 2, 2),
    "data of two": ("global_store_dwordx2 v1, v[20:21], s[2:3]", "v_mov_b32_e32 v20, 0", 0, 0),
    "data of a buffer store": ("buffer_store_dwordx4 v[20:23], v1, s[4:7], 0 offen", "v_mov_b32_e32 v20, 0", 2, 2),
    "data of a buffer store, offset in an SGPR": ("buffer_store_dwordx4 v[20:23], v1, s[4:7], s8 offen",
                                                  "v_mov_b32_e32 v20, 0", 0, 0),
    "SGPR to VMEM": ("v_readfirstlane_b32 s8, v8", "buffer_load_dword v2, v1, s[4:7], s8 offen", 5, 5),
    "SGPR to VMEM's address": ("v_readfirstlane_b32 s2, v9", "global_load_dword v2, v1, s[2:3]", 5, 5),
    "M0 to a load to LDS": ("s_mov_b32 m0, 0", "global_load_lds_dword v1, s[2:3]", 1, 1),
    "VGPR to DPP": ("v_mov_b32_e32 v20, 0", "v_mov_b32_dpp v2, v20 row_shr:1 row_mask:0xf bank_mask:0xf", 2, 2),
    "EXEC to DPP": (MASK, "v_mov_b32_dpp v2, v20 row_shr:1 row_mask:0xf bank_mask:0xf", 5, 5),
    "SGPR as a constant": ("v_readfirstlane_b32 s10, v8", "v_add_u32_e32 v2, s10, v1", 2, 2),
    "VCC as a constant": ("v_cmp_eq_u32_e32 vcc, v1, v1", "v_add_u32_e32 v2, vcc_lo, v1", 2, 2),
    "SGPR as a mask": (COMPARE, "v_cndmask_b32_e64 v2, v1, v1, s[10:11]", 0, 0),
    "VCC as a mask": ("v_cmp_eq_u32_e32 vcc, v1, v1", "v_addc_co_u32_e32 v2, vcc, v1, v1, vcc", 0, 0),
    "EXEC as a constant": (MASK, "v_mov_b32_e32 v2, exec_lo", 2, 2),
    "EXEC to a lane": (MASK, "v_readfirstlane_b32 s12, v1", 4, 4),
    "VGPR to a lane": ("v_mov_b32_e32 v20, 0", "v_readlane_b32 s12, v20, 3", 1, 1),
    "VGPR to the first lane": ("v_mov_b32_e32 v20, 0", "v_readfirstlane_b32 s12, v20", 1, 1),
    "SDWA's result": ("v_mov_b32_sdwa v20, v1 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD", READ, 1, 1),
    "SDWA's result kept": ("v_mov_b32_sdwa v20, v1 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD",
                           "v_mov_b32_sdwa v20, v1 dst_sel:WORD_0 dst_unused:UNUSED_PRESERVE src0_sel:DWORD", 1, 1),
    "SDWA's whole result": ("v_mov_b32_sdwa v20, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1", READ, 0, 0),
    "OPSEL's result": ("v_mad_u16 v20, v1, v1, v1 op_sel:[0,0,0,1]", READ, 1, 1),
    "OPSEL's low result": ("v_mad_u16 v20, v1, v1, v1 op_sel:[1,0,0,0]", READ, 0, 0),
    "transcendental": ("v_exp_f32_e32 v20, v1", READ, 1, 1),
    "transcendental to another": ("v_exp_f32_e32 v20, v1", "v_rcp_f32_e32 v2, v20", 0, 0),
    "v_cmpx to a permutation": (MASK, "v_permlane32_swap_b32 v20, v21", None, 4),
    "VGPR to a permutation": ("v_mov_b32_e32 v20, 0", "v_permlane32_swap_b32 v20, v21", None, 2),
}
ARCHS = ("gfx942", "gfx950")


def waiting(states: int) -> str:
    """Two instructions, where it takes two."""
    return "".join(f"s_nop {n - 1}\n" for n in ((states,) if states <= 16 else (16, states - 16)) if n)


def bodies(arch: str) -> tuple[tuple[str, str], ...]:
    """Every rule that the architecture has as kernels: with one wait state too few, and with enough."""
    kernels = []
    for i, (first, second, *states) in enumerate(RULES.values()):
        needed = states[ARCHS.index(arch)]
        for name, between in (() if needed is None else (("few", needed - 1), ("enough", needed))):
            if between >= 0:
                kernels.append((f"{name}{i}", f"{START}{first}\n{waiting(between)}{second}\ns_nop 0\n"))
    return tuple(kernels)


def execute(arch: str, kernels: tuple[tuple[str, str], ...], kernel: str) -> None:
    given, result = np.zeros(1024, np.uint32), np.zeros(1024, np.uint32)
    run(assemble(arch, kernels, lds=1024), kernel, given, result, block=128, checks=(Hazards,))


@pytest.mark.parametrize(("rule", "arch", "states"), [
    (rule, arch, states) for rule, (_, _, *both) in RULES.items()
    for arch, states in zip(ARCHS, both, strict=True) if states is not None])
def test_a_rule_of_the_manual(rule, arch, states):
    i = list(RULES).index(rule)
    execute(arch, bodies(arch), f"enough{i}")
    if states:
        with pytest.raises(EmulationError, match=f"early: .* {states - 1} wait states after .*; {states} must lie"):
            execute(arch, bodies(arch), f"few{i}")


LOOP = START + """
s_mov_b32 s9, {rounds}
again{i}:
{use}
s_sub_i32 s9, s9, 1
{matrix}
s_cmp_eq_u32 s9, 0
{between}
s_cbranch_scc0 again{i}
s_nop 15
s_nop 15
"""
#: name -> (kernel, whether it breaks a rule): a window that a branch carries to the loop's head, 4 of 7 states in it
PATHS = {
    "branch back": (LOOP.format(i=0, rounds=2, use=READ, matrix=XDL4.format(**ZERO), between="s_nop 3"), True),
    "branch back, apart": (LOOP.format(i=1, rounds=2, use=READ, matrix=XDL4.format(**ZERO), between="s_nop 4"), False),
    "branch not taken": (LOOP.format(i=2, rounds=1, use=READ, matrix=XDL4.format(**ZERO), between="s_nop 3"), False),
    # LLVM 22 counts the second branch, too, and leaves such a loop one wait state short
    "a branch behind the one taken": (LOOP.replace("scc0 again{i}", "scc0 again{i}\ns_branch over{i}\nover{i}:").format(
        i=8, rounds=2, use=READ, matrix=XDL4.format(**ZERO), between="s_nop 3"), True),
    "waves part": (START + "v_cmp_gt_u32_e32 vcc, 64, v0\n" + XDL4.format(**ZERO) + "\ns_cbranch_vccz over3\ns_nop 5\n"
                   "over3:\n" + READ, True),
    "no wave goes the short way": (START + "v_cmp_gt_u32_e32 vcc, 512, v0\n" + XDL4.format(**ZERO) + "\n"
                                   "s_cbranch_vccz over4\ns_nop 5\nover4:\n" + READ, False),
    "written anew": ("\n".join([START, XDL4.format(**ZERO), NEXT.format(**ZERO), NEXT.format(c=BESIDE)]), False),
    "written anew next to it": ("\n".join([START, XDL4.format(**ZERO), NEXT.format(**ZERO), "s_nop 4", READ]), True),
    "other instructions between": (START + XDL4.format(**ZERO) + 7 * "\nv_add_u32_e32 v3, 1, v1" + "\n" + READ, False),
}


@pytest.mark.parametrize("path", PATHS)
def test_windows_reach_over_branches(path):
    body, breaks = PATHS[path]
    kernels = tuple((f"path{i}", text) for i, (text, _) in enumerate(PATHS.values()))
    kernel = f"path{list(PATHS).index(path)}"
    if breaks:
        with pytest.raises(EmulationError, match=r"v20 too early: .*v_add_u32 .* reads it \(VALU\) \d wait states"):
            execute("gfx942", kernels, kernel)
    else:
        execute("gfx942", kernels, kernel)
