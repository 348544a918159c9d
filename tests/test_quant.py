"""FP8 flavors and scales, against the formats' definition written here a second time over Python's numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wave64 import arch, platform, quant

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
PATTERNS = torch.arange(256, dtype=torch.uint8)
quick = settings(max_examples=20, deadline=None, derandomize=True)


def value(bits: int, flavor: torch.dtype) -> float:
    """The number that 8 bits mean: sign, 4 bits of exponent, 3 of fraction."""
    sign, exponent, fraction = -1.0 if bits & 0x80 else 1.0, bits >> 3 & 15, bits & 7
    if flavor == FN and bits & 0x7F == 0x7F or flavor == FNUZ and bits == 0x80:
        return math.nan
    bias = 7 if flavor == FN else 8
    return sign * (math.ldexp(8 + fraction, exponent - bias - 3) if exponent else math.ldexp(fraction, 1 - bias - 3))


@pytest.mark.parametrize("flavor", [FN, FNUZ], ids=str)
def test_torch_knows_both_flavors(flavor):
    expected = torch.tensor([value(i, flavor) for i in range(256)])
    torch.testing.assert_close(PATTERNS.view(flavor).float(), expected, rtol=0, atol=0, equal_nan=True)
    assert quant.limit(flavor) == expected.nan_to_num(0).max() == {FN: 448, FNUZ: 240}[flavor]


@pytest.mark.parametrize("name", [*arch.ARCHS, "gfx908"])
def test_the_type_is_the_architectures(name):
    with platform.target(name) as target:
        assert quant.fp8_dtype() == (FNUZ if target.fp8 == "e4m3fnuz" else FN)


def test_a_converted_checkpoint_means_the_same():
    """All 254 patterns that are numbers, with scales of several shapes."""
    numbers = PATTERNS[(PATTERNS & 0x7F) != 0x7F].view(2, -1)
    for scale in (torch.tensor([0.37]), torch.tensor([[0.37], [2.0**-30]])):
        converted, doubled = quant.fn_to_fnuz(numbers.view(FN), scale)
        assert converted.dtype == FNUZ
        assert not converted.float().isnan().any()
        assert torch.equal(converted.float() * doubled, numbers.view(FN).float() * scale)
    assert torch.equal(quant.fn_to_fnuz_kv_scale(torch.tensor(0.5)), torch.tensor(1.0))


def test_nan_in_a_checkpoint_are_counted():
    with pytest.raises(ValueError, match=r"expected numbers, got 2 NaN \(0x7F or 0xFF\) among 256"):
        quant.fn_to_fnuz(PATTERNS.view(FN), torch.ones(1))
    with pytest.raises(ValueError, match="expected torch.float8_e4m3fn, got torch.float8_e4m3fnuz"):
        quant.fn_to_fnuz(PATTERNS.view(FNUZ), torch.ones(1))


@pytest.mark.parametrize("flavor", [FN, FNUZ], ids=str)
@quick
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), bn=st.integers(1, 4), bk=st.integers(1, 4),
       power=st.integers(-20, 20), seed=st.integers(0, 2**31))
def test_blocks_of_weights(flavor, rows, columns, bn, bk, power, seed):
    """Scales are those of a loop over blocks, and what comes back is as near as the format allows."""
    weight = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q, scale = quant.quantize_weight_blocks(weight, [bn, bk], flavor)
    assert (q.dtype, q.shape, scale.shape) == (flavor, weight.shape, (2, -(-rows // bn), -(-columns // bk)))
    back = quant.dequantize(q, scale, [bn, bk])
    for expert in range(2):
        for i in range(rows):
            for j in range(columns):
                r, c = i // bn, j // bk
                block = weight[expert, r * bn:(r + 1) * bn, c * bk:(c + 1) * bk]
                want = max(float(block.abs().max()), 1e-10) / quant.limit(flavor)
                assert float(scale[expert, r, c]) == pytest.approx(want, rel=2**-23)
                off = abs(float(back[expert, i, j] - weight[expert, i, j]))
                smallest = 2.0**-10 if flavor == FN else 2.0**-11
                assert off <= (2**-4 + 2**-20) * abs(float(weight[expert, i, j])) + smallest * want


def test_channels_and_tensors_are_blocks_too():
    weight = torch.randn(3, 6, 10)
    q, scale = quant.quantize_weight_channels(weight)
    assert torch.equal(scale, weight.abs().amax(-1) / 448)
    assert torch.equal(q.float(), quant.quantize_weight_blocks(weight, [1, 10])[0].float())
    q, scale = quant.quantize_weight_tensors(weight)
    assert torch.equal(scale, weight.abs().amax((1, 2)) / 448)
    assert torch.equal(q.float(), quant.quantize_weight_blocks(weight, [6, 10])[0].float())
    assert quant.quantize_weight_tensors(weight[0])[1].shape == (1,)
    torch.testing.assert_close(quant.dequantize(q, scale[:, None, None]), weight, rtol=2**-4, atol=1e-3)


@pytest.mark.parametrize("flavor", [FN, FNUZ], ids=str)
def test_no_finite_number_becomes_nan_or_exceeds_the_limit(flavor):
    """Whatever amax is, it becomes the limit itself."""
    amax = torch.cat([torch.logspace(-9, 38, 4001), torch.tensor([torch.finfo(torch.float32).max])])
    q, scale = quant.quantize(torch.stack([amax, -amax, amax / 3], 1), 1, flavor)
    assert (q.float()[:, 0] == quant.limit(flavor)).all()
    assert (q.float()[:, 1] == -quant.limit(flavor)).all()
    assert scale.isfinite().all()
    tiny = torch.tensor([[0.0, -0.0, 1e-45, -1e-20]])
    q, scale = quant.quantize(tiny, 1, flavor)
    assert (q.float() == 0).all()
    assert scale.item() == pytest.approx(1e-10 / quant.limit(flavor))


def test_rows_are_padded_on_gfx942_only():
    weight = torch.randn(2, 3, 512).to(FN)
    assert quant.pad_rows(weight) is weight
    with platform.target("gfx950"):
        assert quant.pad_rows(weight) is weight
    with platform.target("gfx942"):
        padded, wide = quant.pad_rows(weight), quant.pad_rows(torch.ones(3, 256, dtype=torch.bfloat16))
        assert (padded.shape, padded.stride(), padded.dtype) == (weight.shape, (3 * 768, 768, 1), FN)
        assert torch.equal(padded.float(), weight.float())
        assert (wide.shape, wide.stride()) == ((3, 256), (384, 1))
        assert torch.equal(wide, torch.ones_like(wide))
        for other in (weight[..., :500].contiguous(), padded, torch.ones(512)):
            assert quant.pad_rows(other) is other


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_ue8m0_scales_are_the_smallest_powers_of_two_that_hold_the_group(dtype):
    """From exact powers of two on and just beyond them; no finite number is saturated, and dividing back is exact."""
    largest = quant.limit(dtype)
    amax = largest * torch.tensor([2.0**-20, 0.5, 1.0, 2.0**30, 1 + 2.0**-23, 2.0**7 * (1 + 2.0**-23), 1.5, 1.9999999])
    x = torch.stack((amax, -amax / 3, torch.zeros_like(amax)), -1)
    q, scale = quant.quantize(x, -1, dtype, ue8m0=True)
    want = torch.tensor([2.0**-20, 0.5, 1.0, 2.0**30, 2.0, 2.0**8, 2.0, 2.0])
    assert torch.equal(scale[:, 0], want)
    assert torch.equal(q.float(), (x / want[:, None]).to(dtype).float())
    assert quant.quantize(torch.tensor([[float("inf"), 1.0]]), -1, dtype, ue8m0=True)[1].isinf().all()
