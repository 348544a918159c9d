"""The FP8 quantizers against loops over rows and groups in numpy; how to round to FP8 is written here once more."""

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DTYPES, FP8, bits, examples
from hypothesis import given
from hypothesis import strategies as st

from wave64 import OPS, BadArgument, ops, platform, quant
from wave64.testing import lanes

quick = examples(20)


def numbers_of(flavor):
    """Every finite number of the format, in order, with whether the last bit of its pattern is 0."""
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits.view(flavor).double()
    keep = values.isfinite() & (bits != 0x80)
    order = values[keep].argsort()
    return values[keep][order].numpy(), (bits[keep][order] % 2 == 0).numpy()


def nearest(x, flavor):
    """x (fp64, within the format's range) rounded to nearest, ties to the pattern that is even."""
    numbers, even = numbers_of(flavor)
    above = np.searchsorted(numbers, x).clip(1, len(numbers) - 1)
    low, high = x - numbers[above - 1], numbers[above] - x
    up = (high < low) | (high == low) & even[above]
    return np.where(up, numbers[above], numbers[above - 1])


def quantized(row, flavor):
    """(q as numbers, scale) of numbers with one scale, fp32 operations one by one."""
    limit = np.float32(quant.limit(flavor))
    amax = np.float32(max(np.abs(row).max(), np.float32(1e-10)))
    inverse = np.nextafter(limit, np.float32(0)) / amax
    return nearest((row * inverse).astype(np.float64), flavor), amax / limit


def run(op, flavor, *args):
    """In the flavor of gfx942 or of OCP, wherever this is; skips where the machine cannot."""
    if platform.arch() is not None:
        if quant.fp8_dtype() != flavor:
            pytest.skip(f"{platform.arch().name} has another FP8 flavor")
        return op(*args)
    with platform.target("gfx942" if flavor == FP8[1] else "gfx950"):
        return op(*args)


