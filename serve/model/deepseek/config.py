"""What config.json says of a DeepSeek-V2, V3 or R1, in DeepSeek's own spelling and in transformers'.

Names that only one of the two has: DeepSeek's V3 says scoring_func and topk_method, which transformers' V3 takes for
granted; rope_interleave and head_dim are transformers'.
"""

import json
import math

from wave64.serve.model.config import (
    Keys,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    QuantConfig,
    RopeConfig,
    common,
    read_rope,
)

#: Training's, or how a deployment divides its experts: without effect on what a forward pass computes.
WITHOUT_EFFECT = ("aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits", "router_aux_loss_coef")
#: Read, but without meaning for a greedy router.
GROUPS = ("n_group", "topk_group")


def read_config(architecture: str, keys: Keys) -> ModelConfig:
    is_v3 = architecture == "DeepseekV3ForCausalLM"
    for key in (*WITHOUT_EFFECT, *GROUPS):
        keys.get(key)
    for key in ("attention_bias", "mlp_bias"):
        if keys.flag(key):
            raise keys.error(key, True, "false: biases of DeepSeek's projections are not served")
    num_heads, rope_dim = keys.count("num_attention_heads"), keys.count("qk_rope_head_dim", 64)
    if keys.count("num_key_value_heads", num_heads) != num_heads:
        raise keys.error("num_key_value_heads", keys.get("num_key_value_heads"),
                         f"num_attention_heads, {num_heads}: all heads share one latent")
    if rope_dim % 2:
        raise keys.error("qk_rope_head_dim", rope_dim, "an even number: RoPE rotates pairs of elements")
    nope = keys.count("qk_nope_head_dim", 128)
    for key, what in (("qk_head_dim", nope + rope_dim), ("head_dim", rope_dim)):
        if keys.get(key) not in (None, what):
            raise keys.error(key, keys.get(key), f"{what}, as qk_nope_head_dim and qk_rope_head_dim say")
    longest = keys.count("max_position_embeddings", 4096 if is_v3 else 2048)
    rope = read_rope(keys, longest)
    if (rope.mscale is None) != (rope.mscale_all_dim is None):
        key = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
        raise keys.error(key, keys.get(key), "mscale and mscale_all_dim or neither: DeepSeek's code and transformers' "
                                             "disagree what one alone means")
    interleave = keys.flag("rope_interleave", not is_v3 or "rope_interleave" not in keys.raw)
    if keys.flag("rope_interleaved", interleave) != interleave:
        raise keys.error("rope_interleaved", not interleave, f"{json.dumps(interleave)}, as rope_interleave has it")
    if not interleave and not is_v3:
        raise keys.error("rope_interleave", False, "true: a DeepSeek-V2 rotates pairs of adjacent elements")
    mla = MLAConfig(
        q_lora_rank=_count_or_none(keys, "q_lora_rank", 1536),
        kv_lora_rank=keys.count("kv_lora_rank", 512),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=keys.count("v_head_dim", 128),
        rope_interleave=interleave,
        softmax_scale=(nope + rope_dim) ** -0.5 * _softening(rope),
    )
    return ModelConfig(
        architecture=architecture,
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=nope + rope_dim,
        attention_bias=False,
        mlp_bias=False,
        mla=mla,
        moe=_experts(keys, is_v3),
        quantization=_blocks(keys),
        num_nextn_predict_layers=_count_or_none(keys, "num_nextn_predict_layers", 0),
        **common(keys, rope, longest, bos=0 if is_v3 else 1, eos=1 if is_v3 else 2),
    )


def _count_or_none(keys: Keys, key: str, missing: int) -> int:
    """A count that may be 0; null means 0."""
    value = keys.get(key, 0 if key in keys.raw else missing)
    return 0 if value == 0 and value is not False else keys.count(key, missing)


def _count(keys: Keys, key: str, missing: int | None) -> int:
    """A positive integer, which null is not. missing: what the key means where it is not there; None: it has to be."""
    return keys.count(key, None if key in keys.raw else missing)


def _softening(rope: RopeConfig) -> float:
    """What YaRN's mscale_all_dim makes of the softmax scale: the square of its factor on queries and keys alike."""
    if rope.rope_type != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def _experts(keys: Keys, is_v3: bool) -> MoEConfig:
    experts = _count(keys, "n_routed_experts", 256 if is_v3 else 64)
    top_k = _count(keys, "num_experts_per_tok", 8 if is_v3 else None)
    scoring = keys.choice("scoring_func", "sigmoid" if is_v3 else "softmax", {"sigmoid": "sigmoid"} if is_v3 else
                          {"softmax": "softmax"})
    methods = {"noaux_tc": True} if is_v3 else {"greedy": False, "group_limited_greedy": True}
    grouped = keys.choice("topk_method", "noaux_tc" if is_v3 else "greedy", methods)
    groups = kept = 1
    if grouped:
        groups = _count(keys, "n_group", 8 if is_v3 else None)
        kept = _count(keys, "topk_group", 4 if is_v3 else None)
    if experts % groups:
        raise keys.error("n_group", groups, f"a divisor of n_routed_experts, {experts}")
    if kept > groups:
        raise keys.error("topk_group", kept, f"at most n_group, {groups}")
    if is_v3 and kept < groups and experts // groups < 2:
        raise keys.error("n_group", groups, f"at least two of {experts} experts in a group: it counts as its two best")
    if top_k > kept * (experts // groups):
        raise keys.error("num_experts_per_tok", top_k, f"at most {kept * (experts // groups)}, the experts of the "
                                                       f"{kept} groups of {groups} that are kept")
    norm_topk_prob = keys.flag("norm_topk_prob", is_v3)
    if norm_topk_prob and not is_v3:
        raise keys.error("norm_topk_prob", True, "false: V2's own code and transformers' disagree what else means")
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        num_groups=groups,
        topk_groups=kept,
        scoring_func=scoring,
        correction_bias=is_v3,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=keys.number("routed_scaling_factor", 2.5 if is_v3 else 1.0),
        num_shared_experts=_count_or_none(keys, "n_shared_experts", 1 if is_v3 else 2),
        intermediate_size=keys.count("moe_intermediate_size", 2048 if is_v3 else 1407),
        first_dense_layers=_count_or_none(keys, "first_k_dense_replace", 3 if is_v3 else 0),
        layer_freq=keys.count("moe_layer_freq", 1),
    )


def _blocks(keys: Keys) -> QuantConfig | None:
    """DeepSeek-V3's own form of FP8, and no other."""
    if not keys.get("quantization_config"):
        return None
    quantization = keys.group("quantization_config")
    quantization.choice("quant_method", "none", {"fp8": "fp8"})
    known = {"fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}
    for key, only in known.items():
        quantization.choice(key, only, {only: only})
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise quantization.error("weight_block_size", block, "two positive integers, rows and columns of a block")
    if block[1] % 32:
        raise quantization.error("weight_block_size", block, "columns of a block that are a multiple of 32")
    quantization.get("modules_to_not_convert")  # names what is stored plain, which the tensors' dtypes say, too
    scale_ue8m0 = quantization.choice("scale_fmt", "float", {"float": False, "ue8m0": True})
    kv_scales = quantization.choice("kv_cache_scheme", "none", {"none": False, "static": True})
    quantization.refuse_the_rest()
    return QuantConfig((block[0], block[1]), scale_ue8m0, kv_scales)
