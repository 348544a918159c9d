"""paged_attention against a loop over heads and keys, in fp64 and in other words than the reference's."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from wave64 import OPS, ops, platform
from wave64.op import BadArgument
from wave64.ops.paged_attention import make_case
from wave64.quant import fp8_dtype

BACKENDS = ("reference", "triton")
ALL_BACKENDS = BACKENDS if torch.cuda.is_available() else (*BACKENDS, "cpu")
#: Weights and results are rounded to the dtype, once each, and neither is above 1 (relative to the largest value).
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
#: Few and not shrunk: under the interpreter an example takes half a second.
drawn = settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


def key_of(cache, table, position, head, scale=None):
    """One key (or value) of one sequence, in fp64."""
    page_size = cache.shape[1]
    stored = cache[int(table[position // page_size]), position % page_size, head].double()
    return stored if scale is None else stored * float(scale)


def attend_one(query, keys, values, scale, logit_cap=0.0, sink=None):
    """softmax over lists of keys and values for one head of one token: (result, log of the sum of exponentials)."""
    logits = [scale * float(query.double() @ key) for key in keys]
    if logit_cap:
        logits = [logit_cap * math.tanh(x / logit_cap) for x in logits]
    everything = logits if sink is None else [*logits, float(sink)]
    if not everything:
        return torch.zeros_like(query, dtype=torch.float64), -math.inf
    top = max(everything)
    total = math.fsum(math.exp(x - top) for x in everything)
    mixed = torch.zeros_like(query, dtype=torch.float64)
    for x, value in zip(logits, values, strict=True):
        mixed += math.exp(x - top) / total * value
    return mixed, top + math.log(total)


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


def on_cpu(args):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def run(op, backend, args):
    declared = OPS[op].backends[backend]
    reason = declared.supports(**args) if declared.supports else None
    assert reason is None
    return declared.run(**args)


def assert_near(got, exact, args):
    """Errors are relative to the largest value that there is to mix."""
    largest = float(args["value_cache"].float().nan_to_num().abs().max())
    if args.get("v_scale") is not None:
        largest *= float(args["v_scale"])
    assert got.isfinite().all()
    torch.testing.assert_close(got.cpu().double(), exact, atol=TOLERANCE[got.dtype] * largest, rtol=0)


shapes = st.fixed_dictionaries(dict(
    kv_heads=st.integers(1, 3), head_dim=st.sampled_from([8, 16, 24, 33, 64, 80]),
    page_size=st.sampled_from([1, 3, 16, 64]), dtype=st.sampled_from(list(TOLERANCE)), sinks=st.booleans(),
    fp8=st.booleans(), sliding_window=st.sampled_from([-1, -1, 1, 5, 33]),
    logit_cap=st.sampled_from([0.0, 0.0, 2.0, 30.0])))
groups = st.sampled_from([1, 2, 3, 4, 7])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@given(options=shapes, group=groups, seq_lens=st.lists(st.integers(0, 70), min_size=1, max_size=4))
@drawn
def test_equals_a_loop_over_keys(device, backend, options, group, seq_lens):
    with torch.device(device):
        args = make_case(seq_lens, heads=group * options["kv_heads"], **options)
    assert_near(run("paged_attention", backend, args), naive(**on_cpu(args)), args)


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
    assert_near(run("paged_attention", "triton", args), naive(**on_cpu(args)), args)


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
    assert_near(together, naive(**on_cpu(args)), args)


@pytest.mark.parametrize("programs", [1, 9, 64])
def test_programs_find_their_share_beyond_one_block_of_lengths(device, programs):
    with torch.device(device):
        args = make_case([3, 0, 70, 1, 0, 33, 150, 0], heads=1, kv_heads=1, head_dim=8)
    assert_near(launch(args, block_b=2, programs=programs), naive(**on_cpu(args)), args)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
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
    for page, place in last.items():
        pool[place] = args["key_cache"][page]
    moved = args["page_table"].clone().cpu().apply_(lambda page: last.get(page, page)).to(device)
    far = {**args, "key_cache": pool, "value_cache": pool, "page_table": moved}
    near = {**args, "value_cache": args["key_cache"]}
    assert torch.equal(run("paged_attention", backend, far), run("paged_attention", backend, near))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
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
    ("k_scale", lambda a: torch.ones(2), "one fp32 number"),
])
def test_refuses(argument, change, words):
    with pytest.raises(BadArgument) as refusal:
        ops.paged_attention(**bad(**{argument: change}))
    assert str(refusal.value).startswith("paged_attention: ")
    assert words in str(refusal.value)


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
