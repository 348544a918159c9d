"""mla_decode against a loop over sequences and keys, in fp64 and in other words than the reference's."""

import contextlib
import dataclasses
import random

import pytest
import torch
from helpers import BACKENDS, on, refused
from helpers_attention import HEADS, STRIDED, attend_over, draw_options, drawn, latent_of, moved_far, near, run
from hypothesis import given, note, settings
from hypothesis import strategies as st

from wave64 import ops, platform
from wave64.arch import lookup
from wave64.op import BadArgument
from wave64.ops.mla_decode import make_case
from wave64.quant import FP8, fp8_dtype


def naive(q, kv_cache, page_table, seq_lens, scale, kv_lora_rank, kv_scale=None):
    tokens = q if q.ndim == 4 else q.unsqueeze(1)
    outs, sums = [], []
    for b, length in enumerate(seq_lens.tolist()):
        latents = [latent_of(kv_cache, page_table[b], p, kv_scale) for p in range(length)]
        for j in range(tokens.shape[1]):
            newer = tokens.shape[1] - 1 - j
            out, lse = attend_over(tokens[b, j], latents[:max(0, length - newer)], scale, kv_lora_rank)
            outs.append(out)
            sums.append(lse)
    return torch.stack(outs).view(*q.shape[:-1], kv_lora_rank), torch.stack(sums).view(q.shape[:-1])


