"""`fp8_block_scaled_mm` against numpy in fp64, within the bound that its docstring derives; all pairs of patterns."""

import helpers
import numpy as np
import pytest
import torch
from helpers import BACKENDS, FP8, HALF_STEP, UNIT, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops, platform, quant
from wave64.backends import import_hopper_kernels
from wave64.testing import tune
from wave64.testing.contract import same_bits
from wave64.testing.emulator.run import emulate
from wave64.triton_ops.fp8_mm import Config

quick = examples(25)


def run(backend, *args):
    return helpers.run(ops.fp8_block_scaled_mm, backend, *args)


def draw(m, n, k, block_shape, flavor=None, device="cpu"):
    """Factors as views into larger ones, with NaN next to and below what may be read."""
    bn, bk = block_shape
    a, b = (torch.full((rows + 1, k + 16), float("nan")) for rows in (m, n))
    a[:m, :k], b[:n, :k] = torch.randn(m, k) * 4, torch.randn(n, k) * 4
    a, b = ((x.to(flavor or quant.fp8_dtype()).to(device)[:-1, :k]) for x in (a, b))
    a_scale, b_scale = torch.rand(m, -(-k // bk)) + 0.1, torch.rand(-(-n // bn), -(-k // bk)) + 0.1
    return a, b, a_scale.to(device), b_scale.to(device)


def exact(a, b, a_scale, b_scale, block_shape):
    """(y, S of the docstring) in fp64, group by group."""
    bn, bk = block_shape
    a, b, a_scale, b_scale = (x.cpu().double().numpy() for x in (a, b, a_scale, b_scale))
    y, total = np.zeros((len(a), len(b))), np.zeros((len(a), len(b)))
    for g in range(a_scale.shape[1]):
        columns = slice(g * bk, (g + 1) * bk)
        scale = a_scale[:, g, None] * b_scale[np.arange(len(b)) // bn, g]
        y += scale * (a[:, columns] @ b[:, columns].T)
        total += scale * (abs(a[:, columns]) @ abs(b[:, columns]).T)
    return y, total


def assert_within_bound(got, y, total, k):
    u, half_step = UNIT[got.dtype], HALF_STEP[got.dtype]
    arch = platform.arch()
    cut = 4 * 33 * 2.0**-13 if arch and arch.matrix == "wgmma" else 0.0
    allowed = ((k + 6) * 2.0**-23 + cut) * total * (1 + u) + u * abs(y) + half_step
    assert (abs(got.cpu().double().numpy() - y) <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flavor", FP8, ids=str)
def test_all_pairs_of_patterns(backend, flavor, device):
    """Every pattern of one factor times every pattern of the other, NaN among them, with one column."""
    patterns = torch.arange(256, dtype=torch.uint8, device=device).view(flavor)[:, None]
    scale = torch.ones(256, 1, device=device)
    with np.errstate(invalid="ignore"):  # of the interpreter, which computes in numpy
        got = run(backend, patterns, patterns, scale, scale[:2], [128, 128], torch.float32)
    numbers = patterns[:, 0].cpu().double()
    torch.testing.assert_close(got.cpu().double(), numbers[:, None] * numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(m=st.integers(1, 70), n=st.integers(1, 140), k=st.integers(1, 300), flavor=st.sampled_from(FP8),
       out_dtype=st.sampled_from(sorted(UNIT, key=str)),
       block_shape=st.sampled_from([[128, 128], [32, 64], [16, 32], [1, 96], [48, 160]]))
def test_within_the_bound(backend, device, m, n, k, out_dtype, block_shape, flavor):
    if platform.arch() is not None:
        flavor = quant.fp8_dtype()
    args = draw(m, n, k, block_shape, flavor, device)
    got = run(backend, *args, block_shape, out_dtype)
    assert (got.shape, got.dtype, got.is_contiguous()) == ((m, n), out_dtype, True)
    assert_within_bound(got, *exact(*args, block_shape), k)


@quick
@given(m=st.integers(1, 100), n=st.integers(1, 70), k=st.integers(1, 300), block_n=st.sampled_from([32, 64]),
       block_k=st.sampled_from([32, 64, 128]), group_m=st.integers(1, 5), xcds=st.sampled_from([1, 2, 3, 8]),
       swap=st.booleans(), programs=st.sampled_from([1, 20]), min_columns=st.sampled_from([32, 128]))
def test_every_form_of_the_kernel(device, m, n, k, block_n, block_k, group_m, xcds, swap, programs, min_columns):
    """Every tile is computed once in any order, and every column counts once in any split of K."""
    args = draw(m, n, k, [32, 128], device=device)
    config = Config(32, block_n, block_k, 4, 1, programs, min_columns, group_m, xcds, swap)
    with tune.tuning_of(ops.fp8_block_scaled_mm).forced(config):
        got = run("triton", *args, [32, 128], torch.float32)
        assert same_bits(got, run("triton", *args, [32, 128], torch.float32))
    assert_within_bound(got, *exact(*args, [32, 128]), k)


@pytest.mark.skipif(platform.arch() is None or platform.arch().matrix != "wgmma", reason="a kernel for Hopper")
@pytest.mark.parametrize(("m", "n", "k"), [
    (1, 8, 16), (64, 128, 128), (65, 136, 144), (128, 256, 384), (300, 1000, 656), (2000, 3000, 1024)])
def test_hoppers_own_kernel_keeps_the_bound(device, m, n, k):
    """Edges of tiles, odd and even numbers of blocks of K, fewer and more tiles than programs."""
    args = draw(m, n, k, [128, 128], device=device)
    assert import_hopper_kernels() is None
    got = ops.fp8_block_scaled_mm.backends["hopper"].run(*args, [128, 128], torch.bfloat16)
    assert_within_bound(got, *exact(*args, [128, 128]), k)


@pytest.mark.skipif(platform.arch() is not None, reason="on gfx942's machine code, executed on a CPU")
@pytest.mark.skipif("hip" not in ops.fp8_block_scaled_mm.backends, reason="needs the extension")
@pytest.mark.parametrize(("m", "n", "k", "block_shape"), [
    (1, 16, 16, [128, 128]), (17, 130, 272, [128, 128]), (33, 31, 1936, [256, 256]), (130, 129, 400, [128, 128]),
    (131, 2049, 144, [128, 128]), (300, 150, 1168, [128, 256]), (2, 17, 8336, [128, 128]), (30, 9, 6400, [128, 384]),
    (70, 33, 3216, [128, 128]), (2049, 24, 400, [128, 128])])
def test_hips_kernels_keep_the_bound(m, n, k, block_shape):
    """Rows end in NaN that nothing may count, and blocks at the last column; blocks are wider than a step and a tile;
    the last four have more steps along K than are in flight at a time."""
    with platform.target("gfx942"), emulate("gfx942"):
        a, b, a_scale, b_scale = draw(m, n, k, block_shape)
        if m % 2:
            a_scale, b_scale = (scale.t().contiguous().t() for scale in (a_scale, b_scale))
        got = ops.fp8_block_scaled_mm.backends["hip"].run(a, b, a_scale, b_scale, block_shape, torch.float32)
    assert_within_bound(got, *exact(a, b, a_scale, b_scale, block_shape), k)


@pytest.mark.skipif(platform.arch() is not None, reason="on machine code, executed on a CPU")
@pytest.mark.skipif("hip" not in ops.fp8_block_scaled_mm.backends, reason="needs the extension")
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_hips_tiles_keep_the_bound_over_many_steps(arch, by_columns, monkeypatch):
    """Tokens' scales pass through LDS, of 8 steps at a time: here more than two such, since K is not split."""
    monkeypatch.setattr(platform, "compute_units", lambda: 1)
    with platform.target(arch), emulate(arch):
        a, b, a_scale, b_scale = draw(259, 24, 2192, [128, 128])
        if by_columns:
            a_scale, b_scale = (scale.t().contiguous().t() for scale in (a_scale, b_scale))
        got = ops.fp8_block_scaled_mm.backends["hip"].run(a, b, a_scale, b_scale, [128, 128], torch.float32)
    assert_within_bound(got, *exact(a, b, a_scale, b_scale, [128, 128]), 2192)


@pytest.mark.skipif("hip" not in ops.fp8_block_scaled_mm.backends, reason="needs the extension")
def test_what_hip_declines():
    supports = ops.fp8_block_scaled_mm.backends["hip"].supports

    def declined(arch="gfx950", flavor=FP8[0], k=256, padded=0, block_shape=(128, 128), far=1):
        a = torch.zeros(2, k + padded).to(flavor)[:, :k]
        scale = torch.empty_strided((2, 2), (1, far), device="meta")
        with platform.target(arch):
            return supports(a, a, scale, scale, list(block_shape), torch.bfloat16)

    assert declined() is None
    assert declined("gfx942", FP8[1]) is None
    assert "instructions of gfx942 and gfx950" in str(declined("gfx1201"))
    assert "e4m3fn on gfx942" in str(declined("gfx942"))
    assert "these have 64 and 128" in str(declined(block_shape=(64, 128)))
    assert "16 bytes" in str(declined(k=250))
    assert "16 bytes" in str(declined(padded=8))
    assert "too far from each other" in str(declined(far=2**28))


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_activations_and_weights(backend, device):
    """What wave64's quantizers and the product make of a linear layer is off by their documented bounds at most."""
    x, weight = torch.randn(9, 300, device=device), torch.randn(70, 300, device=device) * 0.05
    (q, scale), (w, w_scale) = ops.per_token_group_quant_fp8(x, 64), quant.quantize_weight_blocks(weight, [32, 64])
    got = run(backend, q, w, scale, w_scale, [32, 64], torch.float32)
    x, weight = x.double(), weight.double()
    smallest, w_smallest = torch.full_like(x, 2.0**-10), torch.full_like(weight, 2.0**-10)
    off = 2.0**-4 * x.abs() + quant.dequantize(smallest, scale, [1, 64], torch.float64)
    w_off = 2.0**-4 * weight.abs() + quant.dequantize(w_smallest, w_scale, [32, 64], torch.float64)
    allowed = x.abs() @ w_off.t() + off @ (weight.abs() + w_off).t()
    assert ((got.double() - x @ weight.t()).abs() <= allowed).all()
    assert ((got.double() - x @ weight.t()).abs() > 2.0**-16 * allowed).any()


def test_weights_with_padded_rows_give_the_same_bits(device):
    a, b, a_scale, b_scale = (x.contiguous() for x in draw(5, 40, 512, [128, 128], FP8[1]))
    if platform.arch() is not None:
        pytest.skip("pads rows on gfx942, whose flavor is another")
    with platform.target("gfx942"):
        padded = quant.pad_rows(b)
    assert padded.stride() == (768, 1)
    first, second = (run("triton", a, w, a_scale, b_scale, [128, 128], torch.bfloat16) for w in (b, padded))
    assert torch.equal(first, second)


def test_row_strides_beyond_two_to_the_31_bytes(device):
    """Memory that is never touched costs nothing on a CPU."""
    a, b, a_scale, b_scale = draw(3, 20, 64, [32, 32], device=device)
    far = torch.empty(3, 2**30 + 64, dtype=torch.uint8, device=device)[:, :64].view(a.dtype)
    far.copy_(a)
    first, second = (run("triton", x, b, a_scale, b_scale, [32, 32], torch.bfloat16) for x in (a, far))
    assert torch.equal(first, second)


def test_registration_but_for_fp8_arguments_compared(device):
    """opcheck's test of the schema compares arguments before and after, which torch cannot do in FP8; the contract test
    compares their bytes."""
    args = (*draw(3, 16, 64, [16, 32], device=device), [16, 32], torch.bfloat16)
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.fp8_block_scaled_mm.torch_op.default, args, test_utils=utils)


def test_what_triton_declines():
    a = torch.zeros(2, 64).to(FP8[0])
    supports = ops.fp8_block_scaled_mm.backends["triton"].supports
    assert supports(a, a, None, None, [1, 48], None) == "multiplies 32 columns at a time, a group has 48"
    for name, words in (("gfx942", "does not multiply e4m3fn, its FP8 type is e4m3fnuz"), ("gfx950", None),
                        ("gfx90a", "does not multiply e4m3fn, nor any FP8"), ("sm_90", None)):
        with platform.target(name):
            assert supports(a, a, None, None, [128, 128], None) == (words and f"{name} {words}")


@pytest.mark.parametrize(("argument", "wrong"), [
    ("a", torch.zeros(3, 64)), ("a", torch.zeros(64).to(FP8[0])), ("a", torch.zeros(64, 3).to(FP8[0]).t()),
    ("a", torch.zeros(3, 0).to(FP8[0])), ("b", torch.zeros(40, 64).to(FP8[1])), ("b", torch.zeros(40, 32).to(FP8[0])),
    ("b", torch.zeros(40, 64)), ("a_scale", torch.zeros(3, 1)), ("a_scale", torch.zeros(3, 2).double()),
    ("a_scale", torch.zeros(2, 3)), ("b_scale", torch.zeros(40, 2)), ("b_scale", torch.zeros(2, 2)),
    ("b_scale", torch.zeros(3, 2, device="meta")), ("block_shape", [16]), ("block_shape", [0, 32]),
    ("out_dtype", torch.float64)])
def test_refuses_by_name(argument, wrong):
    a, b, a_scale, b_scale = draw(3, 40, 64, [16, 32], FP8[0])
    args = dict(a=a, b=b, a_scale=a_scale, b_scale=b_scale, block_shape=[16, 32], out_dtype=torch.bfloat16)
    assert ops.fp8_block_scaled_mm(**args).shape == (3, 40)
    with refused("fp8_block_scaled_mm", argument):
        ops.fp8_block_scaled_mm(**args | {argument: wrong})
