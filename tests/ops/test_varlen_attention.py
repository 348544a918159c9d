"""varlen_attention against a loop over tokens, heads and keys, and against torch's own attention."""

import dataclasses
import math

import pytest
import torch
from helpers import BACKENDS, on, refused
from helpers_attention import TOLERANCE, drawn, run
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops
from wave64.ops import varlen_attention as declared
from wave64.ops.varlen_attention import cases, cost, make_case
from wave64.testing import contract


def naive(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=True):
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        for t in range(starts_q[i], starts_q[i + 1]):
            hidden = starts_q[i + 1] - 1 - t if causal else 0  # keys at the end that are newer than the query
            seen = range(starts_k[i], starts_k[i + 1] - hidden)
            for h in range(q.shape[1]) if len(seen) else ():
                logits = [scale * float(q[t, h].double() @ k[s, h // group].double()) for s in seen]
                weights = [math.exp(x - max(logits)) for x in logits]
                total = math.fsum(weights)
                out[t, h] = sum(w / total * v[s, h // group].double() for w, s in zip(weights, seen, strict=True))
                lse[t, h] = max(logits) + math.log(total)
    return out, lse


def assert_right(got, args):
    out, lse = got
    exact, exact_lse = naive(**on("cpu", args))
    largest = float(args["v"].float().abs().max()) if args["v"].numel() else 1.0
    assert out.isfinite().all()
    assert out.is_contiguous()
    torch.testing.assert_close(out.cpu().double(), exact, atol=TOLERANCE[out.dtype] * largest, rtol=0)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.cpu().double(), exact_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@given(kv_heads=st.integers(1, 3), group=st.sampled_from([1, 2, 3, 5]), dtype=st.sampled_from(list(TOLERANCE)),
       widths=st.sampled_from([(8, 8), (16, 24), (33, 16), (48, 32), (64, 64), (80, 33), (192, 128)]),
       causal=st.booleans(),
       lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=3))
@drawn
def test_equals_a_loop_over_keys(device, backend, kv_heads, group, dtype, widths, causal, lengths):
    with torch.device(device):
        args = make_case([n for n, _ in lengths], [n for _, n in lengths], group * kv_heads, kv_heads, *widths,
                         dtype=dtype, causal=causal)
    assert_right(run("varlen_attention", backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys", "widths"), [
    ([70, 31], [70, 31], (64, 64)), ([40, 65], [100, 130], (192, 128)), ([90], [50], (40, 72))])
def test_equals_torch_over_several_blocks(device, backend, causal, queries, keys, widths):
    """torch's scaled_dot_product_attention, sequence by sequence, with a mask that it is given whole."""
    with torch.device(device):
        args = make_case(queries, keys, 4, 2, *widths, dtype=torch.float32, causal=causal)
    out, _ = run("varlen_attention", backend, args)
    for i, (new, length) in enumerate(zip(queries, keys, strict=True)):
        some_q = slice(int(args["cu_seqlens_q"][i]), int(args["cu_seqlens_q"][i + 1]))
        some_k = slice(int(args["cu_seqlens_k"][i]), int(args["cu_seqlens_k"][i + 1]))
        q = args["q"][some_q].transpose(0, 1)
        k, v = (args[name][some_k].transpose(0, 1).repeat_interleave(2, 0) for name in "kv")
        mask = torch.ones(new, length, dtype=torch.bool, device=device)
        if causal:
            mask = mask.tril(length - new)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=args["scale"])
        expected = expected.nan_to_num().transpose(0, 1)  # rows without keys
        torch.testing.assert_close(out[some_q], expected, atol=2e-5, rtol=0)


def test_rows_behind_the_last_sequence_are_neither_read_nor_written(device):
    """The padding of a captured batch: what the docstring says of rows from cu_seqlens_q[-1] on."""
    with torch.device(device):
        args = make_case([5, 9], [8, 9])
    expected = declared.backends["triton"].run(**args)
    padding = torch.full_like(args["q"][:3], float("nan"))
    padded = args | {"q": torch.cat([args["q"], padding])}
    with contract.poisoned():
        got = declared.backends["triton"].run(**padded)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g[:14], e)
        assert g[14:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_are_zeros(device, backend):
    with torch.device(device):
        args = make_case([2, 5], [0, 3])
    out, lse = run("varlen_attention", backend, args)
    assert not out[:4].any()
    assert torch.isneginf(lse[:4]).all()
    assert_right((out, lse), args)
    assert_right(run("varlen_attention", backend, {**args, "causal": False}), {**args, "causal": False})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1, 5.0])
def test_any_scale(device, backend, scale):
    """Also scales that reverse the order of the logits, or make all of them equal."""
    with torch.device(device):
        args = {**make_case([40], [70], 2, 1, 48, 16, dtype=torch.float32), "scale": scale}
    assert_right(run("varlen_attention", backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_beyond_a_sequence_is_used(device, backend):
    """Neither keys nor values of the sequences before and behind it: the former would win, the latter are NaN."""
    with torch.device(device):
        args = make_case([3, 33, 3], [40, 45, 40])
    clean, _ = run("varlen_attention", backend, args)
    for other in (slice(0, 40), slice(85, 125)):
        args["k"][other], args["v"][other] = 100, float("nan")
    out, lse = run("varlen_attention", backend, args)
    assert torch.equal(out[3:36], clean[3:36])
    assert lse.isfinite().all()
    assert out[:3].isnan().all()


def test_the_reference_in_small_blocks(device, monkeypatch):
    with torch.device(device):
        args = make_case([40, 9], [70, 30], dtype=torch.float32)
    monkeypatch.setattr(__import__(declared.reference.__module__, fromlist=["*"]), "QUERIES_AT_ONCE", 1)
    assert_right(declared.reference(**args), args)


def launch(args, **changes):
    """The Triton kernel with other settings than the machine's."""
    from wave64.triton_ops import varlen_attention as kernels

    config = dataclasses.replace(kernels.TUNING.choose(**kernels.key(**args)), **changes)
    return kernels.launch(**args, config=config)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16)])
