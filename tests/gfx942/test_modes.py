"""What hand-written assembly does that the operators' compilers do not: MODE without fp32 denormals and without IEEE,
instructions skipped (VSKIP), vector registers relative to M0, scalar stores and atomics, and code objects whose notes
leave out what LLVM writes."""

import functools
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from assembled import assemble, folder, run
from models import Model
from test_forms import check, differences, differences_of_the_core
from world import Trial

from wave64.testing import isa
from wave64.testing.emulator import code_object, core
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.together import execute_together
from wave64.testing.emulator.views import DeviceBuffer

CORES = ["numpy"] + ["c"] * (core.unfit() is None)
LOAD = """
v_lshrrev_b32_e32 v3, 6, v0
v_lshlrev_b32_e32 v1, 2, v0
s_load_dwordx4 s[0:3], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
global_load_dword v2, v1, s[0:1]
v_readfirstlane_b32 s5, v3
s_waitcnt vmcnt(0)
"""
STORE = "global_store_dword v1, v2, s[2:3]\n"

# ---- forms

FORMS = {
    "gfx942": (
        "s_store_dword s20, s[8:9], 0x10", "s_store_dwordx2 s[20:21], s[8:9], s6",
        "s_store_dwordx4 s[20:23], s[8:9], 0x0", "s_atomic_inc s20, s[8:9], 0x8", "s_atomic_dec s20, s[8:9], 0x8 glc",
        "s_atomic_add s20, s[8:9], s6 glc", "s_atomic_umax_x2 s[20:21], s[8:9], 0x8 glc",
        "s_atomic_cmpswap s[20:21], s[8:9], 0x8 glc", "v_cvt_off_f32_i4_e32 v4, v8",
        "v_cvt_off_f32_i4_sdwa v4, v8 src0_sel:BYTE_2", "v_cvt_pk_u8_f32 v4, v8, v9, v10",
        "v_cvt_pk_u8_f32 v4, -v8, 2, v10", "s_mov_b64 s[20:21], 0x87654321", "s_and_b64 s[20:21], s[8:9], 0xfedcba98"),
    "gfx950": (
        "v_cvt_scalef32_pk_fp4_f32 v4, v8, v9, v10",
        "v_cvt_scalef32_pk_fp4_f32 v4, -v8, |v9|, v10 op_sel:[0,0,0,1]",
        "v_cvt_scalef32_pk_fp4_f32 v4, v8, v9, 2.0 op_sel:[0,0,1,1]"),
}
#: of each way in which fp32 goes into an instruction, or comes out of one
ARITHMETIC = (
    "v_add_f32_e32 v4, v8, v9", "v_fma_f32 v4, -v8, |v9|, v10", "v_fmac_f32_e32 v4, v8, v9", "v_max_f32_e32 v4, v8, v9",
    "v_med3_f32 v4, v8, v9, v10", "v_min3_f32 v4, v8, v9, v10", "v_mul_f32_e64 v4, v8, s9",
    "v_pk_fma_f32 v[4:5], v[8:9], v[10:11], v[12:13] op_sel:[0,1,0] neg_lo:[1,0,0]",
    "v_pk_mul_f32 v[4:5], v[8:9], s[10:11]", "v_fma_mix_f32 v4, v8, v9, v10 op_sel_hi:[1,0,0]",
    "v_cmp_lt_f32_e32 vcc, v8, v9", "v_cmp_eq_f32_e32 vcc, 0, v8", "v_cmp_class_f32_e32 vcc, v8, v9",
    "v_cvt_f64_f32_e32 v[4:5], v8", "v_cvt_f16_f32_e32 v4, v8", "v_cndmask_b32_e64 v4, -v8, v9, vcc",
    "v_mov_b32_e32 v4, v8", "v_sub_f32_dpp v4, v8, v9 row_shr:1 row_mask:0xf bank_mask:0xf", "v_ldexp_f32 v4, v8, v9",
    "v_trunc_f32_e32 v4, v8", "v_max_f16_e32 v4, v8, v9", "v_pk_max_f16 v4, v8, v9", "v_exp_f32_e32 v4, v8",
    "v_add_f32_sdwa v4, v8, v9 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD src1_sel:WORD_0")


