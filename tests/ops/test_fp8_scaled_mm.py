"""`fp8_scaled_mm` against numpy in fp64, within the bound that its docstring derives; all pairs of bit patterns."""

import helpers
import numpy as np
import pytest
import torch
from helpers import BACKENDS, FP8, HALF_STEP, UNIT, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops, platform, quant
from wave64.testing import tune
from wave64.testing.contract import same_bits
from wave64.triton_ops.fp8_mm import Config

quick = examples(25)


def run(backend, *args):
    return helpers.run(ops.fp8_scaled_mm, backend, *args)


def draw(m, n, k, per, device, flavor=None, bias=None):
    """per: the shapes of the scales, with M and N for numbers. Factors are views, NaN is next to and below them."""
    a, b = (torch.full((rows + 1, k + 16), float("nan")) for rows in (m, n))
    a[:m, :k], b[:n, :k] = torch.randn(m, k) * 4, torch.randn(n, k) * 4
    a, b = ((x.to(flavor or quant.fp8_dtype()).to(device)[:-1, :k]) for x in (a, b))
    a_scale, b_scale = (torch.rand([dict(M=m, N=n).get(size, size) for size in shape]) + 0.1 for shape in per)
    args = a, b, a_scale.to(device), b_scale.to(device)
    return args, None if bias is None else (torch.randn(n) * 9).to(bias).to(device)


def assert_within_bound(got, a, b, a_scale, b_scale, bias):
    k = a.shape[1]
    a, b, a_scale, b_scale = (x.cpu().double().numpy() for x in (a, b, a_scale, b_scale))
    bias = np.zeros(len(b)) if bias is None else bias.cpu().double().numpy()
    scale = a_scale.reshape(-1, 1) * b_scale.reshape(1, -1)
    y, total = scale * (a @ b.T) + bias, scale * (abs(a) @ abs(b).T)
    u, half_step = UNIT[got.dtype], HALF_STEP[got.dtype]
    arch = platform.arch()
    cut = 4 * 33 * 2.0**-13 if arch and arch.matrix == "wgmma" else 0.0
    allowed = ((k + 6) * 2.0**-23 * (total + abs(bias)) + cut * total) * (1 + u) + u * abs(y) + half_step
    assert (abs(got.cpu().double().numpy() - y) <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flavor", FP8, ids=str)
def test_all_pairs_of_patterns(backend, flavor, device):
    """Every pattern of one factor times every pattern of the other, NaN among them, with one column."""
    patterns = torch.arange(256, dtype=torch.uint8, device=device).view(flavor)[:, None]
    scale = torch.ones(1, device=device)
    with np.errstate(invalid="ignore"):  # of the interpreter, which computes in numpy
        got = run(backend, patterns, patterns, scale, scale, torch.float32)
    numbers = patterns[:, 0].cpu().double()
    torch.testing.assert_close(got.cpu().double(), numbers[:, None] * numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(m=st.integers(1, 70), n=st.integers(1, 140), k=st.integers(1, 300), biased=st.booleans(),
       out_dtype=st.sampled_from(sorted(UNIT, key=str)), flavor=st.sampled_from(FP8),
       per=st.tuples(st.sampled_from([[1], ["M", 1]]), st.sampled_from([[1], ["N"], ["N", 1]])))
def test_within_the_bound(backend, device, m, n, k, biased, out_dtype, flavor, per):
    if platform.arch() is not None:
        flavor = quant.fp8_dtype()
    args, bias = draw(m, n, k, per, device, flavor, out_dtype if biased else None)
    got = run(backend, *args, out_dtype, bias)
    assert (got.shape, got.dtype, got.is_contiguous()) == ((m, n), out_dtype, True)
    assert_within_bound(got, *args, bias)


@quick
@given(m=st.integers(1, 100), n=st.integers(1, 70), k=st.integers(1, 300), block_n=st.sampled_from([32, 64]),
       block_k=st.sampled_from([32, 64, 128]), group_m=st.integers(1, 5), xcds=st.sampled_from([1, 2, 3, 8]),
       swap=st.booleans(), programs=st.sampled_from([1, 20]), min_columns=st.sampled_from([32, 128]),
       biased=st.booleans())
def test_every_form_of_the_kernel(device, m, n, k, block_n, block_k, group_m, xcds, swap, programs, min_columns,
                                  biased):
    """Every tile is computed once in any order, every column counts once in any split of K, and bias once."""
    args, bias = draw(m, n, k, [["M", 1], ["N", 1]], device, bias=torch.float32 if biased else None)
    config = Config(32, block_n, block_k, 4, 1, programs, min_columns, group_m, xcds, swap)
    with tune.tuning_of(ops.fp8_scaled_mm).forced(config):
        got = run("triton", *args, torch.float32, bias)
        assert same_bits(got, run("triton", *args, torch.float32, bias))
    assert_within_bound(got, *args, bias)


def test_scales_that_are_views(device):
    """A column of a table of scales, for example."""
    (a, b, _, _), _ = draw(6, 20, 64, [[1], [1]], device)
    a_scale, b_scale = torch.rand(6, 3, device=device)[:, 1:2], torch.rand(20, 2, device=device)[:, 1]
    got = run("triton", a, b, a_scale, b_scale, torch.float32)
    assert_within_bound(got, a, b, a_scale, b_scale, None)


def test_registration_but_for_fp8_arguments_compared(device):
    """opcheck's test of the schema compares arguments before and after, which torch cannot do in FP8; the contract test
    compares their bytes."""
    args, bias = draw(3, 16, 64, [["M", 1], ["N"]], device, bias=torch.bfloat16)
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.fp8_scaled_mm.torch_op.default, (*args, torch.bfloat16, bias), test_utils=utils)


@pytest.mark.parametrize(("argument", "wrong"), [
    ("a", torch.zeros(3, 64)), ("a", torch.zeros(64, 3).to(FP8[0]).t()), ("b", torch.zeros(40, 64).to(FP8[1])),
    ("b", torch.zeros(40, 32).to(FP8[0])), ("a_scale", torch.zeros(3)), ("a_scale", torch.zeros(1, 3)),
    ("a_scale", torch.zeros(1).half()), ("b_scale", torch.zeros(3)), ("b_scale", torch.zeros(1, 40)),
    ("b_scale", torch.zeros(1, device="meta")), ("bias", torch.zeros(40)), ("bias", torch.zeros(3).bfloat16()),
    ("out_dtype", torch.int32)])
def test_refuses_by_name(argument, wrong):
    (a, b, a_scale, b_scale), bias = draw(3, 40, 64, [["M", 1], ["N", 1]], "cpu", FP8[0], torch.bfloat16)
    args = dict(a=a, b=b, a_scale=a_scale, b_scale=b_scale, out_dtype=torch.bfloat16, bias=bias)
    assert ops.fp8_scaled_mm(**args).shape == (3, 40)
    with refused("fp8_scaled_mm", argument):
        ops.fp8_scaled_mm(**args | {argument: wrong})
