"""Decode steps of DeepSeek on one GPU, weights random.

    python tests/bench/decode_deepseek.py layers [--batch N ...] [--context N] [--tiny]
    python tests/bench/decode_deepseek.py lite [--batch N ...] [--tokens N] [--tiny]

layers: four layers of DeepSeek-V3 as one of 8 GPUs has them (16 heads, all 256 experts in slices of 256, FP8 blocks),
as a captured graph, next to the sum of the layers' byte rooflines: weights of the experts that a batch chooses and all
others, and latents, each read once. Below each row, where the time goes, kernel by kernel.
lite: DeepSeek-V2-Lite as published, bf16, next to transformers on the same card: tokens per second of greedy decoding
from typing import Any
from prompts of 32 tokens. Both models hold the same weights, and their logits after the prompt are compared.
`--tiny` takes small sizes and works on a CPU: it is there to test this file.
"""

import argparse
import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from wave64 import platform
from wave64.serve.engine.graphs import DecodeGraphs
from wave64.serve.model.batch import Batch
from wave64.serve.model.config import MLAConfig, ModelConfig, MoEConfig, QuantConfig, RopeConfig
from wave64.serve.model.deepseek import DeepseekForCausalLM
from wave64.serve.model.linear import Layer
from wave64.serve.model.load import fill_with_noise
from wave64.serve.model.parallel import ONE
from wave64.serve.model.quantized import Experts
from wave64.testing import timing

PAGE_SIZE = 64


def config(layers: int, hidden: int, heads: int, vocab: int, mla: MLAConfig, moe: MoEConfig, intermediate: int,
           blocks: tuple[int, int] | None, context: int, architecture: str) -> ModelConfig:
    return ModelConfig(
        architecture, vocab, hidden, intermediate, layers, heads, 1, mla.qk_nope_head_dim + mla.qk_rope_head_dim, 1e-6,
        RopeConfig(), context, False, False, False, "silu", torch.bfloat16, context, mla=mla, moe=moe,
        quantization=blocks and QuantConfig(blocks))


def v3_slice(tiny: bool, context: int) -> ModelConfig:
    """Four sparse layers, and next to no vocabulary."""
    if tiny:
        mla = MLAConfig(32, 64, 16, 16, 16, True, 32**-0.5)
        moe = MoEConfig(8, 2, 4, 2, "sigmoid", True, True, 2.5, 1, 128, 0, 1)
        return config(2, 128, 4, 128, mla, moe, 128, (128, 128), context, "DeepseekV3ForCausalLM")
    mla = MLAConfig(1536, 512, 128, 64, 128, True, 192**-0.5)
    moe = MoEConfig(256, 8, 8, 4, "sigmoid", True, True, 2.5, 1, 256, 0, 1)
    return config(4, 7168, 16, 1024, mla, moe, 2304, (128, 128), context, "DeepseekV3ForCausalLM")


def v2_lite(tiny: bool, context: int) -> ModelConfig:
    if tiny:
        mla = MLAConfig(0, 64, 16, 16, 16, True, 32**-0.5)
        moe = MoEConfig(8, 2, 1, 1, "softmax", False, False, 1.0, 2, 32, 1, 1)
        return config(2, 64, 4, 128, mla, moe, 96, None, context, "DeepseekV2ForCausalLM")
    mla = MLAConfig(0, 512, 128, 64, 128, True, 192**-0.5)
    moe = MoEConfig(64, 6, 1, 1, "softmax", False, False, 1.0, 2, 1408, 1, 1)
    return config(27, 2048, 16, 102400, mla, moe, 10944, None, context, "DeepseekV2ForCausalLM")


