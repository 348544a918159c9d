"""prefill_attention against a loop over tokens, heads and keys, in fp64 and in other words than the reference's."""

import dataclasses
import math
import sys

import pytest
import torch
from helpers import CPU_BACKENDS, on, refused
from helpers_attention import assert_near, attend_one, drawn, groups, key_of, run, shapes
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops, platform
from wave64.backends import import_hopper_kernels
from wave64.op import Case
from wave64.ops import prefill_attention as declared
from wave64.ops.prefill_attention import make_prefill
from wave64.testing import contract


def naive(query, key_cache, value_cache, page_table, cu_seqlens_q, seq_lens, max_seqlen_q, scale, causal=True,
          sliding_window=-1, logit_cap=0.0, sinks=None, k_scale=None, v_scale=None):
    heads, group = query.shape[1], query.shape[1] // key_cache.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float64)
    starts = cu_seqlens_q.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        for t in range(starts[i], starts[i + 1]):
            position = length - (starts[i + 1] - t)
            seen = [p for p in range(length) if (not causal or p <= position)
                    and (sliding_window <= 0 or p > position - sliding_window)]
            for h in range(heads):
                keys = [key_of(key_cache, page_table[i], p, h // group, k_scale) for p in seen]
                values = [key_of(value_cache, page_table[i], p, h // group, v_scale) for p in seen]
                sink = None if sinks is None else sinks[h]
                out[t, h], lse[t, h] = attend_one(query[t, h], keys, values, scale, logit_cap, sink)
    return out, lse


def assert_right(got, args):
    out, lse = got
    exact, exact_lse = naive(**on("cpu", args))
    assert_near(out, exact, args)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.cpu().double(), exact_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@given(options=shapes, group=groups, causal=st.booleans(),
       lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50)), min_size=1, max_size=3))
@drawn
def test_equals_a_loop_over_keys(device, backend, options, group, causal, lengths):
    with torch.device(device):
        args = make_prefill([new for new, _ in lengths], [new + before for new, before in lengths],
                            heads=group * options["kv_heads"], causal=causal, **options)
    assert_right(run("prefill_attention", backend, args), args)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("new", "length", "window"), [(70, 70, -1), (40, 100, -1), (70, 100, 20), (100, 100, 64)])
def test_several_blocks_of_queries(device, backend, new, length, window):
    with torch.device(device):
        args = make_prefill([new], [length], heads=2, kv_heads=1, head_dim=16, sliding_window=window)
    assert_right(run("prefill_attention", backend, args), args)


def test_rows_behind_the_last_sequence_are_neither_read_nor_written(device):
    """The padding of a captured batch: what the docstring says of rows from cu_seqlens_q[-1] on."""
    with torch.device(device):
        args = make_prefill([5, 9], [8, 9])
    expected = declared.backends["triton"].run(**args)
    padding = torch.full_like(args["query"][:3], float("nan"))
    padded = args | {"query": torch.cat([args["query"], padding])}
    with contract.poisoned():
        got = declared.backends["triton"].run(**padded)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g[:14], e)
        assert g[14:].isnan().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_queries_without_keys_are_zeros(device, backend):
    """A row of padding (no length), and more new tokens than the sequence is long."""
    with torch.device(device):
        args = make_prefill([2, 5, 3], [0, 3, 3])
        sinks = torch.randn(4)
    out, lse = run("prefill_attention", backend, args)
    assert_right((out, lse), args)
    assert not out[:4].any()
    assert torch.isneginf(lse[:4]).all()
    assert_right(run("prefill_attention", backend, {**args, "sinks": sinks}), {**args, "sinks": sinks})


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_capped_logits_are_accurate(device, backend):
    """Of a single key lse is the logit itself: from the smallest to those at the cap."""
    with torch.device(device):
        args = make_prefill([60], [60], kv_heads=1, sliding_window=1, logit_cap=30.0, dtype=torch.float32)
        args["query"] *= torch.logspace(-3, 1, 60)[:, None, None]
    lse = run("prefill_attention", backend, args)[1]
    exact = naive(**on("cpu", args))[1]
    torch.testing.assert_close(lse.cpu().double(), exact, atol=5e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("scale", "k_scale"), [(-0.3, None), (0.0, None), (1, None), (0.2, -1.5), (-0.2, -1.5)])
