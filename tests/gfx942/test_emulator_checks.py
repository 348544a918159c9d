"""What the emulator watches besides results: waits, races and what was never written, each distinguished from what is
right and looks alike; and what a wave starts with."""

import contextlib

import numpy as np
import pytest
import torch
from assembled import assemble, run

from wave64 import OPS, platform
from wave64.testing.emulator import emulate
from wave64.testing.emulator import run as run_module
from wave64.testing.emulator.memory import EmulationError

U32 = np.uint32
#: s[0:1] given, s[2:3] result; v1 the lane's word in each
BEGIN = "s_load_dwordx4 s[0:3], s[0:1], 0x0\nv_lshlrev_b32_e32 v1, 2, v0\ns_waitcnt lgkmcnt(0)\n"
STORE = "s_nop 4\nglobal_store_dword v1, v2, s[2:3]\n"


def execute(table, name, *, lanes=64, arch="gfx942"):
    """What the kernel of this name leaves in result; given counts from 0, a word for each lane."""
    kernels = tuple((f"kernel{i}", BEGIN + each[0] + STORE) for i, each in enumerate(table.values()))
    given, result = np.arange(lanes, dtype=U32), np.zeros(lanes, U32)
    code = assemble(arch, kernels, lds=1024, scratch=16)
    run(code, f"kernel{list(table).index(name)}", given, result, block=lanes)
    return result


def judge(table, name, **of):
    """table: name -> (body, None where it is right, else what the report says)."""
    says = table[name][1]
    if says is None:
        execute(table, name, **of)
    else:
        with pytest.raises(EmulationError, match=says):
            execute(table, name, **of)


# ---- waits

