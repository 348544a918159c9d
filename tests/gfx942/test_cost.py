"""The cost model: its rules on known accesses, and the bounds of flagship cases, which may not get worse unseen."""

import json
from pathlib import Path

import numpy as np
import pytest

from wave64 import OPS
from wave64.testing.cost import bounds_us, usages
from wave64.testing.emulator.cost import lds_cycles, unit_of

GOLDEN = Path(__file__).with_name("bounds.json")
LANES = np.arange(64)
FLAGSHIPS = [("rms_norm", "128x7168"), ("fused_add_rms_norm", "128x7168"), ("silu_and_mul", "128x7168"),
             ("per_token_group_quant_fp8", "128x7168"), ("grouped_topk", "64x256-v3"), ("paged_attention", "1x4096")]


@pytest.mark.parametrize(("offsets", "width", "banks", "cycles", "least"), [
    (LANES * 4, 4, 32, 2, 2),        # 64 neighbouring words: 32 at a time
    (LANES * 0, 4, 32, 2, 2),        # one word for all
    (LANES * 128, 4, 32, 64, 2),     # a column of rows of 128 bytes: all in one bank
    (LANES * 132, 4, 32, 2, 2),      # the same, rows padded by a word
    (LANES * 8, 4, 32, 4, 2),        # every other word: two in a bank
    (LANES * 16, 16, 32, 8, 8),      # 16 bytes each: 8 lanes at a time
    (LANES * 16, 16, 64, 4, 4),      # gfx950's banks: 16 lanes
    (LANES[:5] * 4, 4, 32, 1, 1),    # a few lanes
    (LANES * 2, 2, 32, 2, 2),        # two lanes to a word
])
def test_lds_conflicts_come_from_addresses(offsets, width, banks, cycles, least):
    assert lds_cycles(offsets, width, banks) == (cycles, least)


@pytest.mark.parametrize(("name", "arch", "cycles"), [
    ("v_mfma_f32_32x32x8_f16", "gfx942", 32), ("v_mfma_f32_16x16x16_bf16", "gfx942", 16),
    ("v_mfma_f32_16x16x32_fp8_fp8", "gfx942", 16), ("v_mfma_f32_32x32x2_f32", "gfx942", 64),
    ("v_mfma_i32_32x32x16_i8", "gfx942", 32), ("v_mfma_f32_32x32x16_bf16", "gfx950", 32),
    ("v_mfma_f32_16x16x128_f8f6f4", "gfx950", 32),
])
def test_matrix_instructions_take_what_amd_says(name, arch, cycles):
    assert unit_of(name, "VOP3P", arch) == ("matrix", cycles)


def test_bytes_are_those_of_the_operator():
    """7 rows of 768 bf16: x once, out once, and the weights."""
    usage, = usages(OPS["rms_norm"], "hip", "7x768-torch.bfloat16", "gfx942").values()
    assert (usage.blocks, usage.block_waves, usage.barriers) == (7, 1, 0)
    moved = 2 * 7 * 768 * 2 + 768 * 2
    assert moved <= usage.compulsory <= moved + 3 * 128 + 7 * 128  # a line more at the ends, the arguments
    assert usage.requested >= 2 * 7 * 768 * 2 + 7 * 768 * 2


@pytest.fixture(scope="module")
def bounds(request):
    """(op, case, arch) -> {kernel: its bound in us}, golden and now"""
    now = {f"{op} {case} {arch}": {kernel: max(bounds_us(usage).values())
                                   for kernel, usage in usages(OPS[op], "hip", case, arch).items()}
           for op, case in FLAGSHIPS for arch in ("gfx942", "gfx950")}
    if request.config.getoption("renew_golden", default=False):
        GOLDEN.write_text(json.dumps({key: {kernel: round(us, 4) for kernel, us in of.items()}
                                      for key, of in now.items()}, indent=1) + "\n")
    return json.loads(GOLDEN.read_text()), now


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("op", "case"), FLAGSHIPS)
def test_no_bound_gets_worse(op, case, arch, bounds):
    golden, now = (of[f"{op} {case} {arch}"] for of in bounds)
    assert golden.keys() == now.keys()
    worse = {kernel: (golden[kernel], us) for kernel, us in now.items() if us > 1.03 * golden[kernel]}
    assert worse == {}, "bounds in us, golden and now; where it is meant: pytest tests/gfx942 --renew-golden"