def assert_right(got, args):
    out, lse = got
    exact, exact_lse = naive(**on("cpu", args))
    near(out, exact, args["kv_cache"], args["kv_scale"])
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.cpu().double(), exact_lse, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
@given(seed=st.integers(0, 2**32))
@settings(drawn, max_examples=2)
def test_equals_a_loop_over_keys(device, backend, heads, seed):
    """Hypothesis draws the seed alone: few examples of its own making are much alike."""
    rng = random.Random(f"{heads} {seed}")
    options = draw_options(rng, heads) | dict(rope=rng.choice([1, 5, 8, 16, 33, 64]))  # nothing is rotated here
    note(f"{options}")
    with torch.device(device):
        args = make_case(**options)
    assert_right(run("mla_decode", backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [
    dict(seq_lens=[130, 3], heads=16, page_size=64), dict(seq_lens=[50], heads=20, page_size=1, fp8=True),
    dict(seq_lens=[15], heads=128, queries=2), dict(seq_lens=[60], heads=2, rope=0, rank=48),
    dict(seq_lens=[15, 7], heads=130, rank=16, rope=4)], ids=str)
def test_serves_what_models_ask_for(device, backend, options):
    """DeepSeek's width with one rank's heads and with all; nothing rotated at all; more heads than any model has."""
    with torch.device(device):
        args = make_case(**options)
    assert_right(run("mla_decode", backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flavor", FP8)
def test_both_flavors_of_fp8(device, backend, flavor):
    if device != "cpu" and fp8_dtype() != FP8[flavor]:
        pytest.skip("the machine's FP8 is the other")
    with torch.device(device):
        args = make_case([70, 9], heads=5, rank=32, rope=8)
    args.update(kv_cache=args["kv_cache"].to(FP8[flavor]), kv_scale=torch.full((1,), 0.37, device=device))
    assert_right(run("mla_decode", backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("largest", [1.0, 100.0])
def test_lse_is_the_logarithm_of_the_sum(device, backend, largest):
    """Where all keys are the same, out is their value and lse their logit + log(how many); exp(100) is beyond fp32."""
    lengths = [200, 1, 64, 33]
    with torch.device(device):
        args = make_case(lengths, heads=3, rank=24, rope=8, dtype=torch.float32)
        latent = torch.randn(32)
        args["kv_cache"][:] = latent
        args["q"] *= largest / (args["scale"] * (args["q"] @ latent).abs().max())
    out, lse = run("mla_decode", backend, args)
    logit = args["scale"] * (args["q"].double() @ latent.double())
    count = torch.tensor(lengths, device=device, dtype=torch.float64)[:, None]
    # A sum of 32 products in fp32, in any order, is at most 32 half units of the sum of their sizes away.
    terms = args["scale"] * (args["q"].abs().double() @ latent.abs().double())
    assert ((lse.double() - logit - count.log()).abs() <= 32 * 2**-24 * terms + 1e-6 * count.log() + 1e-6).all()
    torch.testing.assert_close(out, latent[:24].expand_as(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_does_not_see_newer_tokens(device, backend):
    """The key of the third of four new tokens changes: the first two results do not, by no bit."""
    length, page_size = 37, 16
    with torch.device(device):
        args = make_case([length], heads=5, queries=4, rank=32, rope=8, page_size=page_size)
    before = run("mla_decode", backend, args)
    changed = args["kv_cache"].clone()
    position = length - 4 + 2
    changed[int(args["page_table"][0, position // page_size]), position % page_size] += 1
    after = run("mla_decode", backend, args | dict(kv_cache=changed))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :2], y[:, :2])
        assert (x[:, 2:] != y[:, 2:]).flatten(2).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_tokens_at_once_are_new_tokens_in_turn(device, backend):
    """Query j of Q is what a single query of a sequence Q - 1 - j tokens shorter is."""
    with torch.device(device):
        args = make_case([37, 3, 65], heads=4, queries=3, rank=32, rope=8, dtype=torch.float32)
    together = run("mla_decode", backend, args)
    for j in range(3):
        alone = run("mla_decode", backend, args | dict(q=args["q"][:, j], seq_lens=args["seq_lens"] - (2 - j)))
        for x, y in zip(alone, together, strict=True):
            torch.testing.assert_close(x, y[:, j], atol=2e-5, rtol=0)


def launch(args, keys_per_split=0, arch=None, **changes):
    """The Triton kernel with other settings than the machine's, on results that are NaN where it writes nothing."""
    from wave64.triton_ops import mla_decode as kernels

    q, rank = args["q"], args["kv_lora_rank"]
    out = torch.full((*q.shape[:-1], rank), float("nan"), dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:-1], float("nan"), device=q.device)
    with platform.target(arch.name) if arch else contextlib.nullcontext():
        config = kernels.TUNING.choose(**kernels.key(**args))
    kernels.launch(kernels.call_of(**args), out, lse, dataclasses.replace(config, **changes), keys_per_split)
    return out, lse


@pytest.mark.parametrize(("seq_lens", "keys_per_split", "queries"), [
    ([0, 130, 31, 65], 32, 0), ([200, 50], 40, 2), ([100, 33], 7, 0)])  # the last: more splits than blocks, some empty
def test_a_fixed_split_makes_a_result_independent_of_its_batch(device, seq_lens, keys_per_split, queries):
    with torch.device(device):
        args = make_case(seq_lens, heads=3, queries=queries, rank=32, rope=8, dtype=torch.float32)
    together = launch(args, keys_per_split, programs=4)  # with so few the batch would decide otherwise
    assert_right(together, args)
    for b in range(len(seq_lens)):
        alone = {k: v[b:b + 1] if k in ("q", "page_table", "seq_lens") else v for k, v in args.items()}
        for x, y in zip(launch(alone, keys_per_split, programs=4), together, strict=True):
            assert torch.equal(x[0], y[b])


def test_many_parts_agree_with_one(device):
    """38 parts: more than are put together in one step."""
    with torch.device(device):
        args = make_case([600], heads=2, rank=24, rope=8, dtype=torch.float32)
    many, one = launch(args, 16), launch(args, 10**6)
    assert not torch.equal(many[0], one[0])
    for x, y in zip(many, one, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    assert_right(one, args)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("heads", [5, 20, 70])
def test_either_operand_may_hold_the_rows(device, swap, heads):
    """Also where rows are split among several programs; no machine's table chooses one way for every head count."""
    with torch.device(device):
        args = make_case([31, 3] if heads < 70 else [15], heads=heads, rank=24, rope=8)
    assert_right(launch(args, swap=swap, bands=0, block_h=32), args)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1201"])
@pytest.mark.parametrize("options", [
    dict(seq_lens=[70, 3], heads=5), dict(seq_lens=[130], heads=3, queries=3, fp8=True),
    dict(seq_lens=[40], heads=20, rank=37, rope=9, page_size=64)], ids=str)
def test_as_configured_for_another_architecture(device, arch, options):
    """What its configuration means; tests/gfx942 has what is made of it."""
    if device != "cpu":
        pytest.skip("its compiler's options are for that architecture")
    args = make_case(**(dict(rank=32, rope=8) | options))
    assert_right(launch(args, arch=lookup(arch)), args)


@pytest.mark.parametrize("programs", [1, 20])
def test_programs_find_their_split_beyond_one_block_of_lengths(device, programs):
    with torch.device(device):
        args = make_case([3, 0, 70, 1, 0, 33, 150, 0], heads=1, rank=16, rope=8)
    assert_right(launch(args, block_b=2, programs=programs), args)


@pytest.mark.parametrize(("count", "longest"), [(33, 100), pytest.param(258, 7, marks=pytest.mark.long)])
def test_many_sequences(device, count, longest):
    """Lengths are looked at in blocks of 32, 256, and 256 again and again: as the test above has it, of fewer."""
    seq_lens = [7 * i % (longest + 1) for i in range(count)]
    with torch.device(device):
        args = make_case(seq_lens, heads=1, rank=16, rope=8)
    assert_right(run("mla_decode", "triton", args), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_beyond_two_gib(device, backend):
    """Offsets in the pool need 33 bits. Memory that is never touched costs nothing on a CPU."""
    page_size, rank, rope = 16, 64, 16
    with torch.device(device):
        near_by = make_case([37, 20], heads=4, rank=rank, rope=rope, page_size=page_size, fp8=True)
    far = {**near_by, **moved_far(near_by, page_size)}
    for x, y in zip(run("mla_decode", backend, far), run("mla_decode", backend, near_by), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("fp8", [False, True])
def test_strided_pools(device, backend, layout, fp8):
    with torch.device(device):
        args = make_case([37, 20], heads=4, rank=32, rope=8, fp8=fp8)
    expected = run("mla_decode", backend, args)
    stored = args["kv_cache"].view(torch.uint8) if fp8 else args["kv_cache"]  # torch does not put FP8 side by side
    args["kv_cache"] = STRIDED[layout](stored).view(args["kv_cache"].dtype)
    assert not args["kv_cache"].is_contiguous()
    for x, y in zip(run("mla_decode", backend, args), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_queries_and_tables(device, backend):
    """Heads before tokens, and a table that is part of a wider one."""
    with torch.device(device):
        args = make_case([37, 20], heads=4, queries=2, rank=32, rope=8)
    expected = run("mla_decode", backend, args)
    args["q"] = args["q"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    args["page_table"] = torch.cat([args["page_table"], args["page_table"] + 1], 1)[:, :args["page_table"].shape[1]]
    for x, y in zip(run("mla_decode", backend, args), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [dict(), dict(queries=2, fp8=True), dict(seq_lens=[])])
def test_torch_op(device, options):
    with torch.device(device):
        args = make_case(**(dict(seq_lens=[37, 20], heads=4, rank=32, rope=8) | options))
    for x, y in zip(torch.ops.wave64.mla_decode(**args), ops.mla_decode(**args), strict=True):
        assert torch.equal(x, y)
        assert x.is_contiguous()


def test_triton_declines_what_it_cannot_keep_in_registers(device):
    supports = ops.mla_decode.backends["triton"].supports
    with torch.device(device):
        assert "at most 512" in str(supports(**make_case([3], heads=1, rank=513)))
        assert "float64" in str(supports(**make_case([3], heads=1, rank=16, dtype=torch.float64)))
        args = make_case([37, 3], heads=2, rank=600, rope=10)
    assert_right(run("mla_decode", "reference", args), args)


def bad(**changes):
    args = make_case([37, 4], heads=4, rank=32, rope=8)
    return {**args, **{name: change(args) for name, change in changes.items()}}


@pytest.mark.parametrize(("argument", "change", "words"), [
    ("q", lambda a: a["q"][0], "[num_seqs, num_heads, width]"),
    ("q", lambda a: a["q"][None, None], "[num_seqs, new_tokens, num_heads, width]"),
    ("q", lambda a: a["q"].transpose(1, 2).contiguous().transpose(1, 2), "contiguous last dimension"),
    ("q", lambda a: a["q"].to(torch.int32), "bf16, fp16 or fp32"),
    ("q", lambda a: a["q"].to(torch.float8_e4m3fn), "bf16, fp16 or fp32"),
    ("q", lambda a: a["q"][:, :0], "at least one head"),
    ("kv_cache", lambda a: a["kv_cache"][0], "[num_pages, page_size, 40]"),
    ("kv_cache", lambda a: a["kv_cache"][..., :39], "[num_pages, page_size, 40]"),
    ("kv_cache", lambda a: a["kv_cache"].transpose(1, 2).contiguous().transpose(1, 2), "contiguous last dimension"),
    ("kv_cache", lambda a: a["kv_cache"].half(), "that of the queries, or FP8"),
    ("kv_cache", lambda a: a["kv_cache"].to(torch.float8_e5m2), "that of the queries, or FP8"),
    ("kv_cache", lambda a: a["kv_cache"].to("meta"), "on cpu, where q"),
    ("page_table", lambda a: a["page_table"][0], "int32 [2, max_pages]"),
    ("page_table", lambda a: a["page_table"][:1], "int32 [2, max_pages]"),
    ("page_table", lambda a: a["page_table"].long(), "int32 [2, max_pages]"),
    ("page_table", lambda a: a["page_table"].T.contiguous().T, "contiguous last dimension"),
    ("page_table", lambda a: a["page_table"][:, :2], "capacity for 37 tokens"),
    ("page_table", lambda a: a["page_table"].to("meta"), "on cpu, where q"),
    ("seq_lens", lambda a: a["seq_lens"].long(), "int32 [2]"),
    ("seq_lens", lambda a: a["seq_lens"][:1], "int32 [2]"),
    ("seq_lens", lambda a: a["seq_lens"][:, None], "int32 [2]"),
    ("seq_lens", lambda a: a["seq_lens"].repeat_interleave(2)[::2], "contiguous"),
    ("seq_lens", lambda a: a["seq_lens"].to("meta"), "on cpu, where q"),
    ("kv_lora_rank", lambda a: 0, "from 1 to 40"),
    ("kv_lora_rank", lambda a: -1, "from 1 to 40"),
    ("kv_lora_rank", lambda a: 41, "from 1 to 40"),
    ("kv_scale", lambda a: torch.ones(2), "one fp32 number"),
    ("kv_scale", lambda a: torch.ones(1).double(), "one fp32 number"),
    ("kv_scale", lambda a: torch.ones(1, device="meta"), "on cpu, where q"),
])
def test_refuses(argument, change, words):
    with refused("mla_decode", argument, words):
        ops.mla_decode(**bad(**{argument: change}))


def test_refuses_a_pool_without_pages_for_keys():
    with pytest.raises(BadArgument, match="page_table: expected capacity for 37 tokens.* in 0 pages"):
        ops.mla_decode(**bad(kv_cache=lambda a: a["kv_cache"][:0]))


@pytest.mark.parametrize(("arch", "right", "wrong"), [
    ("gfx942", "e4m3fnuz", "e4m3fn"), ("gfx950", "e4m3fn", "e4m3fnuz")])
def test_refuses_fp8_of_another_architecture(arch, right, wrong):
    with torch.device("meta"):
        args = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in bad().items()}
    with platform.target(arch):
        ops.mla_decode.check(**args | dict(kv_cache=args["kv_cache"].to(FP8[right])))
        with pytest.raises(BadArgument, match=f"{FP8[right]}, the FP8 type of {arch}"):
            ops.mla_decode.check(**args | dict(kv_cache=args["kv_cache"].to(FP8[wrong])))
