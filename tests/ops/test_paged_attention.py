"""paged_attention against a loop over heads and keys, in fp64 and in other words than the reference's."""

import dataclasses
import random

import pytest
import torch
from helpers import CPU_BACKENDS, on, refused
from helpers_attention import assert_near, attend_one, drawn, groups, key_of, run, shapes
from hypothesis import given, note, settings
from hypothesis import strategies as st

from wave64 import ops, platform
from wave64.op import BadArgument
from wave64.ops.paged_attention import make_case
from wave64.quant import fp8_dtype


def naive(query, key_cache, value_cache, page_table, seq_lens, scale, sliding_window=-1, logit_cap=0.0, sinks=None,
          k_scale=None, v_scale=None):
    group = query.shape[1] // key_cache.shape[2]
    rows = []
    for b, length in enumerate(seq_lens.tolist()):
        seen = [p for p in range(length) if sliding_window <= 0 or p >= length - sliding_window]
        for kv_head in range(key_cache.shape[2]):
            keys = [key_of(key_cache, page_table[b], p, kv_head, k_scale) for p in seen]
            values = [key_of(value_cache, page_table[b], p, kv_head, v_scale) for p in seen]
            for h in range(kv_head * group, (kv_head + 1) * group):
                sink = None if sinks is None else sinks[h]
                rows.append(attend_one(query[b, h], keys, values, scale, logit_cap, sink)[0])
    return torch.stack(rows).view(query.shape) if rows else query.double()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@given(options=shapes, group=groups, seq_lens=st.lists(st.integers(0, 70), min_size=1, max_size=4))
@drawn
def test_equals_a_loop_over_keys(device, backend, options, group, seq_lens):
    with torch.device(device):
        args = make_case(seq_lens, heads=group * options["kv_heads"], **options)
    assert_near(run("paged_attention", backend, args), naive(**on("cpu", args)), args)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 120, 128, 192, 256])
@given(seed=st.integers(0, 2**32))
@settings(drawn, max_examples=3)
def test_serves_what_models_ask_for(device, head_dim, seed):
    """Their head sizes, page sizes and ratios and those between, over many pages and several parts of a sequence.

    Hypothesis draws the seed alone: three examples of its own making are much alike, and the same for each head_dim."""
    rng = random.Random(f"{head_dim} {seed}")
    group = rng.randint(1, rng.choice([8, 32]))
    kv_heads = 1 if group > 8 else rng.randint(1, 3)  # the loop compared with is slow
    seq_lens = [rng.randint(0, 300) for _ in range(1 if group > 16 else rng.randint(1, 3))]
    options = dict(heads=group * kv_heads, kv_heads=kv_heads, page_size=rng.choice([1, 16, 32, 64, 128]),
                   dtype=rng.choice([torch.bfloat16, torch.float16]), fp8=rng.random() < 0.4, sinks=rng.random() < 0.4,
                   sliding_window=rng.choice([-1, -1, 1, 16, 77, 250]), logit_cap=rng.choice([0.0, 0.0, 1.0, 50.0]))
    note(f"{seq_lens} {options}")
    with torch.device(device):
        args = make_case(seq_lens, head_dim=head_dim, **options)
    assert_near(run("paged_attention", "triton", args), naive(**on("cpu", args)), args)


def launch(args, keys_per_split=0, **changes):
    """The Triton kernel with other settings than the machine's."""
    from wave64.triton_ops import paged_attention as kernels

    config = dataclasses.replace(kernels.TUNING.choose(**kernels.key(**args)), **changes)
    rest = {"sliding_window": -1, "logit_cap": 0.0, "sinks": None, "k_scale": None, "v_scale": None}
    return kernels.launch(**{**rest, **args}, config=config, keys_per_split=keys_per_split)


@pytest.mark.parametrize(("seq_lens", "keys_per_split", "window"), [
    ([0, 130, 31, 65], 32, -1), ([200, 50], 70, 90), ([900], 32, -1)])  # the last: more splits than merge in one step
def test_a_fixed_split_makes_a_result_independent_of_its_batch(device, seq_lens, keys_per_split, window):
    with torch.device(device):
        args = make_case(seq_lens, heads=8, kv_heads=1, sliding_window=window, dtype=torch.float32)
    together = launch(args, keys_per_split=keys_per_split)
    for b in range(len(seq_lens)):
        alone = {k: v[b:b + 1] if k in ("query", "page_table", "seq_lens") else v for k, v in args.items()}
        assert torch.equal(launch(alone, keys_per_split=keys_per_split)[0], together[b])
    assert_near(together, naive(**on("cpu", args)), args)


