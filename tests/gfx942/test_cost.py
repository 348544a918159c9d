"""The cost model: its rules on known accesses, and the bounds of flagship cases, which may not get worse unseen."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from assembled import assemble, run
from budgets import RENEW
from recorded import mark

from wave64 import OPS, platform
from wave64.arch import lookup
from wave64.op import Case
from wave64.ops.fp8_block_scaled_mm import make_case as make_product
from wave64.ops.fused_moe import make_case as make_experts
from wave64.ops.mla_decode import make_case as make_latents
from wave64.ops.mla_decode_rope import make_case as make_rotated
from wave64.ops.paged_attention import make_case as make_decode
from wave64.ops.prefill_attention import make_prefill
from wave64.testing import contract
from wave64.testing.cost import CLOCK_GHZ, SIMDS, bounds_us, times_us, usages
from wave64.testing.emulator import core
from wave64.testing.emulator.cost import BANKS, IN_TURN, WIDE_LOADS, Usage, counting, lds_cycles, unit_of
from wave64.testing.emulator.run import emulate

ARCHS = ("gfx942", "gfx950")
GOLDEN = Path(__file__).with_name("bounds.json")
LANES = np.arange(64)
HEADS = dict(heads=32, kv_heads=8, head_dim=128)
#: besides cases that operators name: as large as the emulator executes in a second or two
DRAWN = {
    "paged_attention": [Case("2x1024", partial(make_decode, [1024] * 2, **HEADS))],
    "mla_decode": [Case("16h-2x512", partial(make_latents, [512] * 2, page_size=64))],
    "mla_decode_rope": [Case("16h-2x512", partial(make_rotated, [512] * 2, page_size=64))],
    "prefill_attention": [Case("64-of-256", partial(make_prefill, [64], [256], **HEADS))],
    "fused_moe": [Case("32x8x128-bf16", partial(make_experts, 32, 8, 2, 512, 128)),
                  Case("32x8x128-fp8", partial(make_experts, 32, 8, 2, 512, 128, scales="block",
                                               block_shape=[128, 128]))],
    "fp8_block_scaled_mm": [Case("64x512x1024", partial(make_product, 64, 512, 1024))],
}
FLAGSHIPS = [("hip", "rms_norm", "128x7168"), ("hip", "fused_add_rms_norm", "128x7168"),
             ("hip", "silu_and_mul", "128x7168"), ("hip", "per_token_group_quant_fp8", "128x7168"),
             ("hip", "grouped_topk", "64x256-v3"), ("hip", "paged_attention", "1x4096"),
             ("hip", "paged_attention", "2x1024"), ("hip", "fp8_block_scaled_mm", "64x512x1024"),
             ("triton", "per_token_group_quant_fp8", "128x7168"),
             *(("triton", op, case.id) for op, cases in DRAWN.items() for case in cases)]
KEYS = [f"{op} {case} {backend} {arch}" for backend, op, case in FLAGSHIPS for arch in ARCHS]


def drawn(op: str, case: str) -> str | Case:
    """The case of DRAWN with this name, else the name, which is one of the operator's own."""
    return next((each for each in DRAWN.get(op, ()) if each.id == case), case)


@pytest.mark.parametrize(("offsets", "width", "banks", "cycles", "conflict_free"), [
    (LANES * 4, 4, 32, 2, 2),        # 64 neighboring words: 32 at a time
    (LANES * 0, 4, 32, 2, 2),        # one word for all
    (LANES * 128, 4, 32, 64, 2),     # a column of rows of 128 bytes: all in one bank
    (LANES * 132, 4, 32, 2, 2),      # the same, rows padded by a word
    (LANES * 8, 4, 32, 4, 2),        # every other word: two in a bank
    (LANES * 16, 16, 32, 8, 8),      # 16 bytes each: 8 lanes at a time
    (LANES * 16, 16, 64, 4, 4),      # gfx950's banks: 16 lanes
    (LANES[:5] * 4, 4, 32, 1, 1),    # a few lanes
    (LANES * 2, 2, 32, 2, 2),        # two lanes to a word
])
def test_lds_conflicts_come_from_addresses(offsets, width, banks, cycles, conflict_free):
    lanes = LANES[:len(offsets)]
    assert lds_cycles(lanes, offsets, width, banks) == (cycles, conflict_free)
    both = np.concatenate([lanes, 192 + lanes])  # two waves take their turns one after the other
    assert lds_cycles(both, np.tile(offsets, 2), width, banks) == (2 * cycles, 2 * conflict_free)