def build(of: ModelConfig, device: str, theirs: nn.Module | None = None) -> nn.Module:
    """The model with the weights of `theirs`, transformers' model; with noise for None."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(of.dtype)
    try:
        with torch.device(device):
            model = DeepseekForCausalLM(of, ONE).eval()
    finally:
        torch.set_default_dtype(before)
    if theirs is None:
        fill_with_noise(model)
    else:
        copy_weights(theirs, model)
    return model


def pool(of: ModelConfig, sequences: int, tokens: int, device: str) -> list[tuple[Tensor]]:
    """Room for so many tokens of each sequence, filled with latents of about the size that norms leave."""
    pages = -(-tokens // PAGE_SIZE) * sequences
    shape = (pages, PAGE_SIZE, of.mla.kv_lora_rank + of.mla.qk_rope_head_dim)
    return [(torch.randn(shape, device=device, dtype=of.dtype),) for _ in range(of.num_layers)]


def decode_batch(sequences: int, length: int, tokens: int, device: str, ids: Tensor | None = None) -> Batch:
    """One new token each, the `length`-th; sequences lie one after another in the pool, `tokens` apart."""
    pages = -(-tokens // PAGE_SIZE)
    table = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    at = torch.full((sequences,), length - 1)
    slots = table[:, (length - 1) // PAGE_SIZE].long() * PAGE_SIZE + (length - 1) % PAGE_SIZE
    batch = Batch(torch.zeros(sequences, dtype=torch.int64) if ids is None else ids, at, slots, table,
                  torch.full((sequences,), length, dtype=torch.int32), sequences, torch.zeros(1, dtype=torch.int32), 0,
                  torch.arange(sequences))
    return Batch(**{name: value.to(device) if isinstance(value, Tensor) else value
                    for name in Batch.__slots__ for value in [getattr(batch, name)]})


def replay_of(graphs: DecodeGraphs, batch: Batch) -> Callable[[], Tensor]:
    """A captured step of this batch, its inputs on the device."""
    fields = ("input_ids", "positions", "slot_mapping", "seq_lens")
    packed = graphs.pack({name: getattr(batch, name).cpu().numpy() for name in fields}, batch.num_decodes)["packed"]
    return functools.partial(graphs.replay, torch.from_numpy(packed).to(batch.page_table.device), batch.page_table,
                             batch.num_decodes)


def experts_chosen(model: Any, run: Callable[[], object]) -> dict[str, int]:
    """How many experts a step reads, by the name of the layer that holds them."""
    chosen = {}

    def look(name: str, ids: Tensor) -> None:
        chosen[name] = ids.unique().numel()

    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: look(name, args[2]))
             for name, module in model.model.layers.named_modules() if isinstance(module, Experts)]
    run()
    for hook in hooks:
        hook.remove()
    return chosen


def roofline_bytes(model: Any, of: ModelConfig, chosen: dict[str, int], sequences: int, context: int) -> int:
    """What a step reads at least: of the experts, those that its tokens chose."""
    total = 0
    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, Layer):
            own = sum(w.nbytes for w in layer.parameters(recurse=False))
            total += own * chosen[name] // len(layer.w13) if name in chosen else own
    width = of.mla.kv_lora_rank + of.mla.qk_rope_head_dim
    return total + of.num_layers * sequences * context * width * of.dtype.itemsize


def breakdown(run: Callable[[], object], device: str) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds of one run), the longest first. A merge that is launched early waits for the
    attention before it, and that counts as its time, too."""
    if device != "cuda":
        return []
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    spent, launches = collections.Counter(), collections.Counter()
    for event in profile.events():
        spent[event.name] += event.device_time
        launches[event.name] += 1
    return [(name, launches[name], us) for name, us in spent.most_common() if us > 0]


@torch.inference_mode()
def layers(args: argparse.Namespace, device: str) -> None:
    of = v3_slice(args.tiny, args.context + 1)
    model = build(of, device)
    peaks = timing.measure_peaks(device)
    print(f"{of.num_layers} layers of DeepSeek-V3 as one of 8 GPUs, context {args.context}, reads "
          f"{peaks.read_gbs:.0f} GB/s")
    print("| batch | us per step | roofline us | ratio | experts read |\n|---|---:|---:|---:|---:|")
    for sequences in args.batch:
        cache = pool(of, sequences, args.context, device)
        ids = torch.randint(of.vocab_size, (sequences,))
        batch = decode_batch(sequences, args.context, args.context, device, ids)
        chosen = experts_chosen(model, functools.partial(model, batch, cache))
        if device == "cuda":
            graphs = DecodeGraphs(model, cache, torch.device(device), sequences, batch.page_table.shape[1])
            run = replay_of(graphs, batch)
            first = run().clone()
            assert torch.equal(first, model(batch, cache)), "a captured step gives other bits than a plain one"
        else:
            run = functools.partial(model, batch, cache)
        us = timing.median_ms(run, device) * 1e3
        bound_us = roofline_bytes(model, of, chosen, sequences, args.context) / peaks.read_gbs / 1e3
        print(f"| {sequences} | {us:.1f} | {bound_us:.1f} | {us / bound_us:.2f} | "
              f"{sum(chosen.values()) / max(1, len(chosen)):.0f} |", flush=True)
        for name, count, spent in breakdown(run, device)[:20]:
            print(f"    {spent:8.1f} us  {count:3} x {name[:90]}")
        del cache