@pytest.mark.parametrize("flavor", FP8, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(rows=st.integers(0, 5), columns=st.integers(1, 300), group=st.sampled_from([8, 32, 64, 128, 1024]),
       dtype=st.sampled_from(DTYPES), power=st.integers(-6, 3), offset=st.sampled_from([0, 1, 8]))
def test_groups_equal_a_loop(backend, flavor, device, rows, columns, group, dtype, power, offset):
    x = (torch.randn(rows, columns + offset) * 10.0**power).to(dtype)[:, offset:]
    q, scale = run(ops.per_token_group_quant_fp8.backends[backend].run, flavor, x.to(device), group)
    assert (q.shape, q.dtype, q.is_contiguous()) == (x.shape, flavor, True)
    assert (scale.shape, scale.dtype, scale.is_contiguous()) == ((rows, -(-columns // group)), torch.float32, True)
    q, scale, wide = q.cpu().double().numpy(), scale.cpu().numpy(), x.float().numpy()
    for t in range(rows):
        for i, first in enumerate(range(0, columns, group)):
            expected, unit = quantized(wide[t, first:first + group], flavor)
            assert np.array_equal(q[t, first:first + group], expected)
            assert scale[t, i] == unit


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_hip_divides_as_division_does(arch):
    """Its kernels multiply by the reciprocal of the limit and correct that."""
    amax = torch.randint(0x2EDBE6FF, 0x7F800001, (1, 2000), dtype=torch.int32).view(torch.float32)  # 1e-10 to infinity
    amax[0, -1] = torch.inf
    with platform.target(arch):
        with lanes.on_cpu(arch):  # executes at its end
            scale = ops.per_token_group_quant_fp8.backends["hip"].run(amax, 1)[1]
        assert torch.equal(scale, amax / quant.limit(quant.fp8_dtype()))


@pytest.mark.parametrize("flavor", FP8, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(rows=st.integers(0, 4), columns=st.integers(1, 500), dtype=st.sampled_from(DTYPES), power=st.integers(-6, 3),
       offset=st.sampled_from([0, 3]))
def test_rows_and_tensors_equal_a_loop(backend, flavor, device, rows, columns, dtype, power, offset):
    x = (torch.randn(rows, columns + offset) * 10.0**power).to(dtype)[:, offset:]
    wide = x.float().numpy()
    q, scale = run(ops.per_token_quant_fp8.backends[backend].run, flavor, x.to(device))
    assert (q.shape, q.dtype, scale.shape) == (x.shape, flavor, (rows, 1))
    for t in range(rows):
        expected, unit = quantized(wide[t], flavor)
        assert np.array_equal(q[t].cpu().double().numpy(), expected)
        assert scale[t].item() == unit
    q, scale = run(ops.per_tensor_quant_fp8.backends[backend].run, flavor, x.to(device))
    assert (q.shape, q.dtype, scale.shape) == (x.shape, flavor, (1,))
    if rows:
        expected, unit = quantized(wide, flavor)
        assert np.array_equal(q.cpu().double().numpy(), expected)
        assert scale.item() == unit


@pytest.mark.parametrize("flavor", FP8, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_given_scale_saturates_and_ties_go_to_even(backend, flavor, device, dtype):
    """Every number of the format, every midpoint of two neighbors, what lies beyond the largest; times the scale."""
    numbers, _ = numbers_of(flavor)
    beyond = np.array([250.0, 300.0, 449.0, 464.0, 480.0, 5e4, -5e4, -460.0, np.inf, -np.inf])
    values = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, beyond])
    limit = quant.limit(flavor)
    expected = torch.from_numpy(nearest(values.clip(-limit, limit), flavor)).float()
    for scale in (0.5, 1.0, 2.0**-9):
        x = torch.from_numpy(values * scale).to(dtype)
        exact = x.double().numpy() / scale == values  # fp16 does not hold them all
        given_scale = torch.tensor([scale], device=device)
        q, out = run(ops.per_tensor_quant_fp8.backends[backend].run, flavor, x.to(device)[None], given_scale)
        assert torch.equal(q[0].cpu().float()[exact], expected[exact])
        assert out.item() == scale
        assert out.data_ptr() != given_scale.data_ptr()


@pytest.mark.parametrize("op", ["per_token_group_quant_fp8", "per_token_quant_fp8", "per_tensor_quant_fp8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_alone_and_infinity_takes_its_group(backend, op, device):
    x = torch.ones(2, 64, device=device)
    x[0, 3], x[0, 4] = float("nan"), 2.0
    args = [32] if "group" in op else []
    q, scale = OPS[op].backends[backend].run(x, *args)
    back = q.float() * (scale.repeat_interleave(32, 1) if "group" in op else scale)
    assert back.isnan().nonzero().tolist() == [[0, 3]]
    torch.testing.assert_close(back.nan_to_num(1.0), x.nan_to_num(1.0))
    x[0, 3] = float("inf")
    with np.errstate(invalid="ignore"):  # of the interpreter, which computes in numpy
        q, scale = OPS[op].backends[backend].run(x, *args)
    assert scale.flatten()[0] == float("inf")
    assert q.float().isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_makes_no_nan(backend, device):
    x = torch.tensor([[0.0, -1.0, 1.0, 1e-39]], device=device)
    q, scale = ops.per_tensor_quant_fp8.backends[backend].run(x, torch.zeros(1, device=device))
    assert q.float()[0, :3].tolist() == [0.0, -quant.limit(q.dtype), quant.limit(q.dtype)]
    assert q.float().isfinite().all()
    assert scale.item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(rows=st.integers(1, 3), d=st.integers(1, 200), group=st.sampled_from([32, 128]), dtype=st.sampled_from(DTYPES))
def test_silu_is_quantized_as_fp64_says(backend, device, rows, d, group, dtype):
    """The product q * scale against y in fp64, within the bound of the docstring and the error of silu in fp32."""
    x = (torch.randn(rows, 2 * d) * 4).to(dtype)
    q, scale = ops.silu_and_mul_per_token_group_quant_fp8.backends[backend].run(x.to(device), group)
    gate, up = x.double().numpy()[:, :d], x.double().numpy()[:, d:]
    y = gate / (1 + np.exp(-gate)) * up
    smallest = 2.0**-10 if q.dtype == FP8[0] else 2.0**-11
    for t in range(rows):
        for i, first in enumerate(range(0, d, group)):
            part = y[t, first:first + group]
            unit = max(np.abs(part).max(), 1e-10) / quant.limit(q.dtype)
            assert scale[t, i].item() == pytest.approx(unit, rel=1e-5)
            back = q[t, first:first + group].cpu().double().numpy() * scale[t, i].item()
            assert (np.abs(back - part) <= (2**-4 + 2**-16) * np.abs(part) + (smallest + 2**-16) * unit).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_give_the_same_bits(backend, device):
    """Also where many programs take part, and with the second loop over long rows."""
    for name, x, args in (("per_token_group_quant_fp8", torch.randn(40, 1000), [64]),
                          ("per_token_quant_fp8", torch.randn(2, 40000), []),
                          ("per_tensor_quant_fp8", torch.randn(30, 3000), []),
                          ("per_tensor_quant_fp8", torch.randn(30, 3000)[:, :2999], [])):
        expected, got = (op.run(x.to(device), *args) for op in (OPS[name].backends["reference"],
                                                                OPS[name].backends[backend]))
        assert torch.equal(bits(expected[0]), bits(got[0]))
        assert torch.equal(expected[1], got[1])


@pytest.mark.parametrize("op", ["per_token_group_quant_fp8", "per_token_quant_fp8", "per_tensor_quant_fp8",
                                "silu_and_mul_per_token_group_quant_fp8"])
def test_row_strides_beyond_two_to_the_31_bytes(op, device):
    """Memory that is never touched costs nothing on a CPU."""
    x = torch.empty(3, 2**30, dtype=torch.bfloat16, device=device)[:, :128]
    x.copy_(torch.randn(3, 128))
    args = [64] if "group" in op else []
    backends = OPS[op].backends
    q, scale = backends["triton"].run(x, *args)
    expected, unit = backends["reference"].run(x.clone(), *args)
    torch.testing.assert_close(scale, unit, rtol=2**-18, atol=0)
    torch.testing.assert_close(q.float() * scale.view(-1, 1)[:1], expected.float() * unit.view(-1, 1)[:1])


@pytest.mark.parametrize(("op", "argument", "args"), [
    ("per_token_group_quant_fp8", "x", (torch.zeros(4), 32)),
    ("per_token_group_quant_fp8", "x", (torch.zeros(4, 0), 32)),
    ("per_token_group_quant_fp8", "x", (torch.zeros(4, 8).t(), 32)),
    ("per_token_group_quant_fp8", "x", (torch.zeros(4, 8, dtype=torch.int32), 32)),
    ("per_token_group_quant_fp8", "group_size", (torch.zeros(4, 8), 48)),
    ("per_token_group_quant_fp8", "group_size", (torch.zeros(4, 8), 0)),
    ("per_token_group_quant_fp8", "group_size", (torch.zeros(4, 8), 2048)),
    ("per_token_quant_fp8", "x", (torch.zeros(1, 4, 8),)),
    ("per_tensor_quant_fp8", "x", (torch.zeros(4, 8, dtype=torch.float64),)),
    ("per_tensor_quant_fp8", "scale", (torch.zeros(4, 8), torch.ones(2))),
    ("per_tensor_quant_fp8", "scale", (torch.zeros(4, 8), torch.ones(1, dtype=torch.float16))),
    ("silu_and_mul_per_token_group_quant_fp8", "x", (torch.zeros(4, 7), 32)),
    ("silu_and_mul_per_token_group_quant_fp8", "group_size", (torch.zeros(4, 8), 3)),
])
def test_refuses_by_name(op, argument, args):
    with pytest.raises(BadArgument, match=f"^{op}: {argument}: "):
        OPS[op](*args)


def test_agree_refuses_another_rounding_and_another_scale():
    """The contract test's judge: a neighbor is wrong, unless the number is next to a midpoint."""
    op = ops.per_token_group_quant_fp8
    x = torch.tensor([[448.0, 20.0, 21.0, 1.0]], dtype=torch.float64)
    exact = list(op.reference(x, 4))
    q, scale = op.reference(x.float(), 4)
    op.agree(dict(x=x, group_size=4), (q, scale), exact)
    for column, pattern, right in ((2, 0x5A, True), (2, 0x5B, True), (1, 0x5B, False), (3, 0x37, False),
                                   (0, 0x7D, False)):
        other = q.clone()
        other.view(torch.uint8)[0, column] = pattern
        if right:
            op.agree(dict(x=x, group_size=4), (other, scale), exact)
        else:
            with pytest.raises(AssertionError, match="1 of 4 numbers"):
                op.agree(dict(x=x, group_size=4), (other, scale), exact)
    with pytest.raises(AssertionError):
        op.agree(dict(x=x, group_size=4), (q, scale * (1 + 2**-20)), exact)


def test_an_architecture_without_fp8_is_told():
    with platform.target("gfx90a"):
        for name in ("per_token_group_quant_fp8", "per_token_quant_fp8", "per_tensor_quant_fp8"):
            assert OPS[name].backends["triton"].supports(torch.zeros(1, 8)) == "gfx90a has no FP8 conversion"
