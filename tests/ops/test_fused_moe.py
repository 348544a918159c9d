"""`fused_moe` against a dense mixture in fp64, pair by pair in numpy, within the bound that its docstring derives."""

import math

import helpers
import numpy as np
import pytest
import torch
from helpers import BACKENDS, FP8, UNIT, examples, on, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import OPS, ops, platform
from wave64.backends import import_hopper_kernels
from wave64.ops.fused_moe import make_case
from wave64.testing import contract, tune
from wave64.testing.emulator.run import emulate

HALF, FULL = torch.float16, torch.float32
quick = examples(12)
erf = np.vectorize(math.erf, otypes=[float])


def run(backend, args):
    """Memory that is not written holds NaN."""
    with contract.poisoned():
        return helpers.run(ops.fused_moe, backend, **args)


def act(a, activation):
    if activation == "silu":
        return a / (1 + np.exp(-a))
    if activation == "gelu":
        return a * (1 + erf(a / math.sqrt(2))) / 2
    return a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2


def matrix(weight, scale, block_shape):
    """An expert's weight in fp64, element by element what is stored times what scales it."""
    m = weight.double().numpy()
    if scale is None:
        return m
    scale = scale.double().numpy()
    if block_shape:
        rows, columns = np.indices(m.shape)
        return m * scale[rows // block_shape[0], columns // block_shape[1]]
    return m * scale.reshape(-1, 1)


def mixture(x, w13, w2, topk_weights, topk_ids, w13_scale=None, w2_scale=None, block_shape=None, activation="silu",
            apply_router_weight_on_input=False, expert_map=None):
    """(y, bound) in fp64: the dense mixture, and how far a result may be from it by the operator's docstring."""
    (tokens, hidden), (experts, _, inter), top_k = x.shape, w2.shape, topk_ids.shape[1]
    u, fp8 = UNIT[x.dtype], w13.dtype in FP8
    y, bound = np.zeros((tokens, hidden)), np.zeros((tokens, hidden))
    weights = {}

    def s(k):
        return k * 2.0**-23 + fp8 * 2.0**-7

    def d(v):
        if not fp8:
            return np.zeros_like(v)
        group = block_shape[1] if block_shape else len(v)
        amax = [np.abs(v[i:i + group]).max() for i in range(0, len(v), group)]
        return 2.0**-4 * np.abs(v) + 2.0**-18 * np.repeat(amax, group)[:len(v)]

    for t in range(tokens):
        row = x[t].double().numpy()
        for j in range(top_k):
            e = int(topk_ids[t, j])
            if expert_map is not None:
                e = int(expert_map[e]) if 0 <= e < len(expert_map) else -1
            if not 0 <= e < experts:
                continue
            if e not in weights:
                weights[e] = (matrix(w13[e], None if w13_scale is None else w13_scale[e], block_shape),
                              matrix(w2[e], None if w2_scale is None else w2_scale[e], block_shape))
            w, down = weights[e]
            weight = float(topk_weights[t, j])
            if apply_router_weight_on_input:
                w, weight = w * weight, 1.0
            a, b = np.split(w @ row, 2)
            e_a, e_b = np.split(np.abs(w) @ d(row) + s(hidden) * (np.abs(w) @ np.abs(row)), 2)
            h = act(a, activation) * b
            e_h = np.abs(act(a, activation)) * e_b + 1.13 * e_a * (np.abs(b) + e_b) + (u + 2.0**-20) * np.abs(a * b)
            out, size = down @ h, np.abs(h) + e_h
            off = np.abs(down) @ (e_h + d(size) + s(inter) * size) + u * np.abs(out)
            y[t] += weight * out
            bound[t] += abs(weight) * (off + (u + top_k * 2.0**-23) * np.abs(out))
    return y, bound


def holds(got, args):
    y, bound = mixture(**on("cpu", args))
    assert got.shape == args["x"].shape
    assert got.dtype == args["x"].dtype
    off = np.abs(got.double().cpu().numpy() - y)
    # second order, and the smallest numbers of fp16 and bf16
    assert (off <= 1.1 * bound + 1e-7).all(), f"off by {(off / (bound + 1e-7)).max():.3g} times the bound"


kinds = st.sampled_from([
    {}, dict(scales="tensor"), dict(scales="channel"), dict(scales="channel", fp8=FP8[1]),
    dict(scales="block", block_shape=[32, 32]), dict(scales="block", block_shape=[16, 64]),
    dict(scales="block", block_shape=[24, 32], fp8=FP8[1])])


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(tokens=st.sampled_from([0, 1, 2, 5, 17, 40]), experts=st.integers(1, 7), top_k=st.integers(1, 4),
       hidden=st.sampled_from([1, 16, 33, 64, 97]), inter=st.sampled_from([1, 16, 32, 48, 97]), kind=kinds,
       dtype=st.sampled_from(list(UNIT)), activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
       mapped=st.booleans(), one=st.booleans(), dropped=st.sampled_from([0.0, 0.3, 1.0]),
       padded=st.sampled_from([0, 7]), seed=st.integers(0, 2**16))
def test_equals_a_dense_mixture_within_its_bound(backend, device, tokens, experts, top_k, hidden, inter, kind, dtype,
                                                 activation, mapped, one, dropped, padded, seed):
    torch.manual_seed(seed)
    routed = 2 * experts + 1 if mapped else 0
    args = on(device, make_case(tokens, experts, min(top_k, routed or experts), hidden, inter, dtype, routed=routed,
                                one=one, dropped=dropped, padded=padded, activation=activation, **kind))
    holds(run(backend, args), args)


BLOCKS = dict(scales="block", block_shape=[128, 128])


@pytest.mark.skipif(platform.arch() is not None, reason="on gfx942's machine code, executed on a CPU")
@pytest.mark.skipif("hip" not in ops.fused_moe.backends, reason="needs the extension")
@pytest.mark.parametrize(("tokens", "experts", "top_k", "hidden", "inter", "options"), [
    (17, 3, 2, 256, 384, dict(dropped=0.3)), (40, 7, 2, 384, 128, dict(one=True)),
    (33, 3, 1, 128, 256, dict(apply_router_weight_on_input=True, dtype=torch.float16)), (17, 3, 2, 7168, 128, {}),
    (20, 4, 4, 640, 128, dict(routed=9))])
def test_hips_kernels_keep_the_bound(tokens, experts, top_k, hidden, inter, options):
    """Full and partial blocks of pairs, experts without any, and more steps than are in flight at a time."""
    with platform.target("gfx942"), emulate("gfx942"), contract.poisoned():
        torch.manual_seed(tokens)
        args = make_case(tokens, experts, top_k, hidden, inter, **options, **BLOCKS)
        got = ops.fused_moe.backends["hip"].run(**args)
    holds(got, args)


@pytest.mark.skipif(platform.arch() is not None, reason="on machine code, executed on a CPU")
@pytest.mark.skipif("hip" not in ops.fused_moe.backends, reason="needs the extension")
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_hips_tiles_keep_the_bound_over_many_steps(arch):
    """Tokens' scales pass through LDS, of 8 steps at a time: here more than two such."""
    with platform.target(arch), emulate(arch), contract.poisoned():
        torch.manual_seed(0)
        args = make_case(40, 1, 1, 2304, 128, **BLOCKS)
        got = ops.fused_moe.backends["hip"].run(**args)
    holds(got, args)


@pytest.mark.skipif(platform.arch() is not None, reason="on gfx942's machine code, executed on a CPU")
@pytest.mark.skipif("hip" not in ops.fused_moe.backends, reason="needs the extension")
@pytest.mark.parametrize("tokens", [24, 60, 220])
def test_hips_kernels_reach_weights_beyond_two_to_the_31_bytes(tokens):
    """Blocks of 16, 64 and 128 pairs, of three experts: the last one's weights begin there. Memory that is never
    touched costs nothing on a CPU."""
    with platform.target("gfx942"), emulate("gfx942"):
        torch.manual_seed(tokens)
        args = make_case(tokens, 3, 2, 128, 128, **BLOCKS)
        for name in ("w13", "w2"):
            near = args[name]
            far = torch.empty(3, 2**30 + 128, dtype=torch.uint8)[:, :near[0].numel()].view(near.dtype).view(near.shape)
            args[name] = far.copy_(near)
        assert args["w2"].stride(0) * 2 > 2**31
        with contract.poisoned():
            got = ops.fused_moe.backends["hip"].run(**args)
    holds(got, args)


@pytest.mark.skipif("hip" not in ops.fused_moe.backends, reason="needs the extension")
@pytest.mark.parametrize(("options", "words"), [
    ({}, None), (dict(block_shape=[64, 128]), "blocks of 128"), (dict(dtype=torch.float32), "bf16 and fp16"),
    (dict(activation="gelu"), "silu"), (dict(scale_ue8m0=True), "powers of two"), (dict(hidden=192), "192 and 128"),
    (dict(tokens=65), None), (dict(tokens=16), "up to 32 pairs"),
    (dict(padded=8), "16 bytes"), (dict(fp8=FP8[1]), "e4m3fnuz on gfx950")])
def test_what_hip_declines(options, words):
    with platform.target("gfx950"):
        given = dict(tokens=17, experts=4, top_k=2, hidden=256, inter=128) | BLOCKS | options
        why = ops.fused_moe.backends["hip"].supports(**make_case(**given))
    assert why is None if words is None else words in why


@pytest.mark.skipif(platform.arch() is None or platform.arch().matrix != "wgmma", reason="a kernel for Hopper")
@pytest.mark.parametrize("kind", [{}, dict(dtype=HALF), dict(scales="block", block_shape=[128, 128])])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "dropped"), [
    (33, 3, 2, 0.0), (300, 5, 3, 0.3), (129, 1, 1, 0.0), (64, 2, 2, 0.0), (17, 4, 2, 1.0), (700, 4, 4, 0.0)])