@functools.cache
def codes(arch: str, texts: tuple[str, ...]) -> dict[str, str]:
    """Instruction -> its bytes, as hexadecimal."""
    kernels = tuple((f"one{i}", text) for i, text in enumerate(texts))
    loaded = code_object.load(assemble(arch, kernels).read_bytes())
    return {text: loaded.image[loaded.kernels[f"one{i}"].entry:][:16].tobytes().hex() for i, text in enumerate(texts)}


@pytest.mark.parametrize("arch", FORMS)
def test_forms_that_assembly_has(arch):
    found = {text: wrong for text, code in codes(arch, FORMS[arch]).items() if (wrong := check(text, code, arch))}
    assert found == {}


@pytest.mark.parametrize("ieee", [False, True])
def test_fp32_denormals_are_flushed_where_mode_says_so(ieee):
    """Held to the pseudo-code between flushed sources and results; without IEEE, signalling NaNs are as quiet ones."""
    found = {}
    for text, code in codes("gfx942", ARITHMETIC).items():
        for part in (False, True):
            trial = Trial(bytes.fromhex(code), "gfx942", zlib.crc32(text.encode()), part, 0xC0, ieee)
            wrong = differences(trial, Model(trial).world())
            if "c" in CORES and (trial.by_core() is not None or "f16" not in text):
                wrong += differences_of_the_core(trial, text)
            if wrong:
                found[text] = wrong
    assert found == {}


def test_what_is_not_known_of_flushed_denormals_is_refused():
    for text, code in codes("gfx942", ("v_frexp_mant_f32_e32 v4, v8", "v_div_fixup_f32 v4, v8, v9, v10")).items():
        name = text.split()[0].removesuffix("_e32")
        with pytest.raises(NotImplementedError, match=f"{name} while fp32 denormals are flushed"):
            Trial(bytes.fromhex(code), "gfx942", 0, False, 0xC0, False)


def test_an_aperture_is_where_the_driver_lays_it():
    body = LOAD + """
s_mov_b64 s[6:7], src_shared_base
s_mov_b64 s[8:9], src_private_limit
v_mov_b32_e32 v2, s7
v_add_u32_e32 v2, s6, v2
v_add_u32_e32 v2, s9, v2
""" + STORE
    given, result = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    run(assemble("gfx942", (("apertures", body),)), "apertures", given, result)
    assert (result == (1 << 16) + (2 << 16)).all()


@pytest.mark.parametrize("text", ["s_store_dword s9, s[2:3], 0x0", "s_atomic_inc s9, s[2:3], 0x0"])
def test_scalar_stores_are_refused_where_views_of_memory_differ(text):
    code = assemble("gfx942", (("one", LOAD + f"s_mov_b32 s9, 1\n{text}\n"),))
    given, result = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    run(code, "one", given, result)
    assert result[0] == 1
    args = given.ctypes.data.to_bytes(8, "little") + result.ctypes.data.to_bytes(8, "little")
    launch = SimpleNamespace(kernel="one", code_object=code, grid=(1, 1, 1), block=(64, 1, 1), lds_bytes=0, args=args)
    buffers = [DeviceBuffer(name, x.ctypes.data, x.nbytes) for name, x in (("given", given), ("result", result))]
    with pytest.raises(NotImplementedError, match=f"{text.split()[0]} while views of memory differ"):
        execute_together([launch], buffers, 0)


# ---- skipped instructions

SKIPS = LOAD + """
v_mov_b32_e32 v4, 7
v_lshlrev_b32_e32 v6, 2, v0
ds_write_b32 v6, v4
s_waitcnt lgkmcnt(0)
s_setvskip s5, 0
v_add_u32_e32 v2, 100, v2
ds_write_b32 v6, v2
global_load_dword v4, v1, s[0:1]
s_setvskip 0, 0
s_waitcnt vmcnt(0) lgkmcnt(0)
ds_read_b32 v5, v6
s_waitcnt lgkmcnt(0)
v_add_u32_e32 v2, v2, v5
v_add_u32_e32 v2, v2, v4
""" + STORE