def test_blocks_of_any_shape(device, block_m, block_n):
    with torch.device(device):
        args = make_case([100, 3], [130, 60])
    assert_right(launch(args, block_m=block_m, block_n=block_n), args)


def test_weights_rounded_half_up(device):
    """How weights become bf16 on a GPU that has no instruction for it: as near, and no other for a single key."""
    with torch.device(device):
        args = make_case([40, 1], [70, 1])
    assert_right(launch(args, half_up=True), args)
    assert torch.equal(launch(args, half_up=True)[0][40], args["v"][70].repeat_interleave(2, 0))


def test_cost_counts_the_pairs_that_are_seen():
    args = make_case([3, 5, 2], [7, 3, 0], heads=1, kv_heads=1, qk_dim=8, v_dim=4)
    assert cost(**args).flops == 2 * (8 + 4) * (5 + 6 + 7 + 1 + 2 + 3)
    assert cost(**{**args, "causal": False}).flops == 2 * (8 + 4) * (3 * 7 + 5 * 3)
    assert cost(**args).bytes == 2 * (8 + 4) * (10 + 10) + 4 * 10


def test_triton_declines_wide_heads():
    from wave64.triton_ops.varlen_attention import unsupported

    declined = {case.id for case in cases() if not case.large and unsupported(**case.make())}
    assert declined == {"latent"}


def bad(**changes):
    args = make_case([9, 2], [20, 2])
    return {**args, **{name: change(args) for name, change in changes.items()}}


@pytest.mark.parametrize(("argument", "change", "words"), [
    ("q", lambda a: a["q"][0], "[tokens, heads, head_dim]"),
    ("q", lambda a: a["q"].transpose(1, 2).contiguous().transpose(1, 2), "contiguous last dimension"),
    ("q", lambda a: a["q"].to(torch.int32), "bf16, fp16 or fp32"),
    ("q", lambda a: a["q"][:, :3], "multiple of k's 2 heads"),
    ("q", lambda a: a["q"][1:], "cu_seqlens_q: expected running sums from 0 to 10, the tokens of q"),
    ("k", lambda a: a["k"].half(), "that of q"),
    ("k", lambda a: a["k"][..., :32], "heads as wide as those of q"),
    ("k", lambda a: a["k"].transpose(1, 2).contiguous().transpose(1, 2), "contiguous last dimension"),
    ("k", lambda a: a["k"].to("meta"), "on cpu, where q is"),
    ("v", lambda a: a["v"].float(), "that of q"),
    ("v", lambda a: a["v"][:, :1], "the tokens and heads of k"),
    ("v", lambda a: a["v"][1:], "the tokens and heads of k"),
    ("v", lambda a: a["v"][..., 0], "[tokens, heads, head_dim]"),
    ("cu_seqlens_q", lambda a: a["cu_seqlens_q"].long(), "contiguous int32 [num_seqs + 1]"),
    ("cu_seqlens_q", lambda a: a["cu_seqlens_q"][:0], "contiguous int32 [num_seqs + 1]"),
    ("cu_seqlens_q", lambda a: torch.tensor([0, 12, 11], dtype=torch.int32), "running sums from 0 to 11"),
    ("cu_seqlens_k", lambda a: a["cu_seqlens_k"][:-1], "a number for each of cu_seqlens_q"),
    ("cu_seqlens_k", lambda a: a["cu_seqlens_k"] + 1, "running sums from 0 to 22, the tokens of k"),
    ("cu_seqlens_k", lambda a: a["cu_seqlens_k"].to("meta"), "on cpu, where q is"),
    ("max_seqlen_q", lambda a: 8, "at least 9, the longest of cu_seqlens_q"),
    ("max_seqlen_k", lambda a: 19, "at least 20, the longest of cu_seqlens_k"),
])
def test_refuses(argument, change, words):
    with refused("varlen_attention", "", words):
        ops.varlen_attention(**bad(**{argument: change}))