def test_hoppers_own_kernel_keeps_the_bound(device, kind, tokens, experts, top_k, dropped):
    """Blocks of 128 pairs that are full, or end in either team's half, or are not there at all."""
    torch.manual_seed(tokens)
    args = on(device, make_case(tokens, experts, top_k, 512, 256, dropped=dropped, **kind))
    assert import_hopper_kernels() is None
    holds(ops.fused_moe.backends["hopper"].run(**args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_in_fp32(backend, device, activation):
    """Where their forms differ by more than rounding."""
    args = on(device, make_case(3, 3, 2, 48, 32, FULL, activation=activation))
    y, _ = mixture(**on("cpu", args))
    off = np.abs(run(backend, args).double().cpu().numpy() - y).max()
    assert off <= 2e-6 * np.abs(y).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("kind", [{}, dict(scales="channel"), dict(scales="block", block_shape=[32, 32])], ids=str)
def test_a_weight_can_multiply_the_input(backend, device, tokens, kind):
    drawn = make_case(tokens, 3, 1, apply_router_weight_on_input=True, **kind)
    args = on(device, drawn | dict(topk_weights=torch.rand(tokens, 1) * 3))
    got = run(backend, args)
    holds(got, args)
    assert not torch.equal(got, run(backend, args | dict(apply_router_weight_on_input=False)))


@pytest.mark.parametrize("tokens", [4, 30])
@pytest.mark.parametrize("kind", [{}, dict(scales="block", block_shape=[32, 32])], ids=str)
def test_permuted_tokens_give_permuted_rows(device, tokens, kind):
    args = on(device, make_case(tokens, 4, 2, dropped=0.2, **kind))
    order = torch.randperm(tokens).to(device)
    permuted = args | {name: args[name][order] for name in ("x", "topk_weights", "topk_ids")}
    assert torch.equal(run("triton", permuted), run("triton", args)[order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_experts_without_tokens_are_never_read(backend, device, tokens):
    args = on(device, make_case(tokens, 5, 2))
    args["topk_ids"] = torch.where(args["topk_ids"] % 2 == 1, -1, args["topk_ids"])
    expected = run(backend, args)
    for name in ("w13", "w2"):
        args[name] = args[name].clone()
        args[name][1::2] = torch.nan
    assert torch.equal(run(backend, args), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_token_without_experts_gets_zeros_whatever_it_holds(backend, device, tokens):
    args = on(device, make_case(tokens, 5, 2))
    args["topk_ids"][1] = torch.tensor([-1, 5])
    expected = run(backend, args)
    assert not expected[1].any()
    args["x"][1] = torch.nan
    assert torch.equal(run(backend, args), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 20])
def test_layout_does_not_matter(backend, device, tokens):
    args = on(device, make_case(tokens, 3, 2, 48, 33, padded=5))
    dense = args | {name: args[name].contiguous() for name in ("w13", "w2")}
    strided = torch.stack([args["x"], args["x"]], 1)[:, 0]
    assert strided.stride(0) == 96
    assert torch.equal(run(backend, args | dict(x=strided)), run(backend, dense))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_twice_counts_twice(backend, device):
    args = on(device, make_case(4, 3, 2) | dict(topk_ids=torch.tensor([[1, 1], [2, 0], [0, 0], [1, 2]]).int()))
    holds(run(backend, args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_map_to_experts_that_are_not_there_maps_to_none(backend, device, tokens):
    args = on(device, make_case(tokens, 3, 2, routed=5))
    args["expert_map"] = torch.tensor([2, -1, 0, 1, -1], dtype=torch.int32, device=device)
    expected = run(backend, args)
    args["expert_map"] = torch.tensor([2, 3, 0, 1, -2**31], dtype=torch.int32, device=device)
    assert torch.equal(run(backend, args), expected)


def forms():
    """How the kernels can be launched: as a table may say, and larger tiles than the operands."""
    made = tune.tuning_of(ops.fused_moe).config
    small = dict(up_k=32, up_warps=4, up_stages=1, down_k=64, down_warps=4, down_stages=1)
    yield made(16, 16, down_n=32, few=True, **small)
    yield made(16, 16, down_n=128, few=True, late=True, **small)
    yield made(16, 32, down_n=16, few=True, swap=True, **small)
    yield made(16, 32, down_n=32, group_m=3, **small)
    yield made(16, 64, down_n=16, late=True, xcds=8, **small)
    yield made(32, 16, down_n=32, group_m=2, xcds=4, swap=True, **small)
    yield made(64, 32, down_n=64, late=True, swap=True, **small)


@pytest.mark.skipif(platform.arch() is not None, reason="not every form can be launched on every GPU")
@pytest.mark.parametrize("config", list(forms()), ids=str)
@pytest.mark.parametrize("kind", [{}, dict(scales="channel"), dict(scales="block", block_shape=[32, 32])], ids=str)
def test_every_form_gives_the_same(config, kind):
    args = make_case(7, 3, 2, 40, 48, dropped=0.2, **kind)
    with tune.tuning_of(ops.fused_moe).forced(config):
        got = run("triton", args)
    expected = ops.fused_moe.reference(**args)
    assert contract.distance(got, expected) <= tune.SLACK * contract.floor(expected.dtype)


@pytest.mark.skipif(platform.arch() is not None, reason="there is a GPU here")
@pytest.mark.parametrize("kind", [dict(scales="channel"), dict(scales="block", block_shape=[32, 32])], ids=str)
@pytest.mark.parametrize("tokens", [2, 18])
def test_activations_take_the_flavor_of_the_architecture(kind, tokens):
    args = make_case(tokens, 3, 2, fp8=FP8[1], **kind)
    config = list(forms())[0 if tokens == 2 else 3]
    with platform.target("gfx942"), tune.tuning_of(ops.fused_moe).forced(config):
        got = run("triton", args)
    expected = ops.fused_moe.reference(**args)
    assert contract.distance(got, expected) <= tune.SLACK * contract.floor(expected.dtype)


@pytest.mark.parametrize(("arch", "flavor"), [("gfx942", FP8[1]), ("gfx950", FP8[0]), ("gfx90a", None)])
def test_the_kernel_serves_the_fp8_of_its_architecture(arch, flavor):
    with platform.target(arch):
        for fp8 in FP8:
            why = ops.fused_moe.backends["triton"].supports(**make_case(2, scales="channel", fp8=fp8))
            assert (why is None) == (fp8 == flavor)
            assert why is None or arch in why


@pytest.mark.parametrize("columns", [16, 48, 256])
def test_the_kernel_names_blocks_that_it_cannot_quantize_for(columns):
    args = make_case(2, scales="block", block_shape=[32, columns])
    assert str(columns) in str(ops.fused_moe.backends["triton"].supports(**args))


def test_cost_counts_the_chosen_experts_once():
    args = make_case(3, 4, 2) | dict(topk_ids=torch.tensor([[0, 2], [2, 0], [-1, 9]]).int())
    cost = ops.fused_moe.cost(**args)
    assert cost.flops == 2 * 4 * 3 * 32 * 64
    assert cost.bytes == 2 * (2 * 3 * 32 * 64 + 2 * 3 * 64)


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("x", torch.zeros(3, 4, 64), "[num_tokens, hidden]"), ("x", torch.zeros(3, 128)[:, ::2], "contiguous last"),
    ("x", torch.zeros(3, 64).double(), "bf16, fp16 or fp32"),
    ("w13", torch.zeros(64, 64), "[num_experts, 2 * inter, 64]"), ("w13", torch.zeros(4, 63, 64), "2 * inter"),
    ("w13", torch.zeros(0, 64, 64), "num_experts"), ("w13", torch.zeros(4, 64, 32), "2 * inter, 64]"),
    ("w13", torch.zeros(4, 64, 128)[..., ::2], "contiguous last"),
    ("w13", torch.zeros(4, 64, 64).half(), "that of x"),
    ("w13", torch.zeros(4, 64, 64).to(torch.float8_e5m2), "float8_e4m3fn(uz)"),
    ("w13", torch.zeros(4, 64, 64, device="meta"), "where x is"),
    ("w2", torch.zeros(4, 64, 33), "[4, 64, 32]"), ("w2", torch.zeros(3, 64, 32), "[4, 64, 32]"),
    ("w2", torch.zeros(4, 64, 32).half(), "that of w13"), ("w2", torch.zeros(4, 64, 64)[..., ::2], "contiguous last"),
    ("w2", torch.zeros(4, 64, 32, device="meta"), "where x is"),
    ("topk_ids", torch.zeros(2, 2, dtype=torch.int32), "int32 [3, top_k]"),
    ("topk_ids", torch.zeros(3, 2, dtype=torch.int64), "int32 [3, top_k]"),
    ("topk_ids", torch.zeros(3, 4, dtype=torch.int32)[:, ::2], "contiguous"),
    ("topk_ids", torch.zeros(3, 2, dtype=torch.int32, device="meta"), "where x is"),
    ("topk_weights", torch.zeros(3, 3), "float32 [3, 2]"), ("topk_weights", torch.zeros(3, 2).half(), "float32"),
    ("topk_weights", torch.zeros(3, 2, device="meta"), "where x is"),
    ("expert_map", torch.zeros(8, dtype=torch.int64), "int32 [num_global_experts]"),
    ("expert_map", torch.zeros(8, 1, dtype=torch.int32), "int32 [num_global_experts]"),
    ("expert_map", torch.zeros(8, dtype=torch.int32, device="meta"), "where x is"),
    ("w13_scale", torch.zeros(4), "None for torch.float32 weights"),
    ("w2_scale", torch.zeros(4), "None for torch.float32 weights"),
    ("block_shape", [32, 32], "None for torch.float32 weights"), ("block_shape", [32], "two positive numbers"),
    ("block_shape", [32, 0], "two positive numbers"), ("activation", "relu", "silu, gelu, gelu_tanh"),
    ("apply_router_weight_on_input", True, "False for 2 experts a token")])
def test_refuses(argument, wrong, words):
    refuse(make_case(3, dtype=FULL) | {argument: wrong}, argument, words)


@pytest.mark.parametrize(("scales", "argument", "wrong", "words"), [
    ("channel", "w13_scale", None, "FP8 weights have scales"), ("channel", "w2_scale", None, "have scales"),
    ("channel", "w13_scale", torch.zeros(4, 63), "[4, 64], one per channel"),
    ("channel", "w2_scale", torch.zeros(3), "[4], a number per expert"),
    ("channel", "w2_scale", torch.zeros(4).half(), "float32"),
    ("channel", "w2_scale", torch.zeros(8)[::2], "contiguous"),
    ("channel", "w2_scale", torch.zeros(4, device="meta"), "where x is"),
    ("channel", "w2", torch.zeros(4, 64, 32).to(FP8[1]), "that of w13"),
    ("block", "w13_scale", torch.zeros(4, 2, 3), "[4, 2, 2], a number per block"),
    ("block", "w2_scale", torch.zeros(4, 64), "[4, 2, 1], a number per block"),
    ("block", "block_shape", [16, 32], "w13_scale: expected contiguous float32 [4, 4, 2]")])
def test_refuses_scales(scales, argument, wrong, words):
    shape = dict(block_shape=[32, 32]) if scales == "block" else {}
    named = "w13_scale" if argument == "block_shape" else argument
    refuse(make_case(3, scales=scales, fp8=FP8[0], **shape) | {argument: wrong}, named, words)


def test_refuses_more_experts_a_token_than_there_are():
    args = make_case(3, 2, 2) | dict(topk_ids=torch.zeros(3, 3).int(), topk_weights=torch.zeros(3, 3))
    refuse(args, "topk_ids", "from 1 to 2 ids")
    refuse(args | dict(topk_ids=torch.zeros(3, 0).int(), topk_weights=torch.zeros(3, 0)), "topk_ids", "from 1 to 2 ids")
    ops.fused_moe(**args, expert_map=torch.tensor([0, 1, -1], dtype=torch.int32))


def refuse(args, argument, words):
    with refused("fused_moe", argument, words):
        OPS["fused_moe"](**args)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of what counts for nothing
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_gate_far_below_zero_closes(device, backend, activation):
    """Its activation is 0, not what a clamped exponential leaves of so large a number."""
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([-1e19, 1.0])
    w13 = torch.zeros(2, 64, 32)
    w13[:, :32, 0], w13[:, 32:, 1] = 1e19, 1.0  # gates of -1e38, ups of 1
    args = on(device, dict(x=x, w13=w13, w2=torch.ones(2, 32, 32), topk_weights=torch.ones(1, 2),
                           topk_ids=torch.tensor([[0, 1]], dtype=torch.int32), activation=activation))
    assert torch.equal(run(backend, args), torch.zeros(1, 32, device=device))