@pytest.mark.parametrize("which", CORES)
def test_vector_instructions_are_skipped_wave_by_wave(which):
    """Waves with an odd number skip three; two pairs, so that skipping waves lie between others."""
    given, result = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    ran = run(assemble("gfx942", (("skips", SKIPS),), lds=1024), "skips", given, result, block=256, core=which)
    odd = (given >> 6) % 2 == 1
    assert (result == np.where(odd, given + 7 + 7, (given + 100) * 2 + given)).all()
    assert (ran.by_name["ds_write_b32"], ran.by_name["v_add_u32"]) == (4 + 2, 4 + 2 + 4)


def test_skipped_loads_count_for_no_wait():
    """vmcnt(1) leaves one in flight: without the skipped one, that is the load itself."""
    body = LOAD + """
global_load_dword v2, v1, s[0:1]
s_setvskip s5, 0
global_load_dword v4, v1, s[0:1]
s_setvskip 0, 0
s_waitcnt vmcnt(1)
v_add_u32_e32 v2, 1, v2
""" + STORE
    given, result = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    code = assemble("gfx942", (("counts", body),))
    run(code, "counts", given[:64], result[:64])
    with pytest.raises(EmulationError, match="v2 is used, but no s_waitcnt has waited"):
        run(code, "counts", given, result, block=128)


# ---- registers relative to M0

RELATIVE = LOAD + "".join(f"v_add_u32_e32 v{10 + i}, {i * 10}, v2\n" for i in range(4)) + """
s_and_b32 s6, s5, 3
v_mov_b32_e32 v20, 1
v_mov_b32_e32 v21, 2
v_mov_b32_e32 v22, 3
v_mov_b32_e32 v23, 4
s_mov_b32 s7, m0
s_set_gpr_idx_on s6, gpr_idx(SRC0)
v_mov_b32_e32 v4, v10
v_add_u32_e32 v5, s6, v11
s_set_gpr_idx_off
s_set_gpr_idx_on s6, gpr_idx(DST,SRC1)
v_add_u32_e64 v20, v4, v20
v_writelane_b32 v20, 33, 5
s_set_gpr_idx_idx 0
v_xor_b32_e32 v6, v20, v21
s_set_gpr_idx_off
s_mov_b32 m0, s7
v_add_u32_e32 v2, v4, v5
v_add_u32_e32 v2, v2, v6
v_lshl_add_u32 v2, v20, 8, v2
v_lshl_add_u32 v2, v22, 16, v2
""" + STORE


def relative(given: np.ndarray) -> np.ndarray:
    found = []
    for lane, x in enumerate(given.tolist()):
        index, v = lane >> 6 & 3, {10 + i: x + 10 * i for i in range(4)} | {20 + i: i + 1 for i in range(4)}
        v4, v5 = v[10 + index], index + v[11]
        v[20 + index] = 33 if lane % 64 == 5 else v4 + v[20 + index]
        found.append(v4 + v5 + (v[20] ^ v[21]) + (v[20] << 8) + (v[22] << 16))
    return np.array(found, np.uint32)


@pytest.mark.parametrize("which", CORES)
def test_registers_are_relative_to_each_waves_m0(which):
    given, result = np.arange(5, 261, dtype=np.uint32), np.zeros(256, np.uint32)
    run(assemble("gfx942", (("relative", RELATIVE),)), "relative", given, result, block=256, core=which)
    assert (result == relative(given)).all()


@pytest.mark.parametrize(("text", "index", "said"), [
    ("v_mov_b32_e32 v4, v10", 250, "v10 and an index of 250 in M0 name no vector register"),
    ("v_mov_b32_e32 v4, v10", 200, "v210 of 128 allocated registers"),
    ("v_mov_b32_sdwa v4, v10 dst_sel:WORD_1", 1, "with relative registers"),
    ("v_mov_b32_e32 v4, v10", 60, "v2 comes from a register that was never written")])