def transformers_lite(of: ModelConfig, device: str) -> nn.Module:
    """transformers' model of the same sizes, random weights."""
    mla, moe = of.mla, of.moe
    with torch.device(device):
        return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(
            vocab_size=of.vocab_size, hidden_size=of.hidden_size, intermediate_size=of.intermediate_size,
            moe_intermediate_size=moe.intermediate_size, num_hidden_layers=of.num_layers,
            num_attention_heads=of.num_heads, num_key_value_heads=of.num_heads, n_routed_experts=moe.num_experts,
            num_experts_per_tok=moe.top_k, n_shared_experts=moe.num_shared_experts, n_group=1, topk_group=1,
            topk_method="greedy", first_k_dense_replace=moe.first_dense_layers, q_lora_rank=None,
            kv_lora_rank=mla.kv_lora_rank, qk_nope_head_dim=mla.qk_nope_head_dim, qk_rope_head_dim=mla.qk_rope_head_dim,
            v_head_dim=mla.v_head_dim, max_position_embeddings=of.context_length, eos_token_id=None,
            bos_token_id=None, dtype=of.dtype)).to(of.dtype).eval()


@torch.inference_mode()
def copy_weights(theirs: nn.Module, model: nn.Module) -> None:
    """Copy transformers' weights to ours, by the names of a checkpoint."""
    stored = theirs.state_dict()
    for name, module in model.named_modules():
        for stored_name, view, *_ in module.checkpoint(name) if isinstance(module, Layer) else ():
            if ".experts." in stored_name:
                parent, number, kind = stored_name.removesuffix(".weight").rsplit(".", 2)
                fused = stored[f"{parent}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"][int(number)]
                rows = len(view)
                view.copy_(fused[rows:] if kind == "up_proj" else fused[:rows])
            else:
                view.copy_(stored[stored_name])
        if isinstance(module, Layer):
            module.finish()


@torch.inference_mode()
def lite(args: argparse.Namespace, device: str) -> None:
    prompt, tokens = 32, args.tokens
    of = v2_lite(args.tiny, prompt + tokens + PAGE_SIZE)
    theirs = transformers_lite(of, device)
    model = build(of, device, theirs)
    print("| batch | transformers tok/s | wave64 tok/s | ratio |\n|---|---:|---:|---:|")
    for sequences in args.batch:
        ids = torch.randint(of.vocab_size, (sequences, prompt), device=device)
        began = time.perf_counter()
        out = theirs(ids, use_cache=True)
        want, cache = out.logits[:, -1], out.past_key_values
        new = want.argmax(-1, keepdim=True)
        for step in range(tokens + 1):
            if step == 1:  # the first step also makes what later ones find
                _synchronize(device)
                began = time.perf_counter()
            new = theirs(new, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        _synchronize(device)
        theirs_s = time.perf_counter() - began
        ours_s, got = ours(model, of, ids, tokens, device)
        off = (got - want.float()).abs().max() / want.float().abs().max()
        assert off < 0.1, f"logits differ by {off:.3f} of the largest"
        print(f"| {sequences} | {sequences * tokens / theirs_s:.1f} | {sequences * tokens / ours_s:.1f} "
              f"| {theirs_s / ours_s:.2f} |", flush=True)


def ours(model: nn.Module, of: ModelConfig, ids: Tensor, tokens: int, device: str) -> tuple[float, Tensor]:
    """(seconds of `tokens` decode steps, logits after the prompt, which is read token by token)"""
    sequences, prompt = ids.shape
    capacity = of.context_length
    cache = pool(of, sequences, capacity, device)
    graphs = None
    if device == "cuda":
        pages = -(-capacity // PAGE_SIZE)
        graphs = DecodeGraphs(model, cache, torch.device(device), sequences, pages)

    def step(length: int, new: Tensor) -> Tensor:
        batch = decode_batch(sequences, length, capacity, device, new)
        return replay_of(graphs, batch)() if graphs else model(batch, cache)

    for i in range(prompt):
        logits = step(i + 1, ids[:, i])
    got, new = logits.float().clone(), logits.argmax(-1)
    new = step(prompt + 1, new).argmax(-1)
    _synchronize(device)
    began = time.perf_counter()
    for i in range(tokens):
        new = step(prompt + 2 + i, new).argmax(-1)
    _synchronize(device)
    return time.perf_counter() - began, got


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "lite"))
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = platform.device_type()
    if device != "cuda" and not args.tiny:
        parser.error("needs a GPU; --tiny tests the file on a CPU")
    args.batch = args.batch or ([1, 8, 32, 128] if args.what == "layers" else [1, 32])
    (layers if args.what == "layers" else lite)(args, device)


if __name__ == "__main__":
    main()