TWO_SCALARS = "s_load_dword s4, s[0:1], 0x0\ns_load_dword s5, s[0:1], 0x4\n"
ADDRESS = "v_mov_b32_e32 v4, s0\nv_mov_b32_e32 v5, s1\n"
LDS = "ds_write_b32 v1, v1\ns_waitcnt lgkmcnt(0)\n"
WAITS = {
    "scalar loads come in any order": (
        TWO_SCALARS + "s_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, s4\n", r"s4 is used, but no s_waitcnt .*lgkmcnt"),
    "all scalar loads": (TWO_SCALARS + "s_waitcnt lgkmcnt(0)\nv_mov_b32_e32 v2, s4\n", None),
    "a scalar load next to one of LDS": (
        LDS + "ds_read_b32 v2, v1\ns_load_dword s4, s[0:1], 0x0\ns_waitcnt lgkmcnt(1)\nv_add_u32_e32 v2, 1, v2\n",
        r"v2 is used, but no s_waitcnt .*lgkmcnt"),
    "LDS before any scalar load": (
        LDS + "ds_read_b32 v2, v1\nds_read_b32 v3, v1\ns_waitcnt lgkmcnt(1)\nv_add_u32_e32 v2, 1, v2\n", None),
    "the second of two from LDS": (
        LDS + "ds_read_b32 v3, v1\nds_read_b32 v2, v1\ns_waitcnt lgkmcnt(1)\nv_add_u32_e32 v2, 1, v2\n",
        r"v2 is used, but no s_waitcnt .*lgkmcnt"),
    "LDS after scalar loads that have come": (
        LDS + TWO_SCALARS + "s_waitcnt lgkmcnt(0)\nds_read_b32 v2, v1\nds_read_b32 v3, v1\ns_waitcnt lgkmcnt(1)\n"
        "v_add_u32_e32 v2, s4, v2\n", None),
    "a flat load may be of LDS": (
        ADDRESS + "flat_load_dword v2, v[4:5]\ns_waitcnt vmcnt(0)\nv_add_u32_e32 v2, 1, v2\n",
        r"v2 is used, but no s_waitcnt .*lgkmcnt"),
    "a flat load overtakes": (
        ADDRESS + "global_load_dword v2, v1, s[0:1]\nflat_load_dword v3, v[4:5]\ns_waitcnt vmcnt(1) lgkmcnt(1)\n"
        "v_add_u32_e32 v2, 1, v2\n", r"v2 is used, but no s_waitcnt .*vmcnt"),
    "a flat load waited for": (
        ADDRESS + "flat_load_dword v2, v[4:5]\ns_waitcnt vmcnt(0) lgkmcnt(0)\nv_add_u32_e32 v2, 1, v2\n", None),
    "a load's destination written": (
        "global_load_dword v2, v1, s[0:1]\nv_mov_b32_e32 v2, 0\n", r"v2 is used, but no s_waitcnt .*vmcnt"),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits(name):
    judge(WAITS, name)


# ---- races, of two waves

ZERO = "v_mov_b32_e32 v2, 0\nv_mov_b32_e32 v3, 7\n"
#: s4 is 0 in the first wave, else 1
WHICH = "v_readfirstlane_b32 s4, v0\ns_lshr_b32 s4, s4, 6\n"
SECOND = "s_cmp_eq_u32 s4, 0\ns_cbranch_scc1 {0}\n{1}{0}:\n"
RACES = {
    "the same value to one byte": (ZERO + "ds_write_b32 v2, v3\ns_waitcnt lgkmcnt(0)\n", None),
    "the same value, later": (
        ZERO + WHICH + "ds_write_b8 v2, v3\n" + SECOND.format("later", "ds_write_b8 v2, v3\n"), None),
    "another value, later": (
        ZERO + WHICH + SECOND.format("first", "v_mov_b32_e32 v3, 8\n") + "ds_write_b32 v2, v3\n",
        r"wave \d writes byte 0 of LDS, which wave \d writes"),
    "the same value, over another of before": (
        ZERO + WHICH + SECOND.format("over", "v_mov_b32_e32 v4, 9\nds_write_b8 v2, v4\nds_write_b8 v2, v3\n")
        + "ds_write_b8 v2, v3\n", None),
    "the same value, but read": (
        ZERO + WHICH + "ds_write_b32 v2, v3\ns_waitcnt lgkmcnt(0)\n" + SECOND.format("read", "ds_read_b32 v3, v2\n"),
        r"wave 1 reads byte 0 of LDS, which wave 0 writes"),
    "the value that is there, over a read": (
        ZERO + "ds_write_b32 v2, v3\ns_waitcnt lgkmcnt(0)\ns_barrier\n" + WHICH
        + "ds_read_b32 v4, v2\ns_waitcnt lgkmcnt(0)\n" + SECOND.format("write", "ds_write_b32 v2, v3\n"),
        r"wave 1 writes byte 0 of LDS, which wave 0 reads"),
    "lanes of a wave store different values to LDS": (
        ZERO + WHICH + SECOND.format("alone", "ds_write_b32 v2, v0\n"), None),
    "lanes of both waves store the same different values to LDS": (
        ZERO + "v_and_b32_e32 v5, 63, v0\nds_write_b32 v2, v5\n", None),
    "the same different values, one wave earlier": (
        ZERO + WHICH + "v_and_b32_e32 v5, 63, v0\n" + SECOND.format("both", "ds_write_b32 v2, v5\n")
        + "ds_write_b32 v2, v5\n", None),
    "the same values but for the last lane's": (
        ZERO + "v_and_b32_e32 v5, 63, v0\nv_cmp_eq_u32_e32 vcc, 0x7f, v0\nv_cndmask_b32_e32 v5, v5, v3, vcc\n"
        "ds_write_b32 v2, v5\n", r"wave \d writes byte 0 of LDS, which wave \d writes"),
    "lanes store the same value to memory": (ZERO + "global_store_dword v2, v3, s[2:3]\n", None),
    "lanes store different values to memory": (
        ZERO + "global_store_short v2, v0, s[2:3]\n",
        r"global_store_short .*lanes store different values .*0x0, and 0x7f"),
    "lanes store different values to a buffer": (
        ZERO + "s_mov_b32 s8, s2\ns_and_b32 s9, s3, 0xffff\ns_movk_i32 s10, 512\ns_mov_b32 s11, 0x27000\n"
        "v_and_b32_e32 v4, 4, v1\nbuffer_store_dwordx2 v[0:1], v4, s[8:11], 0 offen\n",
        r"lanes store different values"),
}


@pytest.mark.parametrize("name", RACES)
def test_races(name):
    judge(RACES, name, lanes=128)


# ---- what was never written: v9 and s9 in all lanes, v8 but in the first 16

PART = "s_mov_b64 exec, 0xffff\nv_mov_b32_e32 v8, 5\ns_mov_b64 exec, -1\ns_nop 4\n"
NOBODY = r"v2 comes from a register that was never written"
DPP = "v_mov_b32_e32 v2, 1\ns_nop 1\nv_mov_b32_dpp v2, {} row_mask:0xf bank_mask:0xf{}\n"
FIRST = "s_mov_b64 exec, 0xffff\n"
UNWRITTEN = {
    "DPP": (DPP.format("v9 row_shr:1", ""), NOBODY.replace("v2", "lane 1: v2")),
    "DPP of lanes that somebody wrote": (PART + FIRST + DPP.format("v8 quad_perm:[1,0,3,2]", ""), None),
    "DPP of lanes that was never written": (PART + DPP.format("v8 row_bcast:15", ""), r"lane 32: " + NOBODY),
    "DPP that keeps its destination": (
        FIRST + "v_mov_b32_e32 v2, 1\ns_mov_b64 exec, -1\ns_nop 1\n"
        "v_mov_b32_dpp v2, v0 row_shr:1 row_mask:0xf bank_mask:0xf\n", r"lane 16: " + NOBODY),
    "DPP that keeps rows of its destination": (
        "v_mov_b32_dpp v2, v0 row_ror:1 row_mask:0xb bank_mask:0xf\n", r"lane 32: " + NOBODY),
    "DPP that gives zeros": (PART + "s_mov_b64 exec, 1\nv_mov_b32_e32 v8, 5\ns_nop 1\n"
                             + DPP.format("v9 row_shr:1", " bound_ctrl:0"), None),
    "DPP in a sum": (DPP.format("v0 row_shr:1", "")
                     + "s_nop 1\nv_add_u32_dpp v2, v0, v9 row_shr:1 row_mask:0xf bank_mask:0xf\n", NOBODY),
    "ds_bpermute_b32": (PART + "v_lshlrev_b32_e32 v3, 3, v0\nds_bpermute_b32 v2, v3, v8\ns_waitcnt lgkmcnt(0)\n",
                        r"lane 8: " + NOBODY),
    "ds_bpermute_b32 of lanes that somebody wrote": (
        PART + "v_and_b32_e32 v3, 60, v1\nds_bpermute_b32 v2, v3, v8\ns_waitcnt lgkmcnt(0)\n", None),
    "ds_bpermute_b32 by an address that was never written": (
        "ds_bpermute_b32 v2, v9, v0\ns_waitcnt lgkmcnt(0)\n", NOBODY),
    "ds_bpermute_b32 of lanes that are off": (
        FIRST + "v_mov_b32_e32 v3, 0x80\nds_bpermute_b32 v2, v3, v9\ns_waitcnt lgkmcnt(0)\n", None),
    "ds_permute_b32": (PART + "v_xor_b32_e32 v3, 0x80, v1\nds_permute_b32 v2, v3, v8\ns_waitcnt lgkmcnt(0)\n",
                       r"lane 0: " + NOBODY),
    "ds_permute_b32 of lanes that somebody wrote": (
        PART + FIRST + "ds_permute_b32 v2, v1, v8\ns_waitcnt lgkmcnt(0)\n", None),
    "ds_permute_b32 by an address that was never written": (
        PART + "v_mov_b32_e32 v3, 0\nv_mov_b32_e32 v4, v8\nds_permute_b32 v2, v4, v3\ns_waitcnt lgkmcnt(0)\n", NOBODY),
    "ds_swizzle_b32": (PART + "ds_swizzle_b32 v2, v8 offset:swizzle(SWAP,16)\ns_waitcnt lgkmcnt(0)\n",
                       r"lane 0: " + NOBODY),
    "v_readlane_b32": (PART + "v_readlane_b32 s4, v8, 16\ns_nop 1\nv_mov_b32_e32 v2, s4\n", NOBODY),
    "v_readlane_b32 of a lane that somebody wrote": (
        PART + "v_readlane_b32 s4, v8, 15\ns_nop 1\nv_mov_b32_e32 v2, s4\n", None),
    "v_readlane_b32 by a lane that was never written": (
        "v_readlane_b32 s4, v0, s9\ns_nop 1\nv_mov_b32_e32 v2, s4\n", NOBODY),
    "v_readfirstlane_b32": (PART + "s_mov_b32 exec_lo, 0xffff0000\nv_readfirstlane_b32 s4, v8\ns_mov_b64 exec, -1\n"
                            "s_nop 1\nv_mov_b32_e32 v2, s4\n", NOBODY),
    "v_readfirstlane_b32 of a lane that somebody wrote": (
        PART + "v_readfirstlane_b32 s4, v8\ns_nop 1\nv_mov_b32_e32 v2, s4\n", None),
    "v_writelane_b32 to one lane": ("s_mov_b32 s4, 3\nv_writelane_b32 v2, s4, 5\n", r"lane 0: " + NOBODY),
    "v_writelane_b32 to the lane that was left": (
        "s_mov_b64 exec, -2\nv_mov_b32_e32 v2, 1\ns_mov_b64 exec, 1\nv_mov_b32_e32 v3, 1\ns_mov_b64 exec, -1\n"
        "s_mov_b32 s4, 3\nv_writelane_b32 v2, s4, 0\n", None),
    "v_writelane_b32 of what was not written": ("v_mov_b32_e32 v2, 1\nv_writelane_b32 v2, s9, 5\n",
                                               r"lane 5: " + NOBODY),
    "v_cndmask_b32 takes what was never written": (
        "v_cmp_gt_u32_e32 vcc, 16, v0\ns_nop 4\nv_cndmask_b32_e32 v2, v9, v0, vcc\n", r"lane 16: " + NOBODY),
    "v_cndmask_b32 takes what somebody wrote": (
        PART + "v_cmp_gt_u32_e32 vcc, 16, v0\ns_nop 4\nv_cndmask_b32_e32 v2, v0, v8, vcc\n", None),
    "v_cndmask_b32 by a mask that is not known": ("v_cndmask_b32_e64 v2, v0, v1, s[8:9]\n", None),
    "v_cndmask_b32 of what was never written by a mask that is not known": (
        "v_cndmask_b32_e64 v2, v0, v9, s[8:9]\n", NOBODY),
    "v_swap_b32": ("v_mov_b32_e32 v2, 0\nv_swap_b32 v2, v9\n", NOBODY),
    "v_swap_b32 with what was never written": ("v_mov_b32_e32 v8, 0\nv_swap_b32 v2, v8\n", None),
    "private memory": ("scratch_load_dword v2, off, off\ns_waitcnt vmcnt(0)\n", NOBODY),
    "private memory in part": (FIRST + "scratch_store_dword off, v0, off\ns_waitcnt vmcnt(0)\ns_mov_b64 exec, -1\n"
                               "scratch_load_dword v2, off, off\ns_waitcnt vmcnt(0)\n", r"lane 16: " + NOBODY),
    "private memory that somebody wrote": ("scratch_store_dwordx2 off, v[0:1], off\ns_waitcnt vmcnt(0)\n"
                                           "scratch_load_dword v2, off, off offset:4\ns_waitcnt vmcnt(0)\n", None),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_unwritten_lanes_are_followed(name):
    judge(UNWRITTEN, name)


def but(lane, register, value="1.0"):
    """Writes a register in all lanes but one."""
    low, high = (hex(0xFFFFFFFF & ~(1 << lane) >> shift) for shift in (0, 32))
    return (f"s_mov_b32 exec_lo, {low}\ns_mov_b32 exec_hi, {high}\nv_mov_b32_e32 {register}, {value}\n"
            "s_mov_b64 exec, -1\n")


#: 16 x 16, of which v2 is stored: row 4 * (lane // 16), column lane % 16; a lane holds row lane % 16 of A
FACTORS = "v_mov_b32_e32 v20, 1.0\nv_mov_b32_e32 v21, 1.0\nv_mov_b32_e32 v22, 1.0\nv_mov_b32_e32 v23, 1.0\n"
MATRIX = "s_nop 1\nv_mfma_f32_16x16x4_f32 v[2:5], {}, {}, {}\ns_nop 15\ns_nop 15\n"
MATRICES = {
    "all": (FACTORS + MATRIX.format("v20", "v20", 0), None),
    "A": (FACTORS + MATRIX.format("v9", "v20", 0), r"lane 0: " + NOBODY),
    "row 0 of A": (FACTORS + but(32, "v9") + MATRIX.format("v9", "v20", 0), r"lane 0: " + NOBODY),
    "row 4 of A": (FACTORS + but(4, "v9") + MATRIX.format("v9", "v20", 0), r"lane 16: " + NOBODY),
    "row 3 of A, which is not stored": (FACTORS + but(35, "v9") + MATRIX.format("v9", "v20", 0), None),
    "a column of B": (FACTORS + but(3, "v9") + MATRIX.format("v20", "v9", 0), r"lane 3: " + NOBODY),
    "a lane of B that is not taken": (
        FACTORS + but(40, "v9") + MATRIX.replace("{}\ns_nop", "{} blgp:1\ns_nop", 1).format("v20", "v9", 0), None),
    "C": (FACTORS + MATRIX.format("v20", "v20", "v[6:9]"), r"lane 0: " + NOBODY),
    "a lane of C": (FACTORS + "v_mov_b32_e32 v24, 1.0\n" + but(5, "v30")
                    + "".join(f"v_mov_b32_e32 v{i}, 1.0\n" for i in (31, 32, 33))
                    + MATRIX.format("v20", "v20", "v[30:33]"), r"lane 5: " + NOBODY),
    "whatever EXEC says": (
        FACTORS + "s_mov_b64 exec, 1\ns_nop 4\n" + MATRIX.format("v20", "v20", 0) + "s_mov_b64 exec, -1\n", None),
    "fp64": ("v_mov_b32_e32 v20, 0\nv_mov_b32_e32 v21, 1.0\n"
             + but(0, "v31") + "v_mov_b32_e32 v30, 0\n"
             "s_nop 1\nv_mfma_f64_16x16x4_f64 v[2:9], v[20:21], v[30:31], 0\ns_nop 15\ns_nop 15\n",
             r"lane 0: " + NOBODY),
    "sparse": ("v_mov_b32_e32 v2, 0\nv_mov_b32_e32 v3, 0\nv_mov_b32_e32 v4, 0\nv_mov_b32_e32 v5, 0\n"
                            + FACTORS + "v_mov_b32_e32 v24, 0x44444444\nv_mov_b32_e32 v30, 0\n" + but(0, "v31")
                            + "s_nop 1\nv_smfmac_f32_16x16x32_f16 v[2:5], v[30:31], v[20:23], v24\n"
                            "s_nop 15\ns_nop 15\n",
                            r"lane 0: " + NOBODY),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_of_what_nobody_wrote(name):
    judge(MATRICES, name)


# ---- what a wave starts with

EXEC = """
s_load_dwordx2 s[2:3], s[0:1], 0x8
v_mov_b32_e32 v2, exec_lo
v_mov_b32_e32 v3, exec_hi
v_bfe_u32 v5, v0, 10, 10
v_and_b32_e32 v4, 0x3ff, v0
v_mul_u32_u24_e32 v6, {width}, v5
v_add_lshl_u32 v6, v6, v4, 4
s_waitcnt lgkmcnt(0)
global_store_dwordx4 v6, v[2:5], s[2:3]
"""


@pytest.mark.parametrize("block", [(1, 1), (63, 1), (64, 1), (100, 1), (50, 3), (128, 1), (7, 37)])
def test_lanes_beyond_the_block_are_off(block):
    """x and y of every lane, and EXEC of its wave; nothing behind them is written."""
    width, height = block
    lanes = width * height
    result = np.full((lanes + 64, 4), 9, U32)
    body = EXEC.format(width=width)
    ran = run(assemble("gfx942", (("tail", body),)), "tail", np.zeros(4, U32), result, block=block)
    number = np.arange(lanes)
    in_wave = np.minimum(64, lanes - number // 64 * 64)
    masks = np.array([(1 << int(count)) - 1 for count in in_wave], np.uint64)
    want = np.stack([masks & np.uint64(0xFFFFFFFF), masks >> np.uint64(32), number % width, number // width], 1)
    assert (result[:lanes] == want).all()
    assert (result[lanes:] == 9).all()
    assert ran.waves == -(-lanes // 64)


#: as LLVM's AMDGPU guide lays them out, behind two pointers: kind -> (offset, bytes, what a launch of 3 x 5 blocks of
#: 32 x 4 lanes has)
HIDDEN = {
    "hidden_block_count_x": (0, 4, 3), "hidden_block_count_y": (4, 4, 5), "hidden_block_count_z": (8, 4, 1),
    "hidden_group_size_x": (12, 2, 32), "hidden_group_size_y": (14, 2, 4), "hidden_group_size_z": (16, 2, 1),
    "hidden_remainder_x": (18, 2, 0), "hidden_remainder_y": (20, 2, 0), "hidden_remainder_z": (22, 2, 0),
    "hidden_global_offset_x": (40, 8, 0), "hidden_global_offset_y": (48, 8, 0), "hidden_global_offset_z": (56, 8, 0),
    "hidden_grid_dims": (64, 2, 3), "hidden_heap_v1": (96, 8, 0), "hidden_dynamic_lds_size": (120, 4, 0),
}


def test_hidden_arguments():
    """The runtime's own, stored by the first workgroup's first wave: 128 bytes."""
    hidden = tuple((kind, 16 + offset, size) for kind, (offset, size, _) in HIDDEN.items())
    body = """
s_load_dwordx2 s[2:3], s[0:1], 0x8
v_lshlrev_b32_e32 v1, 2, v0
v_and_b32_e32 v1, 0x7c, v1
global_load_dword v2, v1, s[0:1] offset:16
s_waitcnt vmcnt(0) lgkmcnt(0)
global_store_dword v1, v2, s[2:3]
"""
    result = np.full(32, 0xA5A5A5A5, U32)
    run(assemble("gfx942", (("hidden", body),), hidden=hidden), "hidden", np.zeros(4, U32), result, grid=(3, 5),
        block=(32, 4))
    octets = result.view(np.uint8)
    assert {kind: int.from_bytes(octets[offset:offset + size].tobytes(), "little")
            for kind, (offset, size, _) in HIDDEN.items()} == {kind: value for kind, (_, _, value) in HIDDEN.items()}


def test_an_unknown_hidden_argument_is_refused():
    code = assemble("gfx942", (("hidden", "s_nop 0\n"),), hidden=(("hidden_private_base", 16, 4),))
    with pytest.raises(NotImplementedError, match="hidden: the hidden argument hidden_private_base"):
        run(code, "hidden", np.zeros(4, U32), np.zeros(4, U32))


# ---- bounds

#: a load whose last lane begins at byte 252 -> bytes that it takes
LOADS = {"global_load_ubyte v2, v1, s[0:1]": 1, "global_load_short_d16 v2, v1, s[0:1]": 2,
         "global_load_dword v2, v1, s[0:1]": 4, "global_load_dwordx2 v[2:3], v1, s[0:1]": 8,
         "global_load_dwordx4 v[2:5], v1, s[0:1]": 16, "s_load_dwordx2 s[4:5], s[0:1], 0xfc": 8,
         ADDRESS + "flat_load_dwordx3 v[2:4], v[4:5] offset:252": 12}


@pytest.mark.parametrize("text", LOADS)
def test_loads_end_with_the_tensor(text):
    """To the byte, unless a granule is named."""
    kernels = tuple((f"kernel{i}", BEGIN + "v_mov_b32_e32 v2, 0\n" + each + "\n") for i, each in enumerate(LOADS))
    code, kernel = assemble("gfx942", kernels), f"kernel{list(LOADS).index(text)}"
    memory, result, end = np.zeros(512, np.uint8), np.zeros(64, U32), 252 + LOADS[text]
    memory = memory[-memory.ctypes.data % 16:]
    run(code, kernel, memory[:end], result)
    with pytest.raises(EmulationError, match=rf"reads {LOADS[text]} bytes at 0x\w+, 252 bytes into given, which has"):
        run(code, kernel, memory[:end - 1], result)
    run(code, kernel, memory[:end - 1], result, granule=16)
    with pytest.raises(EmulationError, match=rf"reads {LOADS[text]} bytes .* bytes into given, which has 240"):
        run(code, kernel, memory[:240], result, granule=16)


def test_stores_end_with_the_tensor():
    code = assemble("gfx942", (("stores", BEGIN + "global_store_dword v1, v0, s[2:3]\n"),))
    result = np.zeros(256, np.uint8)
    for granule in (1, 16):
        with pytest.raises(EmulationError, match="lane 63 writes 4 bytes at .*, 252 bytes into result, which has 255"):
            run(code, "stores", np.zeros(4, U32), result[:255], granule=granule)


@pytest.mark.parametrize(("dtype", "vocab", "says"), [
    (torch.float32, 1, None), (torch.float32, 5, None), (torch.bfloat16, 6, None),
    (torch.bfloat16, 5, r"sample_bf16_peaks.* reads 4 bytes at 0x\w+, 8 bytes into logits, which has 10")])
def test_only_sample_reads_to_the_end_of_a_word(dtype, vocab, says, monkeypatch):
    """Of an odd number of logits in 16 bits; nothing else may, and the exception goes when it needs none."""
    assert run_module.GRANULES == {"sample": 4}
    monkeypatch.setattr(run_module, "GRANULES", {})
    row = dict(logits=torch.zeros(1, vocab, dtype=dtype), temperature=torch.ones(1), top_p=torch.ones(1),
               top_k=torch.zeros(1, dtype=torch.int32), min_p=torch.zeros(1), uniform=torch.zeros(1))
    with (pytest.raises(EmulationError, match=says) if says else contextlib.nullcontext(),
          platform.target("gfx942"), emulate("gfx942")):
        OPS["sample"].backends["hip"].run(**row)