def test_an_index_that_leads_astray_is_reported(text, index, said):
    body = LOAD + f"""
s_movk_i32 s6, {index}
s_set_gpr_idx_on s6, gpr_idx(SRC0)
{text}
s_set_gpr_idx_off
v_mov_b32_e32 v2, v4
""" + STORE
    given, result = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    with pytest.raises((EmulationError, NotImplementedError), match=said):
        run(assemble("gfx942", (("astray", body),)), "astray", given, result)


def test_hazards_are_those_of_the_registers_that_an_index_gives():
    """Of a loop's rounds only the second one writes what DPP reads too early."""
    body = LOAD + """
s_mov_b32 s6, 1
v_mov_b32_e32 v10, 0
v_mov_b32_e32 v12, 0
again:
s_set_gpr_idx_on s6, gpr_idx(DST)
v_mov_b32_e32 v10, v2
s_set_gpr_idx_off
v_mov_b32_dpp v4, v12 row_shr:1 row_mask:0xf bank_mask:0xf
s_add_u32 s6, s6, 1
s_cmp_lg_u32 s6, {last}
s_cbranch_scc1 again
""" + STORE
    given, result = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    kernels = tuple((f"rounds{last}", body.replace("again", f"again{last}").format(last=last)) for last in (2, 3))
    code = assemble("gfx942", kernels)
    run(code, "rounds2", given, result)
    with pytest.raises(EmulationError, match=r"v12 too early: .* moves its lanes \(DPP\) 1 wait states after"):
        run(code, "rounds3", given, result)


# ---- code objects

def as_assembled_by_hand(code: bytes, kernel: str) -> bytes:
    """Without a target in the notes and without spills, arguments of 0 bytes declared, MODE 0xC0, IEEE off."""
    image = bytearray(code.replace(b"amdhsa.target", b"amdhsa.tarmac"))
    address, loaded = isa.symbols(code)[f"{kernel}.kd"], code_object.load(code)
    at = code.index(loaded.image[address:address + 64].tobytes())
    struct.pack_into("<I", image, at + 8, 0)
    rsrc1, = struct.unpack_from("<I", image, at + 48)
    struct.pack_into("<I", image, at + 48, rsrc1 & ~(0xFF << 12 | 1 << 23) | 0xC0 << 12)
    return bytes(image)


@pytest.mark.parametrize("which", CORES)
@pytest.mark.parametrize("arch", FORMS)
def test_code_objects_that_say_less_are_loaded(arch, which):
    body = LOAD + "v_add_f32_e32 v2, 0, v2\n" + STORE
    made = assemble(arch, (("flushed", body),))
    code = Path(folder().name, f"{arch}-by-hand.co")
    code.write_bytes(as_assembled_by_hand(made.read_bytes(), "flushed"))
    loaded = code_object.load(code.read_bytes())
    kernel = loaded.kernels["flushed"]
    assert (loaded.arch, kernel.kernarg_bytes, kernel.mode, kernel.ieee) == (arch, 0, 0xC0, False)
    assert isa.read_elf(code.read_bytes())[0].arch == arch
    given, result = np.full(64, 0x80000001, np.uint32), np.zeros(64, np.uint32)
    run(code, "flushed", given, result, core=which)
    assert (result == 0).all()  # -0 + 0
    run(made, "flushed", given, result, core=which)
    assert (result == given).all()


def test_another_rounding_is_refused():
    made = assemble("gfx942", (("flushed", LOAD + STORE),))
    code = bytearray(as_assembled_by_hand(made.read_bytes(), "flushed"))
    at = code.index(bytes(code_object.load(bytes(code)).image[isa.symbols(bytes(code))["flushed.kd"]:][:64]))
    code[at + 49] |= 0x30  # round toward zero
    path = Path(folder().name, "toward-zero.co")
    path.write_bytes(code)
    with pytest.raises(NotImplementedError, match="starts with MODE 0xc3, expected 0xf0 or 0xc0"):
        run(path, "flushed", np.zeros(64, np.uint32), np.zeros(64, np.uint32))