@pytest.mark.parametrize(("arch", "order", "offsets", "cycles"), [
    ("gfx942", "wide", LANES * 16, 8), ("gfx950", "wide", LANES * 16, 4),
    # 16 rows of 64 bytes as a matrix instruction reads them: of 8 lanes in turn 4 meet, of 0 to 3 and 20 to 23 two do
    ("gfx942", "wide", LANES % 16 * 64 + LANES // 16 * 16, 16),
    ("gfx942", "in turn", LANES % 16 * 64 + LANES // 16 * 16, 32),
    # as above, as Triton lays rows of 128 bytes out, every fourth 1056 bytes further: made for gfx950's order
    ("gfx950", "wide", LANES % 4 * 1056 + LANES % 16 // 4 * 128 + LANES // 16 * 16, 4),
    ("gfx950", "in turn", LANES % 4 * 1056 + LANES % 16 // 4 * 128 + LANES // 16 * 16, 8),
])
def test_wide_loads_have_an_order_of_lanes(arch, order, offsets, cycles):
    in_order = WIDE_LOADS[arch] if order == "wide" else IN_TURN
    assert lds_cycles(LANES, offsets, 16, BANKS[arch][0], in_order) == (cycles, 256 // BANKS[arch][0])


def cycles_of(name: str, arch: str, family: str = "VOP3P", cbsz: int = 0) -> tuple[str, int]:
    return unit_of(SimpleNamespace(instruction=SimpleNamespace(name=name, family=family),
                                   machine=SimpleNamespace(arch=arch), fields=SimpleNamespace(cbsz=cbsz, blgp=cbsz)))


@pytest.mark.parametrize(("name", "archs", "cycles"), [
    ("v_mfma_f32_32x32x8_f16", ARCHS, 32), ("v_mfma_f32_16x16x16_f16", ARCHS, 16),
    ("v_mfma_f32_16x16x16_bf16", ARCHS, 16), ("v_mfma_f32_16x16x32_fp8_fp8", ARCHS, 16),
    ("v_mfma_f32_32x32x16_fp8_bf8", ARCHS, 32), ("v_mfma_i32_32x32x16_i8", ARCHS, 32),
    ("v_mfma_f32_16x16x4_f32", ARCHS, 32), ("v_mfma_f32_32x32x2_f32", ARCHS, 64),
    ("v_mfma_f32_4x4x4_16b_f16", ARCHS, 8), ("v_mfma_f32_16x16x4_4b_f16", ARCHS, 32),
    ("v_mfma_f32_32x32x4_2b_bf16", ARCHS, 64), ("v_mfma_f64_16x16x4_f64", ("gfx942",), 32),
    ("v_mfma_f64_16x16x4_f64", ("gfx950",), 64), ("v_mfma_f32_16x16x32_bf16", ("gfx950",), 16),
    ("v_mfma_f32_32x32x16_f16", ("gfx950",), 32), ("v_mfma_f32_16x16x128_f8f6f4", ("gfx950",), 32),
    ("v_mfma_f32_32x32x64_f8f6f4", ("gfx950",), 64),
])
def test_matrix_instructions_take_what_amd_says(name, archs, cycles):
    assert [cycles_of(name, arch) for arch in archs] == [("matrix", cycles)] * len(archs)


@pytest.mark.parametrize(("name", "operations", "arch", "teraflops"), [
    ("v_mfma_f32_32x32x8_f16", 2 * 32 * 32 * 8, "gfx942", lookup("gfx942").bf16_tflops),
    ("v_mfma_f32_32x32x16_fp8_fp8", 2 * 32 * 32 * 16, "gfx942", lookup("gfx942").fp8_tflops),
    ("v_mfma_f32_32x32x2_f32", 2 * 32 * 32 * 2, "gfx942", 163.4),
    ("v_mfma_f64_16x16x4_f64", 2 * 16 * 16 * 4, "gfx942", 163.4),
    ("v_pk_fma_f32", 2 * 2 * 64, "gfx942", 163.4), ("v_fma_f64", 2 * 64, "gfx942", 81.7),
    ("v_mfma_f32_16x16x32_bf16", 2 * 16 * 16 * 32, "gfx950", lookup("gfx950").bf16_tflops),
    ("v_mfma_f32_16x16x128_f8f6f4", 2 * 16 * 16 * 128, "gfx950", lookup("gfx950").fp8_tflops),
    ("v_mfma_f64_16x16x4_f64", 2 * 16 * 16 * 4, "gfx950", 78.6),
    ("v_pk_fma_f32", 2 * 2 * 64, "gfx950", 157.3), ("v_fma_f64", 2 * 64, "gfx950", 78.6),
])
def test_rates_make_the_peaks_that_amd_publishes(name, operations, arch, teraflops):
    _, cycles = cycles_of(name, arch)
    peak = operations / cycles * SIMDS * lookup(arch).compute_units * CLOCK_GHZ[arch] / 1e3
    assert peak == pytest.approx(teraflops, rel=0.01)


def test_other_instructions_take_their_unit():
    assert cycles_of("v_add_u32", "gfx942", "VOP2") == ("vector", 4)
    assert cycles_of("v_exp_f32", "gfx942", "VOP1") == ("transcendental", 16)
    assert cycles_of("s_add_u32", "gfx942", "SOP2") == ("scalar", 4)
    assert cycles_of("s_waitcnt", "gfx942", "SOPP") == ("", 0)
    assert cycles_of("ds_read_b128", "gfx942", "DS") == ("", 0)


#: LDS accesses of a wave -> (cycles, cycles without conflicts), on 32 banks
CONFLICTS = {
    "v_lshlrev_b32_e32 v1, 2, v0\nds_write_b32 v1, v0": (2, 2),
    "v_lshlrev_b32_e32 v1, 7, v0\nds_write_b32 v1, v0": (64, 2),  # a column
    "v_lshlrev_b32_e32 v1, 3, v0\nds_write_b32 v1, v0\ns_waitcnt lgkmcnt(0)\nds_read_b32 v2, v1": (8, 4),
    "v_lshlrev_b32_e32 v1, 3, v0\nds_write2_b32 v1, v0, v0 offset1:1": (8, 4),
    "v_lshlrev_b32_e32 v1, 2, v0\nds_bpermute_b32 v2, v1, v0": (2, 2),
    "s_mov_b64 exec, 0xff\nv_lshlrev_b32_e32 v1, 7, v0\nds_write_b32 v1, v0": (8, 1),
}


@pytest.mark.parametrize("text", CONFLICTS)
def test_a_kernel_pays_for_its_conflicts(text):
    """Two workgroups of two waves, whose LDS is apart; and the longest time says LDS."""
    kernels = tuple((f"kernel{i}", each + "\n") for i, each in enumerate(CONFLICTS))
    checks, nothing = counting(), np.zeros(1, np.uint32)
    run(assemble("gfx942", kernels, lds=16384), f"kernel{list(CONFLICTS).index(text)}", nothing, nothing, grid=(2, 1),
        block=128, checks=(checks,))
    usage, = checks.usages.values()
    waves = 4
    assert (usage.waves, usage.blocks) == (waves, 2)
    assert (usage.cycles["lds"], usage.conflict_free) == tuple(waves * cycles for cycles in CONFLICTS[text])
    if usage.cycles["lds"] > 8 * waves:
        assert times_us(usage)["LDS"] == max(times_us(usage).values()) == usage.cycles["lds"] / 2 / 2100


def used(blocks: int, waves: int) -> Usage:
    """A thousand cycles of each unit a wave; a MiB of memory, which does not depend on who is busy."""
    usage = Usage("gfx942", waves // blocks, 0, 64, 32, waves=waves, blocks=blocks)
    usage.cycles = dict.fromkeys(usage.cycles, 1000 * waves)
    usage.lines = set(range(2**20 // 64))
    return usage


@pytest.mark.parametrize(("blocks", "waves", "units", "simds"), [
    (1, 1, 1, 1), (1, 4, 1, 4), (1, 16, 1, 4), (3, 6, 3, 6), (304, 304, 304, 304), (1000, 4000, 304, 1216)])
def test_few_workgroups_reach_few_units(blocks, waves, units, simds):
    times = times_us(used(blocks, waves))
    per_simd, per_unit = 1000 * waves / simds / 2100, 1000 * waves / units / 2100
    assert times == pytest.approx({"matrix": per_simd, "vector": 2 * per_simd, "scalar": per_simd, "LDS": per_unit,
                                   "memory": 2**20 / 5.3e6})


def test_bytes_are_those_of_the_operator():
    """7 rows of 768 bf16: x once, out once, and the weights."""
    usage, = usages("rms_norm", "hip", "7x768-torch.bfloat16", "gfx942").values()
    assert (usage.blocks, usage.block_waves, usage.barriers) == (7, 1, 0)
    moved = 2 * 7 * 768 * 2 + 768 * 2
    for line in (64, 128):
        # half a line more at each end of the three tensors, and the arguments
        assert moved <= usage.once(line) <= moved + 3 * line + 256
        assert usage.touched[line] >= moved + 6 * 768 * 2  # each workgroup reads the weights
    assert usage.requested >= 2 * 7 * 768 * 2 + 7 * 768 * 2


def test_latents_are_read_once_and_multiplied_twice(compiling):
    """2 sequences of 512 latents of 576 bf16, 16 heads: the scores need 576 of each latent, the values 512."""
    case = drawn("mla_decode", "16h-2x512")
    decode, _ = compiling.submit(usages, "mla_decode", "triton", case, "gfx942").result().values()
    latents = 2 * 512 * 576 * 2
    assert latents <= decode.once() <= 1.7 * latents  # the queries, and the results of the parts in fp32
    products = 2 * 512 * 16 * (576 + 512) * 2
    assert decode.cycles["matrix"] == products / 512  # operations of a SIMD in a cycle: no row is padding


@pytest.mark.parametrize("arch", ARCHS)
def test_what_the_core_executes_counts_as_if_numpy_had(arch):
    """A product in FP8: matrix instructions, LDS, waits, barriers; two batches of workgroups."""
    if not core.available():
        pytest.skip("no compiler for the core")
    found, kernel = [], OPS["fp8_block_scaled_mm"].backends["hip"]
    with platform.target(arch):
        args = contract.draw(Case("drawn", partial(make_product, 64, 512, 256)), "cpu", 0)
        for by in ("c", "numpy"):
            checks = counting()
            with emulate(arch, (checks,), core=by) as ran:
                kernel.run(**args)
            usage, = checks.usages.values()
            found.append(replace(usage, lines=set(), touched={}))  # where results lie differs
            assert usage.instructions == ran.instructions
            assert (0 < sum(ran.by_numpy.values()) < ran.instructions / 2) == (by == "c")
    assert found[0] == found[1]
    assert found[0].barriers > 0
    assert found[0].chain > 1


def moved(now: dict[str, float], golden: dict[str, float]) -> dict[str, tuple[float, float]]:
    """(golden, now) of the kernels whose bound is another than it was, beyond what a harmless change moves."""
    return {kernel: (golden[kernel], us) for kernel, us in now.items()
            if not 0.97 * golden[kernel] <= us <= 1.03 * golden[kernel]}


def test_bounds_that_rise_or_drop_are_found():
    assert moved({"a": 1.0, "b": 2.02, "c": 2.98}, {"a": 1.0, "b": 2.0, "c": 3.0}) == {}
    assert moved({"a": 0.5, "b": 2.2}, {"a": 1.0, "b": 2.0}) == {"a": (1.0, 0.5), "b": (2.0, 2.2)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("backend", "op", "case"), FLAGSHIPS)
def test_no_bound_moves_unseen(backend, op, case, arch, compiling, request, record, record_property):
    key, chosen = f"{op} {case} {backend} {arch}", drawn(op, case)

    def obtained() -> dict[str, float]:
        return compiling.submit(bounds_us, op, backend, chosen, arch).result()

    if backend == "hip":  # nothing to compile
        now = obtained()
    else:
        of = compiling.submit(mark, op, [chosen], arch).result()
        with record.result(f"bounds {key}", of, record_property) as entry:
            now = entry.told = entry.told or obtained()
    golden = json.loads(GOLDEN.read_text())
    if request.config.getoption("renew_golden", default=False):
        golden[key] = {kernel: round(us, 4) for kernel, us in now.items()}
        GOLDEN.write_text(json.dumps({key: golden[key] for key in KEYS if key in golden}, indent=1) + "\n")
    assert golden[key].keys() == now.keys()
    assert moved(now, golden[key]) == {}, \
        "bounds in us, golden and now; worse, or dropped, which may be work left out: if meant, renew with " + RENEW
