"""What codes keep of a sum over ranks: off from the exact one by at most what all_reduce says, whatever the numbers."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wave64 import distributed, ops, platform, quant
from wave64.ops.all_reduce import QUANTIZED_FROM, is_quantized

ARCHS = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


def error(x: torch.Tensor, codes: str) -> torch.Tensor:
    """e(v) of each element, as the operator's docstring has it."""
    size = torch.nn.functional.pad(x.double().abs(), (0, -x.numel() % 32)).view(-1, 32)
    amax = size.amax(1, keepdim=True).expand_as(size)
    by = {"fp8": torch.maximum(size / 16, amax / 2**18), "int8": amax / 251, "int4": amax / 13.8}
    return by[codes].flatten()[: x.numel()]


@given(count=st.integers(1, 300), world=st.integers(2, 8), codes=st.sampled_from(sorted(quant.CODES)),
       arch=st.sampled_from(sorted(ARCHS)), dtype=st.sampled_from((torch.bfloat16, torch.float16)),
       spread=st.floats(0, 12), seed=st.integers(0, 2**31))
def test_error_is_within_the_bound(count, world, codes, arch, dtype, spread, seed):
    """Of numbers whose blocks have magnitudes far from each other's, too."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(count, generator=generator).mul(spread / 4).clamp(-12, 12).exp2()
    x = [(torch.randn(count, generator=generator) * sizes).to(dtype) for _ in range(world)]
    with platform.target(arch):
        parts = [quant.coded(each, codes) for each in x]
        sums = functools.reduce(torch.add, parts)
        got = quant.coded(sums, codes).double()
    exact = torch.stack(x).double().sum(0)
    bound = sum(error(each, codes) for each in x) + error(sums, codes)
    assert ((got - exact).abs() <= bound + world * 2.0**-24 * torch.stack(x).double().abs().sum(0)).all()


@pytest.mark.parametrize("codes", quant.CODES)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_block_spoils_another(codes, arch):
    """Zeros stay zeros, a number alone in its block is kept, and what is not finite spoils its own block alone."""
    x = torch.zeros(5 * 32, dtype=torch.bfloat16)
    x[40], x[64:96], x[70], x[100] = 3.0, 1.0, torch.nan, -torch.inf
    with platform.target(arch):
        got = quant.coded(x, codes)
    assert torch.equal(got[:32], torch.zeros(32))
    assert got[40] == pytest.approx(3.0, rel=2**-4)
    assert not got[32:40].any()
    assert got[64:128].isnan().all()
    assert torch.equal(got[128:], torch.zeros(32))
    assert not got[:32].signbit().any()


@pytest.mark.parametrize(("shape", "dtype", "quantize", "expected"), [
    ((QUANTIZED_FROM // 2,), torch.bfloat16, "fp8", True), ((QUANTIZED_FROM // 2,), torch.float16, "int4", True),
    ((QUANTIZED_FROM // 2 - 1,), torch.bfloat16, "fp8", False), ((QUANTIZED_FROM // 2,), torch.bfloat16, "none", False),
    ((QUANTIZED_FROM,), torch.float32, "int8", False)])
def test_which_messages_are_codes(shape, dtype, quantize, expected):
    assert is_quantized(torch.empty(shape, dtype=dtype, device="meta"), quantize) is expected


def test_a_rank_alone_stays_exact():
    x = torch.randn(QUANTIZED_FROM // 2).bfloat16()
    assert torch.equal(ops.all_reduce(x, distributed.ALONE.name, "int4"), x)


def test_an_unknown_quantization_is_refused():
    with pytest.raises(ValueError, match="all_reduce: quantize: expected one of none, fp8, int8, int4, got 'int6'"):
        ops.all_reduce(torch.zeros(3), distributed.ALONE.name, "int6")