@pytest.mark.parametrize("programs", [1, 9, 64])
def test_programs_find_their_split_beyond_one_block_of_lengths(device, programs):
    with torch.device(device):
        args = make_case([3, 0, 70, 1, 0, 33, 150, 0], heads=1, kv_heads=1, head_dim=8)
    assert_near(launch(args, block_b=2, programs=programs), naive(**on("cpu", args)), args)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_pages_beyond_two_gib(device, backend):
    """Offsets in the pool need 33 bits. Memory that is never touched costs nothing on a CPU."""
    page_size, kv_heads, head_dim = 16, 2, 64
    with torch.device(device):
        args = make_case([37, 20], kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, fp8=True)
        pages = 2**31 // (page_size * kv_heads * head_dim) + 8
        pool = torch.empty(pages, page_size, kv_heads, head_dim, dtype=fp8_dtype())
    used = sorted({int(p) for row, n in zip(args["page_table"], args["seq_lens"], strict=True)
                   for p in row[:-(-int(n) // page_size)]})
    last = {page: pages - 1 - i for i, page in enumerate(used)}
    for page, target in last.items():
        pool[target] = args["key_cache"][page]
    moved = args["page_table"].clone().cpu().apply_(lambda page: last.get(page, page)).to(device)
    far = {**args, "key_cache": pool, "value_cache": pool, "page_table": moved}
    near = {**args, "value_cache": args["key_cache"]}
    assert torch.equal(run("paged_attention", backend, far), run("paged_attention", backend, near))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_heads_before_pages(device, backend):
    """A pool whose strides are not those of its shape."""
    with torch.device(device):
        args = make_case([37, 20], kv_heads=2)
    expected = run("paged_attention", backend, args)
    for name in ("key_cache", "value_cache"):
        args[name] = args[name].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert torch.equal(run("paged_attention", backend, args), expected)


def bad(**changes):
    args = make_case([37, 4], heads=4, kv_heads=2)
    return {**args, **{name: change(args) for name, change in changes.items()}}


@pytest.mark.parametrize(("argument", "change", "words"), [
    ("query", lambda a: a["query"][0], "num_heads, head_dim"),
    ("query", lambda a: a["query"].transpose(1, 2).contiguous().transpose(1, 2), "contiguous last dimension"),
    ("query", lambda a: a["query"].to(torch.int32), "bf16, fp16 or fp32"),
    ("query", lambda a: a["query"][:, :3], "multiple of key_cache's 2 heads"),
    ("query", lambda a: a["query"][:1], "one token per sequence"),
    ("key_cache", lambda a: a["key_cache"].half(), "that of query, or FP8"),
    ("key_cache", lambda a: a["key_cache"][..., :32], "[num_pages, page_size, num_kv_heads, 64]"),
    ("value_cache", lambda a: a["value_cache"][1:], "as key_cache"),
    ("page_table", lambda a: a["page_table"].long(), "int32 [2, max_pages]"),
    ("page_table", lambda a: a["page_table"][:, :2], "capacity for 37 tokens"),
    ("seq_lens", lambda a: a["seq_lens"].long(), "int32 [num_seqs]"),
    ("seq_lens", lambda a: a["seq_lens"].to("meta"), "on cpu, where query is"),
    ("sinks", lambda a: torch.zeros(2), "one logit per head"),
    ("k_scale", lambda a: torch.ones(3), "one per head, [2]"),
])
def test_refuses(argument, change, words):
    with refused("paged_attention", "", words):
        ops.paged_attention(**bad(**{argument: change}))


@pytest.mark.parametrize(("arch", "right", "wrong"), [
    ("gfx942", torch.float8_e4m3fnuz, torch.float8_e4m3fn), ("gfx950", torch.float8_e4m3fn, torch.float8_e4m3fnuz)])
def test_refuses_fp8_of_another_architecture(arch, right, wrong):
    with torch.device("meta"):
        args = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in bad().items()}
    with platform.target(arch):
        for dtype in (right, wrong):
            args.update(key_cache=args["key_cache"].to(dtype), value_cache=args["value_cache"].to(dtype))
            if dtype == right:
                ops.paged_attention.check(**args)
            else:
                with pytest.raises(BadArgument, match=f"{right}, the FP8 type of {arch}"):
                    ops.paged_attention.check(**args)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scales_count_whatever_the_dtype_of_the_cache(device, backend):
    """Of both kinds in one call: one number for all heads, and one per head."""
    with torch.device(device):
        args = make_case([37, 5]) | dict(k_scale=torch.tensor(0.5), v_scale=torch.tensor([2.0, 0.25]))
    assert_near(run("paged_attention", backend, args), naive(**on("cpu", args)), args)
