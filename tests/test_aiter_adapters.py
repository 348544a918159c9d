"""Adapters to AITER, over a recorder with the signatures of a published version, which computes what its kernels do by
the references, and refuses what they would read beyond. What an adapter gives is what the operator's contract says;
what does not fit is a reason in words. That AITER's own code takes it so is test_aiter_objects.py's."""

import enum
import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from wave64 import OPS, backends, layouts, ops, platform, quant
from wave64.backends import aiter
from wave64.op import Case
from wave64.ops.fp8_block_scaled_mm import make_case as product
from wave64.ops.fused_moe import make_case as mixture
from wave64.ops.mla_decode import make_case as latents
from wave64.ops.mla_decode_rope import make_case as latents_and_rope
from wave64.ops.paged_attention import make_case as pages
from wave64.serve.args import SERVED_BY, ServerArgs
from wave64.serve.engine.rank import named_backends
from wave64.serve.model.parallel import Ranks
from wave64.serve.model.quantized import Experts
from wave64.testing import contract


def rms_norm(input: Tensor, weight: Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0) -> Tensor:
    return OPS["rms_norm"].reference(input, weight, epsilon)


def rmsnorm2d_fwd_with_add(out: Tensor, input: Tensor, residual_in: Tensor, residual_out: Tensor, weight: Tensor,
                           epsilon: float, use_model_sensitive_rmsnorm: int = 0) -> None:
    assert len({each.data_ptr() for each in (out, input, residual_in, residual_out)}) == 4
    residual_out.copy_(residual_in + input)
    out.copy_(OPS["rms_norm"].reference(residual_out, weight, epsilon))


def topk_softmax(topk_weights: Tensor, topk_indices: Tensor, token_expert_indices: Tensor, gating_output: Tensor,
                 need_renorm: bool) -> None:
    assert token_expert_indices.shape == topk_indices.shape
    weights, ids = OPS["topk_softmax"].reference(gating_output, topk_indices.shape[1], need_renorm)
    topk_weights.copy_(weights)
    topk_indices.copy_(ids)


def grouped_topk(gating_output: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_expert_group: int, topk_group: int,
                 need_renorm: bool, is_softmax: bool = True, routed_scaling_factor: float = 1.0,
                 bias: Tensor | None = None) -> None:
    scoring = "softmax" if is_softmax else "sigmoid"
    weights, ids = OPS["grouped_topk"].reference(gating_output, topk_ids.shape[1], num_expert_group, topk_group,
                                                 need_renorm, scoring, bias, routed_scaling_factor)
    topk_weights.copy_(weights)
    topk_ids.copy_(ids)


def biased_grouped_topk(gating_output: Tensor, correction_bias: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                        num_expert_group: int, topk_group: int, need_renorm: bool,
                        routed_scaling_factor: float = 1.0) -> None:
    grouped_topk(gating_output, topk_weights, topk_ids, num_expert_group, topk_group, need_renorm, False,
                 routed_scaling_factor, correction_bias)


def dynamic_per_token_scaled_quant(out: Tensor, input: Tensor, scales: Tensor, scale_ub: Tensor | None = None) -> None:
    assert input.is_contiguous()
    q, scale = quant.quantize(input, -1, out.dtype)
    out.copy_(q)
    scales.copy_(scale)


def gemm_a8w8_blockscale(XQ: Tensor, WQ: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype = torch.bfloat16,
                         isBpreshuffled: bool = False) -> Tensor:
    assert all(x.is_contiguous() for x in (XQ, WQ, x_scale, w_scale))
    if isBpreshuffled:
        assert len(XQ) >= 16
        WQ, x_scale = layouts.untiled(WQ), x_scale.t()
    return OPS["fp8_block_scaled_mm"].reference(XQ, WQ, x_scale, w_scale, [128, 128], dtype)