def test_any_scale(device, backend, scale, k_scale):
    """Also scales that reverse the order of the logits, or make all of them equal."""
    with torch.device(device):
        args = {**make_prefill([40], [70], dtype=torch.float32, fp8=k_scale is not None), "scale": scale}
        if k_scale is not None:
            args["k_scale"] = torch.tensor([k_scale])
    assert_right(run("prefill_attention", backend, args), args)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_keys_and_values_in_different_layouts(device, backend):
    with torch.device(device):
        args = make_prefill([30, 5], [70, 5])
    expected = run("prefill_attention", backend, args)
    args["value_cache"] = args["value_cache"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert torch.equal(run("prefill_attention", backend, args)[0], expected[0])


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize(("changes", "window"), [
    (dict(block_m=16, block_n=64), -1), (dict(block_m=64, block_n=16), 50), (dict(half_up=True), 40)])
def test_launch_settings(device, page_size, changes, window):
    """The Triton kernel with other settings than the machine's: several pages to a block of keys, several blocks to a
    page, and weights rounded as where a GPU has no instruction for it."""
    from wave64.triton_ops import prefill_attention as kernels

    with torch.device(device):
        args = make_prefill([90, 3], [130, 60], heads=2, kv_heads=1, page_size=page_size, sliding_window=window)
    config = dataclasses.replace(kernels.TUNING.choose(**kernels.key(**args)), **changes)
    rest = dict(causal=True, logit_cap=0.0, sinks=None, k_scale=None, v_scale=None)
    assert_right(kernels.launch(**{**rest, **args}, config=config), args)


@pytest.mark.skipif(platform.arch() is None or platform.arch().matrix != "wgmma", reason="a kernel for Hopper")
@pytest.mark.parametrize(("new", "lengths", "options"), [
    ([300], [300], {}), ([1, 129, 64, 257], [200, 129, 1000, 257], {}), ([128, 256], [128, 384], dict(page_size=128)),
    ([300, 0, 77], [333, 5, 77], dict(page_size=8)), ([260], [2000], dict(page_size=256)),
    ([300, 2], [500, 900], dict(causal=False)), ([2, 300, 5], [0, 300, 3], {}),
    ([500, 100], [500, 1300], dict(dtype=torch.float16, heads=6, kv_heads=6)),
    ([700, 20], [3000, 1500], dict(heads=32, kv_heads=8, page_size=64))])
def test_hoppers_own_kernel_keeps_the_contract(device, new, lengths, options):
    """Edges of tiles and blocks, pages in a block and blocks in a page, sequences without new tokens or keys, and more
    tiles than programs. Not declined: the bound below which triton is faster is no bound of the kernel."""
    assert import_hopper_kernels() is None
    case = Case("drawn", lambda: make_prefill(new, lengths, **{**dict(head_dim=128), **options}))
    contract.verify(ops.prefill_attention, "hopper", case, device)


@pytest.mark.parametrize(("backend", "bounds"), [("reference", ["QUERIES_AT_ONCE"]),
                                                 ("cpu", ["KEYS_AT_ONCE", "SCORES_AT_ONCE"])])
def test_small_blocks(monkeypatch, backend, bounds):
    """Blocks of keys and queries much smaller than the sequence give what one block gives."""
    args = make_prefill([40, 9], [90, 30], sinks=True, sliding_window=60, dtype=torch.float32)
    run = declared.backends[backend].run
    for bound in bounds:
        monkeypatch.setattr(sys.modules[run.__module__], bound, 1)
    assert_right(run(**args), args)


def test_chunks_give_what_the_whole_gives(device):
    """Chunked prefill over a growing cache, token for token."""
    with torch.device(device):
        args = make_prefill([23], [23], dtype=torch.float32)
    whole, _ = ops.prefill_attention(**args)
    for chunk in (1, 2, 7, 22):
        for start in range(0, 23, chunk):
            end = min(start + chunk, 23)
            part = {**args, "query": args["query"][start:end], "max_seqlen_q": chunk,
                    "cu_seqlens_q": torch.tensor([0, end - start], dtype=torch.int32, device=device),
                    "seq_lens": torch.tensor([end], dtype=torch.int32, device=device)}
            torch.testing.assert_close(ops.prefill_attention(**part)[0], whole[start:end], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("argument", "change", "words"), [
    ("query", lambda a: a["query"][:-1], "running sums from 0 to"),
    ("query", lambda a: a["query"].double().long(), "bf16, fp16 or fp32"),
    ("cu_seqlens_q", lambda a: a["cu_seqlens_q"][:-1], "contiguous int32 [3]"),
    ("cu_seqlens_q", lambda a: a["cu_seqlens_q"].long(), "contiguous int32 [3]"),
    ("max_seqlen_q", lambda a: 8, "at least 9"),
    ("page_table", lambda a: a["page_table"][:, :1], "capacity for 20 tokens"),
    ("key_cache", lambda a: a["key_cache"].float(), "that of query, or FP8"),
])
def test_refuses(argument, change, words):
    args = make_prefill([9, 2], [20, 2])
    args[argument] = change(args)
    with refused("prefill_attention", "", words):
        ops.prefill_attention(**args)
