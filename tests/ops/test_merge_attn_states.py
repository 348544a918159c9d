"""`merge_attn_states` against what it stands for: attention over all keys at once, of which each side saw some."""

import math

import pytest
import torch
from helpers import BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops

#: Each side is rounded to the dtype before the merge and the result after it.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}
quick = examples(25)


def attend(logits, values):
    """logits [T, H, K], values [K, H, D] in fp64 -> softmax(logits) values and log of the sum of exponentials."""
    if logits.shape[2] == 0:
        return logits.new_zeros(*logits.shape[:2], values.shape[2]), logits.new_full(logits.shape[:2], -math.inf)
    return torch.einsum("thk,khd->thd", logits.softmax(2), values), logits.logsumexp(2)


def run(backend, *args):
    return ops.merge_attn_states.backends[backend].run(*args)


def states(tokens=5, heads=3, head_dim=64, dtype=torch.bfloat16, device="cpu"):
    return [x.to(device) for _ in range(2)
            for x in (torch.randn(tokens, heads, head_dim).to(dtype), torch.randn(tokens, heads))]


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(tokens=st.integers(0, 40), heads=st.integers(1, 6), head_dim=st.sampled_from([1, 8, 33, 64, 96, 200]),
       keys=st.lists(st.integers(0, 5), min_size=2, max_size=4), shift=st.sampled_from([0, 0, 3, -30, 200, 1e4, -1e4]),
       dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 2**31))
def test_equals_attention_over_all_keys(backend, device, tokens, heads, head_dim, keys, shift, dtype, seed):
    """Merge sets of keys one after the other; `shift` is added to the logits of the last set."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, heads, sum(keys), generator=g, dtype=torch.float64)
    values = torch.randn(sum(keys), heads, head_dim, generator=g, dtype=torch.float64)
    logits[..., sum(keys[:-1]):] += shift
    exact, exact_lse = attend(logits, values)
    state = None
    for some_logits, some_values in zip(logits.split(keys, 2), values.split(keys, 0), strict=True):
        out, lse = attend(some_logits, some_values)
        side = out.to(device, dtype), lse.to(device, torch.float32)
        state = side if state is None else run(backend, *state, *side)
    assert state is not None
    out, lse = state
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    largest = values.abs().max().item() if values.numel() else 0.0
    tolerance = (len(keys) - 1) * TOLERANCE[dtype] * largest
    torch.testing.assert_close(out.cpu().double(), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("absent", [-math.inf, math.inf])
@pytest.mark.parametrize("held", [0.0, math.nan, math.inf])
def test_an_absent_side_leaves_the_other_as_it_is(backend, device, dtype, absent, held):
    out_a, lse_a, out_b, lse_b = states(dtype=dtype, device=device)
    for tensor, value in ((out_a, held), (lse_a, absent)):
        tensor[1:3] = value
    out_b[2:4], lse_b[2:4] = held, absent
    out, lse = run(backend, out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[1], out_b[1])
    assert torch.equal(lse[1], lse_b[1])
    assert torch.equal(out[3], out_a[3])
    assert torch.equal(lse[3], lse_a[3])
    assert (out[2] == 0).all()
    assert (lse[2] == -math.inf).all()
    assert out[::4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poisoned", [("lse_a",), ("lse_b",), ("lse_a", "lse_b")], ids=str)
def test_nan_does_not_vanish(backend, device, poisoned):
    args = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), states(device=device), strict=True))
    for name in poisoned:
        args[name][1, 2] = math.nan
    for result in run(backend, *args.values()):
        assert result[1, 2].isnan().all()
        assert result.isnan().sum() == result[1, 2].numel()


def headwise(x):
    """The same values, stored heads first."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def padded(x):
    """The same values, cut from wider rows and more heads."""
    wide = torch.randn(x.shape[0], x.shape[1] + 2, 192, device=x.device).to(x.dtype)
    wide[:, 1:-1, 64:128] = x
    return wide[:, 1:-1, 64:128]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [headwise, padded])
def test_views_give_what_their_copies_give(backend, device, view):
    out_a, lse_a, out_b, lse_b = states(tokens=7, device=device)
    expected = run(backend, out_a, lse_a, out_b, lse_b)
    for args in ((view(out_a), lse_a, headwise(out_b), headwise(lse_b)),
                 (headwise(out_a), headwise(lse_a), view(out_b), headwise(lse_b))):
        out, lse = run(backend, *args)
        torch.testing.assert_close((out, lse), expected)
        assert out.is_contiguous()
        assert lse.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_two_to_the_31(backend, device):
    """Offsets need 33 bits. Memory that is never touched costs nothing on a CPU."""
    near = states(tokens=4, device=device)
    stride = 2**31 // 48 * 16 + 16
    far = torch.empty(3 * stride + 3 * 64, dtype=near[0].dtype, device=device).as_strided((4, 3, 64), (stride, 64, 1))
    far.copy_(near[0])
    for moved in ([far, *near[1:]], [near[2], near[3], far, near[1]]):
        plain = [x if x is not far else near[0] for x in moved]
        torch.testing.assert_close(run(backend, *moved), run(backend, *plain))


@pytest.mark.parametrize(("argument", "change", "words"), [
    ("out_a", lambda x: x[0], "num_heads, head_dim"),
    ("out_a", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "contiguous last dimension"),
    ("out_a", lambda x: x.double(), "bf16, fp16 or fp32"),
    ("out_b", lambda x: x[:, :2], "[5, 3, 64], as out_a"),
    ("out_b", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "contiguous last dimension"),
    ("out_b", lambda x: x.half(), "that of out_a"),
    ("out_b", lambda x: x.to("meta"), "on cpu, where out_a is"),
    ("lse_a", lambda x: x.double(), "fp32 [5, 3]"),
    ("lse_a", lambda x: x[:4], "fp32 [5, 3]"),
    ("lse_a", lambda x: x.to("meta"), "on cpu, where out_a is"),
    ("lse_b", lambda x: x.t(), "heads first: transpose it"),
    ("lse_b", lambda x: x[..., None], "fp32 [5, 3]"),
    ("lse_b", lambda x: x.bfloat16(), "fp32 [5, 3]"),
    ("lse_b", lambda x: x.to("meta"), "on cpu, where out_a is")])
def test_refuses(argument, change, words):
    args = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), states(), strict=True))
    with refused("merge_attn_states", argument, words):
        ops.merge_attn_states(**args | {argument: change(args[argument])})