def mla_decode_stage1_asm_fwd(Q: Tensor, KV: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_page_indices: Tensor,
                              kv_last_page_lens: Tensor, num_kv_splits_indptr: Tensor, work_metadata: Tensor | None,
                              work_indptr: Tensor | None, work_info_set: Tensor | None, max_seqlen_q: int,
                              softmax_scale: float, splitData: Tensor, splitLse: Tensor, output: Tensor) -> None:
    """Splits of 64 keys, one after another; those of no keys are not written."""
    assert Q.shape[1:] == (16, 576)
    assert KV.shape[1:] == (1, 1, 576)
    splits = splitData.shape[1]
    assert num_kv_splits_indptr.tolist() == [i * splits for i in range(len(Q) + 1)]
    splitData.fill_(float("nan"))
    for row in range(len(Q)):
        keys = kv_page_indices[kv_indptr[row] : kv_indptr[row + 1]]
        assert len(keys) > 0
        step = -(-len(keys) // 64 // splits) * 64 or 64
        for i, part in enumerate(keys.split(step)):
            scores = Q[row].float() @ KV[part, 0, 0].float().t() * softmax_scale
            splitLse[row, i, :, 0] = scores.logsumexp(-1)
            splitData[row, i] = scores.softmax(-1) @ KV[part, 0, 0, :512].float()


def paged_attention_v1(out: Tensor, workspace_buffer: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor,
                       scale: float, block_tables: Tensor, cu_query_lens: Tensor | None, context_lens: Tensor,
                       max_context_len: int, alibi_slopes: Tensor | None, kv_cache_dtype: str, kv_cache_layout: str,
                       logits_soft_cap: float, k_scale: Tensor, v_scale: Tensor, fp8_out_scale: Tensor | None = None,
                       partition_size: int = 256, mtp: int = 1, sliding_window: int = 0) -> Tensor:
    assert kv_cache_layout == "NHD"
    assert kv_cache_dtype == ("fp8" if key_cache.dtype == torch.uint8 else "auto")
    partitions = query.shape[0] * query.shape[1] * -(-max_context_len // partition_size)
    assert workspace_buffer.numel() == partitions * (query.shape[2] * query.element_size() + 8)
    if kv_cache_dtype == "fp8":
        key_cache, value_cache = (cache.view(quant.fp8_dtype()) for cache in (key_cache, value_cache))
    out.copy_(OPS["paged_attention"].reference(query, key_cache, value_cache, block_tables, context_lens, scale,
                                               sliding_window or -1, logits_soft_cap, None, k_scale, v_scale))
    out[context_lens == 0] = float("nan")
    return out


class ActivationType(enum.Enum):
    Silu = 0


class QuantType(enum.Enum):
    No, per_Token, per_128x128 = 0, 2, 5


def fused_moe(hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, activation=ActivationType.Silu,
              quant_type=QuantType.No, doweight_stage1=False, w1_scale=None, w2_scale=None):
    assert all(getattr(w, "is_shuffled", False) and w.is_contiguous() for w in (w1, w2))
    assert expert_mask.tolist() == [1] * len(w1) + [0]
    assert 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < len(expert_mask)
    assert (quant_type == QuantType.No) == (w1_scale is None)
    blocks = [128, 128] if quant_type == QuantType.per_128x128 else None
    return OPS["fused_moe"].reference(hidden_states, layouts.untiled(w1), layouts.untiled(w2), topk_weight, topk_ids,
                                      w1_scale, w2_scale, blocks, activation.name.lower(), doweight_stage1)


def asm_moe_tkw1(hidden_states, w1, w2, topk_weight, topk_ids, fc1_scale=None, fc2_scale=None, fc1_smooth_scale=None,
                 fc2_smooth_scale=None, a16=False, per_tensor_quant_scale=None, expert_mask=None,
                 activation=ActivationType.Silu):
    return fused_moe(hidden_states, w1, w2, topk_weight, topk_ids, expert_mask, activation, QuantType.per_Token, True,
                     fc1_scale, fc2_scale)


FUNCTIONS = (rms_norm, rmsnorm2d_fwd_with_add, topk_softmax, grouped_topk, biased_grouped_topk,
             dynamic_per_token_scaled_quant, gemm_a8w8_blockscale, mla_decode_stage1_asm_fwd, paged_attention_v1)
IN_MODULES = {"fused_moe": fused_moe, "fused_moe_bf16_asm": asm_moe_tkw1}
MOE = functools.partial(mixture, hidden=128, inter=128)
#: For operators of whose cases the adapter takes few.
CASES = {
    "fused_moe": (MOE(5, dropped=0.4), MOE(4, scales="channel", routed=9),
                  MOE(3, scales="block", block_shape=[128] * 2),
                  MOE(6, scales="channel", top_k=1, apply_router_weight_on_input=True), MOE(2, dropped=1.0)),
    "fp8_block_scaled_mm": (product(3, 128, 512), product(17, 48, 128),
                            product(18, 256, 640, out_dtype=torch.float16, padded=16)),
    "per_token_quant_fp8": tuple(dict(x=torch.randn(rows, 48).to(dtype)) for rows, dtype in (
        (1, torch.bfloat16), (7, torch.float16), (33, torch.bfloat16))),
}


def routed(tokens: int, experts: int, top_k: int, groups: int, chosen: int, renormalize: bool = True,
           bias: bool = False) -> dict:
    return dict(gating=torch.randn(tokens, experts), top_k=top_k, num_expert_group=groups, topk_group=chosen,
                renormalize=renormalize, scoring_func="sigmoid" if bias else "softmax",
                correction_bias=torch.randn(experts) if bias else None)


@pytest.fixture
def package(monkeypatch):
    """AITER, as far as adapters call it."""
    made = ModuleType("aiter")
    for function in (*FUNCTIONS, ActivationType, QuantType):
        setattr(made, function.__name__, function)
    for name, function in IN_MODULES.items():
        setattr(made, name, ModuleType(f"aiter.{name}"))
        setattr(getattr(made, name), function.__name__, function)
    monkeypatch.setattr(aiter, "package", lambda: made)
    return made


ADAPTED = [op for op in OPS.values() if "aiter" in op.backends]


def test_there_are_adapters():
    assert {op.name for op in ADAPTED} == {
        "rms_norm", "fused_add_rms_norm", "topk_softmax", "grouped_topk", "fused_moe", "mla_decode", "mla_decode_rope",
        "paged_attention", "fp8_block_scaled_mm", "per_token_quant_fp8"}


@pytest.mark.parametrize("op", ADAPTED, ids=lambda op: op.name)
def test_an_adapter_keeps_the_contract(op, package):
    backend, served = op.backends["aiter"], 0
    assert backend.absent is not None
    assert backend.absent(None) is None
    made = [Case(f"{i}", lambda case=case: case) for i, case in enumerate(CASES.get(op.name, ()))]
    for case in made or (case for case in op.cases() if not case.large):
        if backend.supports(**contract.draw(case, "cpu", 0)) is None:
            contract.verify(op, "aiter", case, "cpu")
            served += 1
    assert served >= 3


@pytest.mark.parametrize("op", ADAPTED, ids=lambda op: op.name)
def test_another_signature_is_a_reason_and_no_crash(op, package):
    absent = op.backends["aiter"].absent
    for name in [function.__name__ for function in FUNCTIONS]:
        delattr(package, name)
    for name, function in IN_MODULES.items():
        delattr(getattr(package, name), function.__name__)
    assert absent(None).startswith("this aiter has no ")
    for function in FUNCTIONS:
        setattr(package, function.__name__, lambda x, /, strange: None)
    for name, function in IN_MODULES.items():
        setattr(getattr(package, name), function.__name__, lambda x, /, strange: None)
    assert " takes no " in absent(None)
    assert ", strange besides" in absent(None)


def test_each_difference_is_named():
    module = ModuleType("another")
    vars(module)["norm"] = lambda input, weight, epsilon, layout, fast=True: None
    given = ["input", "weight", "epsilon"]
    assert aiter.differs(module, "norm", [*given, "layout"]) is None
    assert aiter.differs(module, "norm", given) == "this aiter's norm takes layout besides"
    assert aiter.differs(module, "norm", [*given, "layout", "slow"]) == "this aiter's norm takes no slow"
    assert aiter.differs(module, "norm", [*given, "layout?", "slow?"]) is None
    vars(module)["anything"] = lambda *args, **kwargs: None
    assert aiter.differs(module, "anything", given) == "this aiter's anything has no signature to compare"
    missing = aiter.differs(module, "inner.norm", given)
    assert missing.startswith("this aiter's inner cannot be imported (ModuleNotFoundError: ")


def test_why_aiter_does_not_serve_is_said(monkeypatch):
    assert aiter.missing("cpu") == "AITER's kernels want a GPU"
    monkeypatch.setattr(aiter.platform, "is_hip", lambda: False)
    assert aiter.missing("cuda") == "AITER's kernels want a ROCm build of torch"
    monkeypatch.setattr(aiter.platform, "is_hip", lambda: True)
    monkeypatch.setattr(aiter, "package", lambda: "aiter cannot be imported (RuntimeError: no driver)")
    assert aiter.missing("cuda") == "aiter cannot be imported (RuntimeError: no driver)"


def newer(Q, KV, qo_indptr, kv_indptr, kv_page_indices, kv_last_page_lens, num_kv_splits_indptr, work_meta_data,
          work_indptr, work_info_set, max_seqlen_q, page_size, nhead_kv, softmax_scale, splitData, splitLse, output,
          lse=None, q_scale=None, kv_scale=None):
    """The signature of AITER's repository in 2026, which wants the page's size and the number of heads of keys."""
    assert (page_size, nhead_kv) == (1, 1)
    mla_decode_stage1_asm_fwd(Q, KV, qo_indptr, kv_indptr, kv_page_indices, kv_last_page_lens, num_kv_splits_indptr,
                              work_meta_data, work_indptr, work_info_set, max_seqlen_q, softmax_scale, splitData,
                              splitLse, output)


def test_two_versions_of_a_function_are_served(package):
    backend, given = ops.mla_decode.backends["aiter"], latents([70, 0], heads=3)
    old = backend.run(**given)[0]
    package.mla_decode_stage1_asm_fwd = newer
    assert backend.absent(None) is None
    assert torch.equal(backend.run(**given)[0], old)


#: Signatures of AITER's repository in 2026: name -> parameters; "=" behind one that need not be given.
NEWER = {
    "rms_norm": "input weight epsilon use_model_sensitive_rmsnorm=",
    "rmsnorm2d_fwd_with_add": "out input residual_in residual_out weight epsilon gemma_norm= "
                              "use_model_sensitive_rmsnorm=",
    "topk_softmax": "topk_weights topk_indices token_expert_indices gating_output need_renorm num_shared_experts= "
                    "shared_expert_scoring_func=",
    "grouped_topk": "gating_output topk_weights topk_ids num_expert_group topk_group need_renorm is_softmax= "
                    "routed_scaling_factor=",
    "biased_grouped_topk": "gating_output correction_bias topk_weights topk_ids num_expert_group topk_group "
                           "need_renorm routed_scaling_factor=",
    "dynamic_per_token_scaled_quant": "out input scales scale_ub= shuffle_scale= num_rows= num_rows_factor=",
    "gemm_a8w8_blockscale": "XQ WQ x_scale w_scale dtype= isBpreshuffled=",
    "mla_decode_stage1_asm_fwd": "Q KV qo_indptr kv_indptr kv_page_indices kv_last_page_lens num_kv_splits_indptr "
                                 "work_meta_data work_indptr work_info_set max_seqlen_q page_size nhead_kv "
                                 "softmax_scale splitData splitLse output lse= q_scale= kv_scale=",
    "paged_attention_v1": "out workspace_buffer query key_cache value_cache scale block_tables cu_query_lens "
                          "context_lens max_context_len alibi_slopes kv_cache_dtype kv_cache_layout logits_soft_cap "
                          "k_scale v_scale fp8_out_scale= partition_size= mtp= sliding_window=",
    "fused_moe.fused_moe": "hidden_states w1 w2 topk_weight topk_ids expert_mask= activation= quant_type= "
                           "doweight_stage1= w1_scale= w2_scale= a1_scale= a2_scale= block_size_M= num_local_tokens= "
                           "moe_sorting_dispatch_policy= dtype= hidden_pad= intermediate_pad= bias1= bias2= splitk= "
                           "swiglu_limit= beta= linear_beta= gate_mode= shared_w1= shared_w2= shared_w1_scale= "
                           "shared_w2_scale= shared_expert_id= stage2_scatter=",
    "fused_moe_bf16_asm.asm_moe_tkw1": "hidden_states w1 w2 topk_weight topk_ids fc1_scale= fc2_scale= "
                                       "fc1_smooth_scale= fc2_smooth_scale= a16= per_tensor_quant_scale= expert_mask= "
                                       "activation=",
}


def signed(parameters: str) -> Callable:
    """A function with these parameters."""
    def function(**given): ...

    function.__signature__ = inspect.Signature([inspect.Parameter(
        name.rstrip("="), inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None if name.endswith("=") else inspect.Parameter.empty) for name in parameters.split()])
    return function


@pytest.mark.parametrize("op", ADAPTED, ids=lambda op: op.name)
def test_newer_signatures_are_served(op, package):
    for name, parameters in NEWER.items():
        inner, _, function = name.rpartition(".")
        setattr(getattr(package, inner) if inner else package, function, signed(parameters))
    assert op.backends["aiter"].absent(None) is None


@pytest.mark.parametrize("op", ADAPTED, ids=lambda op: op.name)
def test_a_batch_of_no_tokens_calls_nothing(op, package, monkeypatch):
    """A rank of data-parallel attention has such batches, and a backend that was demanded has to serve them."""
    none, weight = torch.ones(0, 48).bfloat16(), torch.ones(48).bfloat16()
    case = {"rms_norm": dict(x=none, weight=weight), "per_token_quant_fp8": dict(x=none),
            "fused_add_rms_norm": dict(x=none, residual=none.clone(), weight=weight), "fused_moe": MOE(0),
            "topk_softmax": dict(gating=none, top_k=2, renormalize=True), "grouped_topk": routed(0, 16, 2, 2, 1),
            "fp8_block_scaled_mm": product(0, 64, 128), "mla_decode": latents([]),
            "mla_decode_rope": latents_and_rope([]), "paged_attention": pages([])}[op.name]
    assert op.backends["aiter"].supports(**case) is None
    for function in FUNCTIONS:
        monkeypatch.delattr(package, function.__name__)
    got, expected = op.backends["aiter"].run(**case), op.reference(**case)
    for mine, its in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        assert mine is its is None or (mine.shape, mine.dtype) == (its.shape, its.dtype)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_scales_are_not_shuffled_where_a_version_does_so_unless_told(width, package):
    calls = []
    package.dynamic_per_token_scaled_quant = lambda out, input, scales, scale_ub=None, shuffle_scale=True: calls.append(
        shuffle_scale)
    ops.per_token_quant_fp8.backends["aiter"].run(x=torch.ones(3, width).bfloat16())
    assert calls == [False]


@pytest.mark.parametrize(("op", "given", "reason"), [
    ("fused_moe", MOE(3, scales="tensor"), "have one an expert"),
    ("fused_moe", MOE(3, activation="gelu"), "takes silu, not gelu"),
    ("fused_moe", MOE(3, top_k=1, apply_router_weight_on_input=True), "FP8 weights that have a scale a channel alone"),
    ("fused_moe", MOE(3, scales="block", block_shape=[128] * 2, scale_ue8m0=True), "powers of two"),
    ("fused_moe", MOE(3, inter=96), "a multiple of 128"),
    ("fp8_block_scaled_mm", product(3, 64, 128, [64, 64]), "blocks of 128 x 128"),
    ("fp8_block_scaled_mm", product(3, 24, 128), "a multiple of 16 rows"),
    ("fp8_block_scaled_mm", product(3, 64, 128, out_dtype=torch.float32), "gives bf16 and fp16"),
    ("mla_decode", latents([5], dtype=torch.float16), "takes bf16 queries and latents"),
    ("mla_decode", latents([5], rank=128), "takes latents of 512 \\+ 64"),
    ("paged_attention", pages([5], heads=34, kv_heads=2, head_dim=64), "at most 16 heads"),
    ("paged_attention", pages([5], head_dim=96), "heads of 64 or 128"),
    ("paged_attention", pages([5], fp8=True, per_head=True), "one scale of keys and one of values"),
    ("paged_attention", pages([5], sliding_window=3, logit_cap=30.0), "caps the logits of keys outside the window"),
    ("grouped_topk", routed(3, 64, 6, 32, 9), "takes 1, 2, 4 or 8 groups of experts, these are 32"),
    ("grouped_topk", routed(64600, 16, 2, 2, 1, renormalize=False, bias=True), "more than 212 tokens"),
    ("per_token_quant_fp8", dict(x=torch.ones(2, 30, dtype=torch.bfloat16)), "multiple of 16 columns"),
])  # fmt: skip
def test_what_is_not_served_has_a_reason(op, given, reason, package):
    with pytest.raises(AssertionError, match=reason):
        assert OPS[op].backends["aiter"].supports(**given) is None, OPS[op].backends["aiter"].supports(**given)


def test_fp8_of_the_other_flavor_is_refused(package):
    experts = dict(MOE(3, scales="channel"))
    for name in ("w13", "w2"):
        experts[name] = experts[name].view(torch.float8_e4m3fn)
    for arch, reason in (("gfx942", "e4m3fn on gfx942, whose kernels have e4m3fnuz"), ("gfx950", None)):
        with platform.target(arch):
            assert ops.fused_moe.backends["aiter"].supports(**experts) == reason


def test_gfx950_products_take_tiled_weights_and_rows_of_their_own(package):
    """Few rows are padded to the 16 that its assembly reads; a weight is laid out once."""
    given, calls = product(3, 256, 512), []
    package.gemm_a8w8_blockscale = functools.wraps(gemm_a8w8_blockscale)(
        lambda **kwargs: calls.append(kwargs) or gemm_a8w8_blockscale(**kwargs))
    with platform.target("gfx950"):
        got = [ops.fp8_block_scaled_mm.backends["aiter"].run(**given) for _ in range(2)]
    assert [call["isBpreshuffled"] for call in calls] == [True, True]
    assert calls[0]["WQ"] is calls[1]["WQ"]
    assert torch.equal(got[0], got[1])
    torch.testing.assert_close(got[0], ops.fp8_block_scaled_mm.reference(**given))
    with platform.target("gfx950"):  # half a workgroup's columns are the templates'
        ops.fp8_block_scaled_mm.backends["aiter"].run(**product(3, 384, 512))
    assert [call["isBpreshuffled"] for call in calls] == [True, True, False]


@pytest.fixture
def on_a_card(package, monkeypatch):
    """As on a GPU that AITER serves."""
    monkeypatch.setattr(aiter, "missing", lambda device_type: None)
    return package


def test_experts_are_laid_out_once_as_a_model_is_loaded(on_a_card):
    """Where AITER was asked for by name, and nothing else will read them."""
    config = SimpleNamespace(hidden_size=128, hidden_act="silu", quantization=None)
    plain, moved = (Experts(config, Ranks(), 3, 128, False) for _ in range(2))
    for name in ("w13", "w2"):
        drawn = torch.randn(getattr(plain, name).shape)
        for each in (plain, moved):
            getattr(each, name).data.copy_(drawn)
    plain.finish()
    given = torch.randn(4, 128).bfloat16(), torch.rand(4, 2), torch.randint(3, (4, 2), dtype=torch.int32)
    plain, moved = plain.bfloat16(), moved.bfloat16()
    with backends.use(fused_moe="aiter"):
        moved.finish()
        torch.testing.assert_close(moved(*given), plain(*given))
    assert not layouts.is_tiled(plain.w13)
    for name in ("w13", "w2"):
        assert layouts.is_tiled(getattr(moved, name))
        assert torch.equal(layouts.untiled(getattr(moved, name)), getattr(plain, name))
    with backends.use("aiter"):  # preferred: another backend may serve a call that it declines
        assert layouts.as_read_by(ops.fused_moe, plain.w13) is plain.w13


@pytest.mark.parametrize("flag", ["moe_runner_backend", "attention_backend", "fp8_gemm_backend"])
def test_flags_of_the_server_bind_the_adapters_or_say_why_not(flag, on_a_card, monkeypatch):
    args = ServerArgs.from_cli(["demo-llama", "--device", "cpu", f"--{flag.replace('_', '-')}", "aiter"])
    with named_backends(args):
        served = [op for op in SERVED_BY[flag] if OPS[op].bound["cpu"][0].name == "aiter"]
    assert served == [op for op in SERVED_BY[flag] if "aiter" in OPS[op].backends]
    assert served
    monkeypatch.undo()
    with pytest.raises(backends.NotSupported, match=f"^--{flag.replace('_', '-')}: aiter cannot serve .*want a GPU"):
        named_backends(args)
