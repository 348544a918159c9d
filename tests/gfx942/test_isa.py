"""The readers of machine code, against bytes and text written by hand, and the budgets' own ability to fail."""

import dataclasses

import pytest
from budgets import over_limits, worse

from wave64.testing.isa import Resources, classify, lane_bytes, read_asm, read_elf, unpack, waves_per_simd

KERNEL = Resources("k", "gfx942", vgpr=95, agpr=0, vgpr_allocated=96, sgpr=60, spills=0, sgpr_spills=0,
                   scratch_bytes=0, lds_bytes=0, max_block=256)

ASM = """
k:                                      ; @k
; %bb.0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
	v_add_u32_e32 v1, s0, v1
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_add_f32_dpp v1, v1, v1 row_shr:8 row_mask:0xf bank_mask:0xf
	s_cbranch_scc1 .LBB0_2
; %bb.3:                                ;   in Loop: Header=BB0_1 Depth=1
	global_store_short v[0:1], v2, off
	s_cbranch_scc1 .LBB0_1
; %bb.4:
	v_exp_f32_e32 v0, v0
	s_endpgm
.Lfunc_end0:
	v_mov_b32_e32 v0, v0
"""


def test_asm_counts_what_is_inside_loops():
    code = read_asm(ASM, "k")
    assert (code.instructions, code.loops) == (10, 2)
    assert code.loop == {"branch": 2, "valu": 1, "matrix": 1, "xlane": 1, "global": 1}
    assert code.matrix == {"v_mfma_f32_16x16x16_bf16": 1}
    assert (code.loads, code.stores) == ({16: 1}, {2: 1})


def test_asm_of_another_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel other"):
        read_asm(ASM, "other")


@pytest.mark.parametrize(("text", "name"), [
    ("v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]", "matrix"), ("v_accvgpr_read_b32 v0, a0", "acc"),
    ("ds_read_b128 v[0:3], v4", "lds"), ("ds_bpermute_b32 v0, v1, v2", "xlane"), ("v_readlane_b32 s0, v0, 63", "xlane"),
    ("scratch_load_dword v0, off, off", "scratch"), ("flat_load_dword v0, v[0:1]", "global"), ("s_barrier", "barrier"),
    ("s_waitcnt vmcnt(0)", "wait"), ("s_add_i32 s0, s1, s2", "salu"), ("v_rsq_f32_e32 v0, v0", "trans"),
    ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", "valu"), ("s_load_dwordx2 s[0:1], s[2:3], 0x0", "smem")])
def test_classify(text, name):
    assert classify(text) == name


@pytest.mark.parametrize(("opcode", "size"), [
    ("buffer_load_dwordx4", 16), ("global_load_b128", 16), ("global_load_dwordx3", 12), ("global_store_dwordx2", 8),
    ("buffer_load_dword", 4), ("global_load_ushort", 2), ("global_load_short_d16_hi", 2), ("buffer_load_ubyte", 1),
    ("global_load_ubyte_d16", 1), ("global_load_u16", 2), ("buffer_load_dwordx4_lds", 16), ("buffer_wbl2", 0)])
def test_lane_bytes(opcode, size):
    assert lane_bytes(opcode) == size


@pytest.mark.parametrize(("vgprs", "lds", "block_waves", "waves"), [
    (96, 0, 4, 5), (64, 0, 4, 8), (264, 0, 4, 1), (96, 8 * 1024, 4, 5), (64, 33 * 1024, 4, 1), (64, 33 * 1024, 8, 2),
    (32, 64 * 1024, 2, 0.5), (256, 0, 16, 0), (32, 64 * 1024 + 1, 4, 0)])
def test_waves_per_simd_on_gfx942(vgprs, lds, block_waves, waves):
    kernel = dataclasses.replace(KERNEL, vgpr_allocated=vgprs)
    assert waves_per_simd(kernel, lds, block_waves) == waves


def test_many_scalar_registers_cost_a_wave():
    assert waves_per_simd(dataclasses.replace(KERNEL, vgpr_allocated=32, sgpr=106), 0, 4) == 7


def test_gfx950_has_more_lds():
    assert waves_per_simd(dataclasses.replace(KERNEL, arch="gfx950", vgpr_allocated=64), 33 * 1024, 4) == 4


def test_unpack_reads_messagepack():
    packed = bytes([0x83, 0xA1]) + b"a" + bytes([0xCD, 1, 0, 0xA1]) + b"b" + bytes([0x93, 0xC0, 0xC3, 0xFF, 0xD9, 1]) \
        + b"c" + bytes([0xDC, 0, 1, 0xCB, 0x3F, 0xF0, 0, 0, 0, 0, 0, 0])
    assert unpack(packed) == {"a": 256, "b": [None, True, -1], "c": [1.0]}


def test_what_is_no_code_object_is_refused():
    with pytest.raises(ValueError, match="ELF"):
        read_elf(b"not a code object")


GOOD = {"vgpr": 96, "agpr": 0, "sgpr": 60, "spills": 0, "sgpr_spills": 0, "scratch_bytes": 0, "lds_bytes": 8192,
        "block_waves": 4, "waves_per_simd": 5.0, "instructions": 300, "loops": 1, "loop": {"valu": 90, "matrix": 10},
        "matrix": {"v_mfma_f32_16x16x16_bf16": 10}, "loads": {"4": 1, "16": 4}, "stores": {"16": 1}}


@pytest.mark.parametrize(("change", "text"), [
    ({"waves_per_simd": 4.0}, "waves per SIMD"), ({"vgpr": 105}, "VGPRs"), ({"loop": {"valu": 106}}, "loop"),
    ({"matrix": {}}, "matrix"), ({"loads": {"4": 5, "16": 3}}, "loads by width")])
def test_a_worse_kernel_is_noticed(change, text):
    assert [text in found for found in worse({**GOOD, **change}, GOOD)] == [True]


@pytest.mark.parametrize("change", [
    {"vgpr": 104}, {"waves_per_simd": 8.0}, {"loop": {"valu": 95, "matrix": 10}}, {"loads": {"16": 3}}])
def test_a_harmless_change_is_not(change):
    assert worse({**GOOD, **change}, GOOD) == []


@pytest.mark.parametrize(("change", "text"), [
    ({"spills": 1}, "vector"), ({"sgpr_spills": 1}, "scalar"), ({"scratch_bytes": 8}, "scratch"),
    ({"lds_bytes": 65 * 1024}, "LDS")])
def test_limits_hold_without_a_golden_row(change, text):
    assert [text in found for found in over_limits({**GOOD, **change}, "gfx942")] == [True]


def test_a_small_variant_may_keep_a_scalar_in_a_vector_register():
    assert over_limits({**GOOD, "sgpr_spills": 1, "large": False}, "gfx942") == []


@pytest.mark.parametrize(("kind", "spills", "found"), [("hip", 5, 0), ("hip", 6, 1), ("triton", 1, 1)])
def test_only_the_kernels_that_are_named_may_spill_scalars(kind, spills, found):
    assert len(over_limits({**GOOD, "sgpr_spills": spills}, "gfx942", kind, "sample")) == found
