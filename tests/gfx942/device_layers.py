"""A layer of a production model with its real dimensions, and of the demos, on an emulated device and on the CPU: dummy
weights, caches of which a few pages are in use. For a process without TRITON_INTERPRET."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import wave64
from wave64.serve.engine.runner import Runner
from wave64.serve.engine.schedule import Schedule
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.load import load_model
from wave64.testing.step_cost import Step, StepCosts

GIB, PAGE = 2**30, 16
VOCAB = 1024  # the head is no part of a layer
CLOSE = 0.04  # logits, next to the largest, where both are right,
#: and of a model in FP8, where roundings flip, and with them experts: norms of DeepSeek-V3's layer that are changed by
#: a rounding of bf16 move the CPU's own logits by 0.06
CLOSE_FP8 = 0.1

_LLAMA = dict(architectures=["LlamaForCausalLM"], hidden_act="silu", num_hidden_layers=1, vocab_size=VOCAB,
              max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, torch_dtype="bfloat16",
              head_dim=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
_DEEPSEEK = dict(num_hidden_layers=1, vocab_size=VOCAB, max_position_embeddings=8192, rms_norm_eps=1e-6,
                 rope_theta=10000.0, torch_dtype="bfloat16", hidden_act="silu", kv_lora_rank=512, qk_nope_head_dim=128,
                 qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=0, moe_layer_freq=1, bos_token_id=0,
                 eos_token_id=1, tie_word_embeddings=False, attention_bias=False)
#: What one rank has: at TP8 an eighth of heads and intermediate features.
LAYERS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                                  num_key_value_heads=8),
    "llama-3.1-70b-tp8": _LLAMA | dict(hidden_size=8192, intermediate_size=28672 // 8, num_attention_heads=64 // 8,
                                       num_key_value_heads=8 // 8),
    "deepseek-v2-lite": _DEEPSEEK | dict(
        architectures=["DeepseekV2ForCausalLM"], hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, n_group=1, topk_group=1, topk_method="greedy", scoring_func="softmax",
        norm_topk_prob=False, routed_scaling_factor=1.0),
    "deepseek-v3-tp8": _DEEPSEEK | dict(
        architectures=["DeepseekV3ForCausalLM"], hidden_size=7168, intermediate_size=18432 // 8,
        moe_intermediate_size=2048 // 8, num_attention_heads=128 // 8, num_key_value_heads=128 // 8, q_lora_rank=1536,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
        topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
        quantization_config=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                                 weight_block_size=[128, 128])),
}


@dataclass(frozen=True)
class Work:
    """A step: `batch` sequences that decode behind `context` tokens each, or one prompt's chunk of `chunk` tokens."""

    batch: int
    context: int
    chunk: int = 0


def read(config: dict[str, Any]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        return ModelConfig.from_folder(folder)


def pages_of(work: Work, num_pages: int) -> list[list[int]]:
    """Of each sequence: pages from the pool's begin and from its end in turn, none twice."""
    each = -(-(work.context + max(1, work.chunk)) // PAGE)
    numbers = [number // 2 if number % 2 == 0 else num_pages - 1 - number // 2 for number in range(each * work.batch)]
    return [numbers[i * each:(i + 1) * each] for i in range(work.batch)]


def run(config: ModelConfig, works: list[Work], num_pages: int, capture: bool, steps: int = 1,
        ready: Callable[[], object] = lambda: None) -> list[Tensor]:
    """The logits of each of the works, `steps` of a decode one behind the other. ready: called before the first."""
    model = load_model(config, "", config.dtype, "cpu", "dummy")
    rows = max(work.batch for work in works) + 1  # so that three run in a graph of four
    runner = Runner(model, config, config.dtype, torch.device("cpu"), num_pages, PAGE, rows, capture)
    logits = []
    ready()
    for work in works:
        pages = pages_of(work, num_pages)
        fill(runner, pages)
        new = work.chunk or 1
        for step in range(steps):
            tokens = np.random.default_rng(step).integers(0, config.vocab_size, work.batch * new).tolist()
            schedule = Schedule(
                0 if work.chunk else work.batch, list(range(work.batch)), [work.context + step] * work.batch,
                [new] * work.batch, [1] * work.batch, tokens,
                [(row, 0, own) for row, own in enumerate(pages)] if step == 0 else [])
            logits.append(runner.forward(schedule).float().clone())
    return logits


def fill(runner: Runner, pages: list[list[int]]) -> None:
    """Numbers, the same ones on every device, in the pages of a step; no other page is touched."""
    for layer, caches in enumerate(runner.kv_cache):
        for i, cache in enumerate(caches):
            generator = torch.Generator().manual_seed(100 * layer + i)
            for number in (number for own in pages for number in own):
                noise = torch.randn(cache.shape[1:], generator=generator)
                cache[number].copy_(noise)


def emulated(arch: str, config: ModelConfig, works: list[Work], num_pages: int, steps: int = 1,
             mutation: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
             counts: bool = True) -> tuple[list[Tensor], Step, int]:
    """(logits, what the works cost, wave instructions). counts: False for no cost, which is much faster."""
    costs = StepCosts(arch)
    costs.is_counting = counts
    with wave64.emulate(arch, meter=costs) as device, mutation(), costs.watching():
        logits = run(config, works, num_pages, not works[0].chunk, steps, costs.take)
    return logits, costs.take(), device.counts.instructions


def on_cpu(arch: str, config: ModelConfig, works: list[Work], num_pages: int, steps: int = 1) -> list[Tensor]:
    """The logits by references and the CPU's backends, in the FP8 flavor of the architecture: in the other one every
    number that is quantized would be rounded elsewhere."""
    with wave64.platform.target(arch):
        return run(config, works, num_pages, False, steps)


def distances(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Of each step: how far logits are from those wanted, next to how large these are."""
    return [float((a - b).abs().max() / b.abs().max()) if bool(a.isfinite().all()) else float("inf")
            for a, b in zip(got, wanted, strict=True)]


def layer(name: str, arch: str, work: Work, counts: bool = True, pool_bytes: int = 5 * GIB // 2) -> dict[str, Any]:
    """A step of one layer in a pool beyond 2 GiB on the device, and its logits' distance from the CPU's."""
    config = read(LAYERS[name])
    per_page = PAGE * 2 * (config.num_kv_heads * config.head_dim if config.mla is None else 512 + 64)
    num_pages = pool_bytes // per_page
    logits, step, instructions = emulated(arch, config, [work], num_pages, counts=counts)
    wanted = on_cpu(arch, config, [work], num_pages)
    return {"distance": max(distances(logits, wanted)), "step": step, "instructions": instructions,
            "close": CLOSE if config.quantization is None else CLOSE_FP8}
