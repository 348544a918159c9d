"""Tiny DeepSeek checkpoints in Hugging Face format; the paged driver is helpers_llama's with one latent per token."""

from pathlib import Path

import torch
import transformers
from helpers_llama import PagedDriver
from safetensors.torch import load_file, save_file

from wave64 import quant

BASE = dict(vocab_size=101, hidden_size=48, intermediate_size=52, moe_intermediate_size=20, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5,
            n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, n_group=4, topk_group=2,
            first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
            v_head_dim=12, routed_scaling_factor=1.5, eos_token_id=None, bos_token_id=None)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=300.0, original_max_position_embeddings=32, beta_fast=4.0,
            beta_slow=0.5, mscale=0.707, mscale_all_dim=0.707)  # fmt: skip

#: name -> (version, what differs from BASE): q_lora none and some, softmax and sigmoid, 1, 2 and 4 groups, first dense
#: layers 0, 1, 2, yarn on and off, 3, 4 and 16 heads, values as wide as keys, narrower and wider
DEEPSEEKS = {
    "v3": (3, dict()),
    "v3-no_q_lora-groups1-dense0": (3, dict(q_lora_rank=None, n_group=1, topk_group=1, first_k_dense_replace=0)),
    "v3-yarn-heads16-groups2": (3, dict(rope_parameters=YARN, num_attention_heads=16, num_key_value_heads=16,
                                        n_group=2, topk_group=1)),
    "v3-dense2-heads3-v_wider": (3, dict(first_k_dense_replace=2, num_attention_heads=3, num_key_value_heads=3,
                                         v_head_dim=24, norm_topk_prob=False)),
    "v3-not_interleaved-shared2": (3, dict(rope_interleave=False, n_shared_experts=2, v_head_dim=16)),
    "v2-greedy-no_q_lora": (2, dict(topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=None)),
    "v2-groups4-yarn": (2, dict(topk_method="group_limited_greedy", rope_parameters=YARN)),
    "v2-groups2-dense0-heads3": (2, dict(topk_method="group_limited_greedy", n_group=2, topk_group=1,
                                         first_k_dense_replace=0, num_attention_heads=3, num_key_value_heads=3)),
    "v2-greedy-heads16-dense2": (2, dict(topk_method="greedy", n_group=1, topk_group=1, num_attention_heads=16,
                                         num_key_value_heads=16, first_k_dense_replace=2)),
}  # fmt: skip
CLASSES = {2: (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
           3: (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM)}


def make_deepseek(folder: Path, version: int, max_shard_size: str = "1GB", **overrides) -> transformers.PreTrainedModel:
    """Saves a random fp32 DeepSeek to `folder` and returns it. Every weight is drawn so that leaving it out shows."""
    torch.manual_seed(3)
    config_class, model_class = CLASSES[version]
    model = model_class(config_class(**{**BASE, **overrides}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                weight.normal_(0.0, 0.2)
            elif "inv_freq" not in name:
                weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def quantize(folder: Path, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Rewrites the checkpoint in `folder` in FP8 as DeepSeek-V3's is; returns its weights, dequantized, by name."""
    file, exact, stored = folder / "model.safetensors", {}, {}
    for name, value in load_file(file).items():
        exact[name] = value
        plain = "proj" not in name
        if plain:
            stored[name] = value
            continue
        stored[name], stored[f"{name}_scale_inv"] = quant.quantize_weight_blocks(value, list(block),
                                                                                 torch.float8_e4m3fn)
        exact[name] = quant.dequantize(stored[name], stored[f"{name}_scale_inv"], list(block))
    save_file(stored, file, metadata={"format": "pt"})
    return exact


class LatentDriver(PagedDriver):
    """PagedDriver over a pool of latents, which also says where each prefilling sequence's earlier tokens lie."""

    def pool(self, config, num_pages, page_size, dtype, device):
        width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
        return [(torch.full((num_pages, page_size, width), float("nan"), dtype=dtype, device=device),)
                for _ in range(config.num_layers)]

    def prefix(self, prefills: dict[str, list[int]]) -> dict:
        before = {name: self.lengths[name] - len(tokens) for name, tokens in prefills.items()}
        slots = [self.pages[name][p // self.page_size] * self.page_size + p % self.page_size
                 for name, length in before.items() for p in range(length)]
        starts = [0]
        for length in before.values():
            starts.append(starts[-1] + length)
        return dict(prefix_slots=torch.tensor(slots, dtype=torch.int64, device=self.device),
                    cu_seqlens_prefix=torch.tensor(starts, dtype=torch.int32, device=self.device),
                    max_prefix=max(before.values(), default=0))

