"""mla_decode_rope against a loop over sequences, new tokens and keys in fp64, and against what it is made of."""

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
from wave64.ops.mla_decode_rope import make_case
from wave64.quant import FP8, fp8_dtype

#: Arguments that have a row for each sequence.
BATCHED = ("q_nope", "q_pe", "kv_c", "k_pe", "slot_mapping", "page_table", "seq_lens", "positions")


def rotated(x, angles, is_neox):
    """Apply RoPE to rows of x, pair by pair, with one row of cosines and sines."""
    half = len(angles) // 2
    x, rotated = x.double(), x.clone()
    for j in range(half):
        a, b = (j, j + half) if is_neox else (2 * j, 2 * j + 1)
        cos, sin = float(angles[j]), float(angles[half + j])
        rotated[..., a] = x[..., a] * cos - x[..., b] * sin
        rotated[..., b] = x[..., b] * cos + x[..., a] * sin
    return rotated


def as_stored(latent, kv_cache, kv_scale):
    if kv_cache.dtype not in FP8.values():
        return latent
    limit = torch.finfo(kv_cache.dtype).max
    return (latent.float() / (1.0 if kv_scale is None else kv_scale)).clamp(-limit, limit).to(kv_cache.dtype)


def naive(q_nope, q_pe, kv_c, k_pe, kv_cache, slot_mapping, page_table, seq_lens, positions, cos_sin_cache, scale,
          is_neox=False, kv_scale=None):
    """(out, the pool as it is to be)."""
    shape, rank, new = q_nope.shape, q_nope.shape[-1], q_nope.shape[1] if q_nope.ndim == 4 else 1
    q_nope, q_pe, kv_c, k_pe, slot_mapping, positions = (
        x.reshape(len(seq_lens), new, *x.shape[q_nope.ndim - 2:])
        for x in (q_nope, q_pe, kv_c, k_pe, slot_mapping, positions))
    pool, outs = kv_cache.clone(), []
    for b, length in enumerate(seq_lens.tolist()):
        latents = [latent_of(kv_cache, page_table[b], p, kv_scale) for p in range(length - new)]
        for j in range(new):
            angles = cos_sin_cache[int(positions[b, j])]
            stored = as_stored(torch.cat([kv_c[b, j], rotated(k_pe[b, j], angles, is_neox)]), kv_cache, kv_scale)
            slot, page_size = int(slot_mapping[b, j]), kv_cache.shape[1]
            if slot >= 0:
                pool[slot // page_size, slot % page_size] = stored
            if length - new + j >= 0:
                latents.append(stored.double() * (1.0 if kv_scale is None else float(kv_scale)))
            query = torch.cat([q_nope[b, j], rotated(q_pe[b, j], angles, is_neox)], -1)
            outs.append(attend_over(query, latents, scale, rank)[0])
    return torch.stack(outs).view(shape), pool


def assert_same_pool(got, expected, slots, rank):
    """By bit, but for what was rotated: that may have been rounded the other way."""
    page_size, kept = expected.shape[1], slots[slots >= 0]
    got, expected = got.cpu(), expected.clone()
    eps = torch.finfo(expected.dtype).eps
    rotated = got[kept // page_size, kept % page_size, rank:]
    torch.testing.assert_close(rotated.float(), expected[kept // page_size, kept % page_size, rank:].float(),
                               rtol=eps, atol=max(eps / 16, 1e-6))  # of FP8 the step between subnormal numbers
    expected[kept // page_size, kept % page_size, rank:] = rotated
    assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def call(backend, args):
    """(out, pool) on a pool of its own with the strides of the one given."""
    pool = args["kv_cache"]
    pool = torch.empty_strided(pool.shape, pool.stride(), dtype=pool.dtype, device=pool.device).copy_(pool)
    return run("mla_decode_rope", backend, args | dict(kv_cache=pool)), pool


def assert_right(got, args):
    out, pool = got
    expected, expected_pool = naive(**on("cpu", args))
    assert_same_pool(pool, expected_pool, args["slot_mapping"].cpu().flatten(), args["kv_c"].shape[-1])
    near(out, expected, expected_pool, args["kv_scale"])


def as_drawn(args, rng):
    """Positions that differ from the token's index, and some tokens without a slot."""
    args["positions"] = torch.randint_like(args["positions"], len(args["cos_sin_cache"]))
    if rng.random() < 0.3:
        args["positions"] = args["positions"].int()
    if rng.random() < 0.5:
        args["slot_mapping"][torch.rand(args["slot_mapping"].shape) < 0.4] = -1
    return args


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
@given(seed=st.integers(0, 2**32))
@settings(drawn, max_examples=2)
def test_equals_a_loop_over_keys(device, backend, heads, seed):
    """Hypothesis draws the seed alone: few examples of its own making are much alike."""
    rng = random.Random(f"rope {heads} {seed}")
    options = draw_options(rng, heads) | dict(is_neox=rng.random() < 0.5, angles=rng.choice([torch.float32] * 2
                                                                                             + [torch.bfloat16]))
    note(f"{options}")
    with torch.device(device):
        args = as_drawn(make_case(**options), rng)
    assert_right(call(backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [
    dict(seq_lens=[130, 1], heads=16, page_size=64), dict(seq_lens=[50], heads=12, page_size=1, fp8=True, queries=2),
    dict(seq_lens=[16], heads=128, is_neox=True)], ids=str)
def test_serves_what_models_ask_for(device, backend, options):
    """DeepSeek's width, with one rank's heads and with all."""
    with torch.device(device):
        args = make_case(**options)
    assert_right(call(backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flavor", FP8)
@pytest.mark.parametrize("scaled", [True, False])
def test_both_flavors_of_fp8(device, backend, flavor, scaled):
    """Also where a latent is beyond the largest number: what is attended to is what the cache would give back."""
    if device != "cpu" and fp8_dtype() != FP8[flavor]:
        pytest.skip("the machine's FP8 is the other")
    with torch.device(device):
        args = make_case([37, 1, 70], heads=5, queries=2, rank=32, rope=8)
    args["kv_c"][:, :, 3] *= 500
    args.update(kv_cache=args["kv_cache"].to(FP8[flavor]), scale=args["scale"] / 100,
                kv_scale=torch.full((1,), 0.37, device=device) if scaled else None)
    assert_right(call(backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [True, False])
def test_appends_to_the_slots_and_changes_nothing_else(device, backend, kept):
    """Every byte of the pool but the slots' is as before, NaN that must not be read among them."""
    with torch.device(device):
        args = make_case([37, 0, 1, 2, 65], heads=3, queries=3, rank=21, rope=6)
    if not kept:
        args["slot_mapping"].fill_(-1)
    slots = args["slot_mapping"][args["slot_mapping"] >= 0]
    assert len(slots) == (3 + 0 + 1 + 2 + 3 if kept else 0)
    _, pool = call(backend, args)
    before, after = (x.reshape(-1, 27).view(torch.int16) for x in (args["kv_cache"], pool))
    changed = (before != after).any(-1).nonzero().flatten()
    assert sorted(changed.tolist()) == sorted(slots.tolist())
    assert (before != after)[slots].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", [False, True])
def test_slots_only_say_where_tokens_are_kept(device, backend, fp8):
    """The result is the same by every bit where none is kept: new tokens do not take the way through the cache."""
    with torch.device(device):
        args = make_case([37, 2, 70], heads=3, queries=2, rank=32, rope=8, fp8=fp8)
    expected, pool = call(backend, args)
    out, same = call(backend, args | dict(slot_mapping=torch.full_like(args["slot_mapping"], -1)))
    assert torch.equal(out, expected)
    assert torch.equal(same.view(torch.uint8), args["kv_cache"].view(torch.uint8))
    assert not torch.equal(pool.view(torch.uint8), args["kv_cache"].view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_does_not_see_newer_tokens(device, backend):
    """The third of four new tokens changes: the first two results do not, by no bit."""
    with torch.device(device):
        args = make_case([37, 4], heads=3, queries=4, rank=32, rope=8)
    before, _ = call(backend, args)
    for name in ("kv_c", "k_pe"):
        changed = args[name].clone()
        changed[:, 2] += 1
        after, _ = call(backend, args | {name: changed})
        assert torch.equal(before[:, :2], after[:, :2])
        assert (before[:, 2:] != after[:, 2:]).flatten(2).any(-1).all()


def in_steps(backend, args):
    """The same as operators of their own: rotate, append, attend."""
    leading, rope = args["positions"].shape, args["q_pe"].shape[-1]
    q_pe, k_pe = args["q_pe"].clone(), args["k_pe"].clone()
    run("rotary_embedding", backend, dict(
        positions=args["positions"].flatten(), query=q_pe.view(leading.numel(), -1), key=k_pe.view(-1, rope),
        head_size=rope, cos_sin_cache=args["cos_sin_cache"], is_neox=args["is_neox"]))
    pool, rank = args["kv_cache"].clone(), args["kv_c"].shape[-1]
    run("concat_and_cache_mla", backend, dict(
        kv_c=args["kv_c"].view(-1, rank), k_pe=k_pe.view(-1, rope), kv_cache=pool,
        slot_mapping=args["slot_mapping"].flatten(), scale=args["kv_scale"]))
    out, _ = run("mla_decode", backend, dict(
        q=torch.cat([args["q_nope"], q_pe], -1), kv_cache=pool, page_table=args["page_table"],
        seq_lens=args["seq_lens"], scale=args["scale"], kv_lora_rank=rank, kv_scale=args["kv_scale"]))
    return out, pool


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [0, 3])
@pytest.mark.parametrize("options", [dict(is_neox=True), dict(fp8=True), dict(dtype=torch.float32)], ids=str)
def test_equals_rotate_then_append_then_attend(device, backend, queries, options):
    with torch.device(device):
        args = make_case([37, 3, 70], heads=3, queries=queries, rank=32, rope=8, **options)
    out, pool = call(backend, args)
    expected, expected_pool = in_steps(backend, args)
    assert_same_pool(pool, expected_pool.cpu(), args["slot_mapping"].cpu().flatten(), 32)
    near(out, expected.cpu().double(), expected_pool, args["kv_scale"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", [False, True])
def test_new_tokens_at_once_are_new_tokens_in_turn(device, backend, fp8):
    """Each step reads from the cache what the steps before it appended."""
    new = 3
    with torch.device(device):
        args = make_case([37, new, 65], heads=3, queries=new, rank=32, rope=8, fp8=fp8)
    together, pool = call(backend, args)
    step = args | dict(kv_cache=args["kv_cache"].clone())
    for j in range(new):
        step["seq_lens"] = args["seq_lens"] - (new - 1 - j)
        for name in BATCHED[:5] + ("positions",):
            step[name] = args[name][:, j].contiguous()
        near(run("mla_decode_rope", backend, step), together[:, j].cpu().double(), pool, args["kv_scale"])
    assert torch.equal(step["kv_cache"].view(torch.uint8), pool.view(torch.uint8))


def launch(args, keys_per_split=0, arch=None, **changes):
    """(out, pool) of the Triton kernel with other settings than the machine's."""
    from wave64.triton_ops import mla_decode as kernels
    from wave64.triton_ops import mla_decode_rope as rope

    out, pool = torch.full_like(args["q_nope"], float("nan")), args["kv_cache"].clone()
    with platform.target(arch.name) if arch else contextlib.nullcontext():
        config = rope.TUNING.choose(**rope.key(**args))
    call = rope.call_of(**args | dict(kv_cache=pool))
    kernels.launch(call, out, None, dataclasses.replace(config, **changes), keys_per_split)
    return out, pool


@pytest.mark.parametrize(("seq_lens", "keys_per_split", "queries"), [
    ([0, 130, 1, 66], 32, 0), ([200, 50], 40, 2), ([100, 33], 7, 0)])  # the last: more splits than blocks, some empty
def test_a_fixed_split_makes_a_result_independent_of_its_batch(device, seq_lens, keys_per_split, queries):
    with torch.device(device):
        args = make_case(seq_lens, heads=3, queries=queries, rank=32, rope=8, dtype=torch.float32)
    together = launch(args, keys_per_split, programs=4)  # with so few the batch would decide otherwise
    assert_right(together, args)
    for b in range(len(seq_lens)):
        alone = {k: v[b:b + 1] if k in BATCHED else v for k, v in args.items()}
        assert torch.equal(launch(alone, keys_per_split, programs=4)[0][0], together[0][b])


def test_many_parts_agree_with_one(device):
    """38 parts: more than are put together in one step."""
    with torch.device(device):
        args = make_case([600], heads=2, rank=24, rope=8, dtype=torch.float32)
    (many, many_pool), (one, pool) = launch(args, 16), launch(args, 10**6)
    assert not torch.equal(many, one)
    assert torch.equal(many_pool.nan_to_num(), pool.nan_to_num())
    torch.testing.assert_close(many, one, atol=1e-5, rtol=0)
    assert_right((one, pool), args)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("heads", [5, 40])
def test_either_operand_may_hold_the_rows(device, swap, heads):
    """Also where rows are split among several programs, of which one appends."""
    with torch.device(device):
        args = make_case([31, 3] if heads == 5 else [15], heads=heads, queries=2, rank=24, rope=8)
    assert_right(launch(args, swap=swap, bands=0, block_h=32), args)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
@pytest.mark.parametrize("options", [
    dict(seq_lens=[70, 3], heads=5), dict(seq_lens=[130], heads=3, queries=3, fp8=True),
    dict(seq_lens=[40], heads=20, rank=37, rope=10, page_size=64)], ids=str)
def test_as_configured_for_another_architecture(device, arch, options):
    """What its configuration means; tests/gfx942 has what is made of it."""
    if device != "cpu":
        pytest.skip("its compiler's options are for that architecture")
    args = make_case(**(dict(rank=32, rope=8) | options))
    assert_right(launch(args, arch=lookup(arch)), args)


@pytest.mark.parametrize(("count", "block_b"), [(33, 0), (21, 8)])
def test_many_sequences(device, count, block_b):
    """Of no token, one and more, also where lengths are looked at block by block."""
    with torch.device(device):
        args = make_case([11 * i % 70 for i in range(count)], heads=1, rank=16, rope=8, page_size=1)
    assert_right(launch(args, block_b=block_b), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_beyond_two_gib(device, backend):
    """Offsets in the pool need 33 bits, to read and to write. Memory that is never touched costs nothing on a CPU."""
    page_size, width = 16, 80
    with torch.device(device):
        near_by = make_case([37, 20], heads=4, rank=64, rope=16, page_size=page_size, fp8=True)
    far = near_by | moved_far(near_by, page_size)
    last = (near_by["seq_lens"] - 1).long()
    pages = far["page_table"][torch.arange(2, device=device), last // page_size].long()
    far["slot_mapping"] = pages * page_size + last % page_size
    assert far["slot_mapping"].min() * width > 2**31
    expected, pool = call(backend, near_by)
    assert torch.equal(run("mla_decode_rope", backend, far), expected)
    for slot, at in zip(near_by["slot_mapping"], far["slot_mapping"], strict=True):
        assert torch.equal(pool[slot // page_size, slot % page_size].view(torch.uint8),
                           far["kv_cache"][at // page_size, at % page_size].view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("fp8", [False, True])
def test_strided_pools(device, backend, layout, fp8):
    """Elements next to the pool in its storage do not change."""
    with torch.device(device):
        args = make_case([37, 20], heads=4, rank=32, rope=8, fp8=fp8)
    expected, expected_pool = call(backend, args)
    stored = args["kv_cache"].view(torch.uint8) if fp8 else args["kv_cache"]  # torch does not put FP8 side by side
    pool = STRIDED[layout](stored).view(args["kv_cache"].dtype)
    assert not pool.is_contiguous()
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(pool.untyped_storage())
    before = whole.clone()
    assert torch.equal(run("mla_decode_rope", backend, args | dict(kv_cache=pool)), expected)
    assert torch.equal(pool.contiguous().view(torch.uint8), expected_pool.view(torch.uint8))
    assert (whole != before).sum() <= 2 * 40 * pool.element_size()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_fused_projections(device, backend):
    """Heads before tokens, latents and keys side by side, a table that is part of a wider one."""
    with torch.device(device):
        args = make_case([37, 20], heads=4, queries=2, rank=32, rope=8)
    expected, _ = call(backend, args)
    q = torch.cat([args["q_nope"], args["q_pe"]], -1).permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    new = torch.cat([args["k_pe"], args["kv_c"]], -1).transpose(0, 1).contiguous().transpose(0, 1)
    table = torch.cat([args["page_table"], args["page_table"] + 1], 1)[:, :args["page_table"].shape[1]]
    out, _ = call(backend, args | dict(q_nope=q[..., :32], q_pe=q[..., 32:], k_pe=new[..., :8], kv_c=new[..., 8:],
                                       page_table=table))
    assert torch.equal(out, expected)
    assert out.is_contiguous()


@pytest.mark.parametrize("options", [dict(), dict(queries=2, fp8=True), dict(seq_lens=[])])
def test_torch_op(device, options):
    with torch.device(device):
        args = make_case(**(dict(seq_lens=[37, 20], heads=4, rank=32, rope=8) | options))
    pools = [args["kv_cache"].clone() for _ in range(2)]
    out = torch.ops.wave64.mla_decode_rope(**args | dict(kv_cache=pools[0]))
    assert torch.equal(out, ops.mla_decode_rope(**args | dict(kv_cache=pools[1])))
    assert torch.equal(pools[0].view(torch.uint8), pools[1].view(torch.uint8))
    assert args["seq_lens"].numel() == 0 or not torch.equal(pools[0].view(torch.uint8),
                                                            args["kv_cache"].view(torch.uint8))


def bad(**changes):
    args = make_case([37, 4], heads=4, rank=32, rope=8)
    return {**args, **{name: change(args) for name, change in changes.items()}}


def strided_columns(name):
    return lambda a: a[name].transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(("argument", "change", "words"), [
    ("q_nope", lambda a: a["q_nope"][0], "[num_seqs, num_heads, width]"),
    ("q_nope", strided_columns("q_nope"), "contiguous last dimension"),
    ("q_nope", lambda a: a["q_nope"].to(torch.int32), "bf16, fp16 or fp32"),
    ("q_nope", lambda a: a["q_nope"][:, :0], "at least one head"),
    ("q_nope", lambda a: a["q_nope"][..., :0], "at least one column"),
    ("q_pe", lambda a: a["q_pe"][0], "[num_seqs, num_heads, width]"),
    ("q_pe", lambda a: a["q_pe"][:, :3], "[2, 4] x rope_dim, as q_nope"),
    ("q_pe", lambda a: a["q_pe"].half(), "as q_nope"),
    ("q_pe", strided_columns("q_pe"), "contiguous last dimension"),
    ("q_pe", lambda a: a["q_pe"].to("meta"), "on cpu, where q_nope is"),
    ("kv_c", lambda a: a["kv_c"][:1], "bfloat16 [2, 32]"),
    ("kv_c", lambda a: a["kv_c"][:, None], "bfloat16 [2, 32]"),
    ("kv_c", lambda a: a["kv_c"][:, :31], "bfloat16 [2, 32]"),
    ("kv_c", lambda a: a["kv_c"].half(), "bfloat16 [2, 32]"),
    ("kv_c", strided_columns("kv_c"), "contiguous last dimension"),
    ("kv_c", lambda a: a["kv_c"].to("meta"), "on cpu, where q_nope is"),
    ("k_pe", lambda a: a["k_pe"][:, :7], "bfloat16 [2, 8]"),
    ("k_pe", lambda a: a["k_pe"].float(), "bfloat16 [2, 8]"),
    ("k_pe", strided_columns("k_pe"), "contiguous last dimension"),
    ("k_pe", lambda a: a["k_pe"].to("meta"), "on cpu, where q_nope is"),
    ("kv_cache", lambda a: a["kv_cache"][0], "[num_pages, page_size, 40]"),
    ("kv_cache", lambda a: a["kv_cache"][..., :39], "[num_pages, page_size, 40]"),
    ("kv_cache", strided_columns("kv_cache"), "contiguous last dimension"),
    ("kv_cache", lambda a: a["kv_cache"].half(), "that of the queries, or FP8"),
    ("kv_cache", lambda a: a["kv_cache"].to("meta"), "on cpu, where q"),
    ("slot_mapping", lambda a: a["slot_mapping"].int(), "contiguous int64 [2]"),
    ("slot_mapping", lambda a: a["slot_mapping"][:1], "contiguous int64 [2]"),
    ("slot_mapping", lambda a: a["slot_mapping"][:, None], "contiguous int64 [2]"),
    ("slot_mapping", lambda a: a["slot_mapping"].repeat_interleave(2)[::2], "contiguous int64 [2]"),
    ("slot_mapping", lambda a: a["slot_mapping"].to("meta"), "on cpu, where q_nope is"),
    ("page_table", lambda a: a["page_table"][:1], "int32 [2, max_pages]"),
    ("page_table", lambda a: a["page_table"].long(), "int32 [2, max_pages]"),
    ("page_table", strided_columns("page_table"), "contiguous last dimension"),
    ("page_table", lambda a: a["page_table"][:, :2], "capacity for 37 tokens"),
    ("page_table", lambda a: a["page_table"].to("meta"), "on cpu, where q"),
    ("seq_lens", lambda a: a["seq_lens"].long(), "int32 [2]"),
    ("seq_lens", lambda a: a["seq_lens"][:1], "int32 [2]"),
    ("seq_lens", lambda a: a["seq_lens"].to("meta"), "on cpu, where q"),
    ("positions", lambda a: a["positions"].float(), "int64 or int32 [2]"),
    ("positions", lambda a: a["positions"][:1], "int64 or int32 [2]"),
    ("positions", lambda a: a["positions"].repeat_interleave(2)[::2], "contiguous"),
    ("positions", lambda a: a["positions"].to("meta"), "on cpu, where q_nope is"),
    ("cos_sin_cache", lambda a: a["cos_sin_cache"][0], "[max_pos, 8]"),
    ("cos_sin_cache", lambda a: a["cos_sin_cache"][:, :6], "[max_pos, 8]"),
    ("cos_sin_cache", lambda a: a["cos_sin_cache"].T.contiguous().T, "contiguous [max_pos, 8]"),
    ("cos_sin_cache", lambda a: a["cos_sin_cache"].int(), "bf16, fp16 or fp32"),
    ("cos_sin_cache", lambda a: a["cos_sin_cache"].to("meta"), "on cpu, where q_nope is"),
    ("kv_scale", lambda a: torch.ones(1), "None for a torch.bfloat16 cache"),
])
def test_refuses(argument, change, words):
    refuse(bad(**{argument: change}), argument, words)


@pytest.mark.parametrize(("wrong", "words"), [
    (torch.ones(2), "one fp32 number"), (torch.ones(1).half(), "one fp32 number"),
    (torch.ones(1, device="meta"), "on cpu, where q")])
def test_refuses_scales_of_fp8_caches(wrong, words):
    refuse(bad(kv_cache=lambda a: a["kv_cache"].to(fp8_dtype())) | dict(kv_scale=wrong), "kv_scale", words)


def test_refuses_pairs_of_odd_widths():
    args = bad()
    odd = dict(q_pe=args["q_pe"][..., :7], k_pe=args["k_pe"][..., :7], kv_cache=args["kv_cache"][..., :39])
    refuse(args | odd | dict(cos_sin_cache=torch.ones(45, 7)), "cos_sin_cache", "even")


def refuse(args, argument, words):
    before = args["kv_cache"].clone() if args["kv_cache"].device.type == "cpu" else None
    with refused("mla_decode_rope", argument, words):
        ops.mla_decode_rope(**args)
    if before is not None:
        assert torch.equal(before.float(), args["kv_cache"].float()) or before.float().isnan().any()


@pytest.mark.parametrize(("arch", "right", "wrong"), [
    ("gfx942", "e4m3fnuz", "e4m3fn"), ("gfx950", "e4m3fn", "e4m3fnuz")])
def test_refuses_fp8_of_another_architecture(arch, right, wrong):
    with torch.device("meta"):
        args = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in bad().items()}
    with platform.target(arch):
        ops.mla_decode_rope.check(**args | dict(kv_cache=args["kv_cache"].to(FP8[right])))
        with pytest.raises(BadArgument, match=f"{FP8[right]}, the FP8 type of {arch}"):
            ops.mla_decode_rope.check(**args | dict(kv_cache=args["kv_cache"].to(FP8[wrong])))
