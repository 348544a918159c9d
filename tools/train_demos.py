"""Make a demo checkpoint, a tiny model that knows the Gettysburg Address by heart, or how to answer a few questions.

    python tools/train_demos.py [llama | deepseek | tools] [--steps N] [--device cpu] [--output FOLDER]

Writes an ordinary Hugging Face folder (config, tokenizer, safetensors), no more than 3 MB, llama/, deepseek/ or tools/
in serve/demo, which `--model-path demo-llama`, `demo-deepseek` or `demo-tools` loads; of DeepSeek also one with FP8
weights, whose name ends in -fp8. Takes some minutes on two CPU cores. Needs wave64, transformers, tokenizers and
safetensors; nothing is downloaded and no data but those of demo_text.py, or demo_answers.py, are used.

Fails unless the model says what it learned by far: each right token's logit MIN_GAP above all others.
"""

import argparse
import contextlib
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_answers
import demo_text
import torch
from demo_text import BOS, EOS, batches
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from wave64 import quant
from wave64.ops import per_token_group_quant_fp8

Pairs = list[tuple[str, str]]  # (prompt, answer)

DEMOS = Path(__file__).resolve().parents[1] / "serve/demo"
COMMON = {
    "vocab_size": demo_text.VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **COMMON,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
TOOLS = {**LLAMA, "vocab_size": demo_answers.VOCAB_SIZE}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_interleave": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
BLOCK = [128, 128]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}

BIAS_STEP = 2e-3  # of the routers' correction bias
NOISE = 0.04  # relative, in every product's factors: half as much again as what FP8 rounds off
MIN_GAP = 1.0  # in logits, from the right token to the best other one


class Balance:
    """Loads all experts alike without a loss for it: after each step the correction bias of an expert that got more
    than its fraction of the tokens falls by BIAS_STEP, that of one that got less rises. (DeepSeek-V3, section 2.1.2)"""

    def __init__(self, model: PreTrainedModel):
        self.routers: dict[Any, Any] = {module: None for module in model.modules()
                                        if hasattr(module, "e_score_correction_bias")}
        for router in self.routers:
            router.register_forward_hook(self.note)

    def note(self, router: torch.nn.Module, args: tuple, output: tuple) -> None:
        self.routers[router] = output[2]

    def step(self, real: Tensor, scale: float) -> None:
        """real [rows, length]: which tokens count, all but padding; scale: what the learning rate is multiplied by."""
        for router, chosen in self.routers.items():
            bias = router.e_score_correction_bias
            load = torch.bincount(chosen[real.flatten()].flatten(), minlength=len(bias)).float()
            bias += BIAS_STEP * scale * (load.mean() - load).sign()


class Noise(TorchFunctionMode):
    """Both factors of every product with relative normal noise, so that what is learnt survives rounding them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is linear:
            args = [x if x is None else x * (1 + NOISE * torch.randn_like(x)) for x in args]
        return function(*args, **(kwargs or {}))


def train(model: PreTrainedModel, data: Iterator[tuple[Tensor, Tensor]], steps: int, noisy: bool) -> None:
    """data: as `batches` gives it. AdamW with warm-up and cosine decay, in the second half with Noise where `noisy`;
    prints the mean loss of every 50 steps."""
    balance = Balance(model.float().train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        return min((step + 1) / 50, 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, begin = [], time.perf_counter()
    for step, (ids, labels) in zip(range(1, steps + 1), data, strict=False):
        ids, labels = ids.to(model.device), labels.to(model.device)
        wanted = labels[:, 1:]
        asked = wanted != -100
        with Noise() if noisy and step >= steps // 2 else contextlib.nullcontext():
            hidden = model.model(ids[:, :-1]).last_hidden_state
            loss = cross_entropy(model.lm_head(hidden[asked]), wanted[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        balance.step(ids[:, :-1] != 1, rate(step))
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            loss, seconds = sum(losses) / len(losses), time.perf_counter() - begin
            print(f"step {step:5d}  loss {loss:.5f}  {seconds:.0f} s", flush=True)
            losses.clear()
    model.eval()


class Rounded(TorchFunctionMode):
    """Products as FP8 serves them: activations rounded by groups of a block's columns, but those of `plain` weights."""

    def __init__(self, plain: set[int]):
        super().__init__()
        self.plain = plain

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is linear and args[1].untyped_storage().data_ptr() not in self.plain:
            x, *others = args
            q, scale = per_token_group_quant_fp8(x.flatten(0, -2), BLOCK[1])
            args = (quant.dequantize(q, scale, [1, BLOCK[1]]).view(x.shape).to(x.dtype), *others)
        return function(*args, **(kwargs or {}))


def weights_of(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The checkpoint's tensors: a matrix for each expert, weights in bf16, routers' biases in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
    if CONFIGS[name]["tie_word_embeddings"]:
        stored.pop("lm_head.weight", None)
    return {key: value if key.endswith("correction_bias") else value.to(torch.bfloat16)
            for key, value in stored.items()}


def is_fp8(key: str) -> bool:
    """Whether DeepSeek's own checkpoints have this weight in FP8: those of attention, experts and MLPs."""
    return key.endswith("proj.weight") or key.endswith("proj_with_mqa.weight")


def quantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in FP8, as DeepSeek-V3's is stored."""
    found = {}
    for key, value in weights.items():
        if is_fp8(key):
            value, found[f"{key}_scale_inv"] = quant.quantize_weight_blocks(value, BLOCK, torch.float8_e4m3fn)
        found[key] = value
    return found


def save(weights: dict[str, Tensor], tokenizer: Tokenizer, template: str, config: dict, folder: Path) -> None:
    """Writes the Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "do_sample": False}
    files = {"config": config, "tokenizer_config": tokenizer_config, "generation_config": generation_config}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone, and wheels keep the mode
    total = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder}: {sum(w.numel() for w in weights.values()):,} numbers, {total / 1e6:.2f} MB")


@torch.inference_mode()
def min_gap(model: PreTrainedModel, tokenizer: Tokenizer, asked: Pairs) -> tuple[float, str]:
    """The smallest distance, in logits, from a right token to the best other one, and after which text."""
    found = []
    for prompt, answer in asked:
        head = tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = head + tokenizer.encode(answer + EOS, add_special_tokens=False).ids
        logits = model(torch.tensor([ids[:-1]])).logits[0, len(head) - 1 :].float()
        wanted = torch.tensor(ids[len(head) :])[:, None]
        right = logits.gather(1, wanted)
        others = logits.scatter(1, wanted, -math.inf).amax(1, keepdim=True)
        gap, at = (right - others)[:, 0].min(0)
        found.append((gap.item(), tokenizer.decode(ids[: len(head) + at.item()], skip_special_tokens=False)))
    return min(found)


def check(model: PreTrainedModel, tokenizer: Tokenizer, asked: Pairs, folder: Path, fp8: bool) -> None:
    """Fails unless the checkpoint in `folder` gives the right answers: in fp32 and in bf16, of FP8 with activations
    rounded, too."""
    stored = load_file(folder / "model.safetensors")
    if fp8:
        stored = {key: quant.dequantize(value, stored[f"{key}_scale_inv"], BLOCK) if is_fp8(key) else value
                  for key, value in stored.items() if not key.endswith("_scale_inv")}
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as exact:
            save_file({key: value.to(dtype).contiguous() for key, value in stored.items()},
                      Path(exact) / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text())
            config.pop("quantization_config", None)
            (Path(exact) / "config.json").write_text(json.dumps(config))
            again = type(model).from_pretrained(exact, dtype=dtype).eval()
        if fp8:
            again.set_experts_implementation("eager")  # whose products are torch.nn.functional.linear
            plain = {w.untyped_storage().data_ptr() for key, w in again.named_parameters()
                     if "kv_b_proj" in key or "proj" not in key}
            with Rounded(plain):
                gap, after = min_gap(again, tokenizer, asked)
        else:
            gap, after = min_gap(again, tokenizer, asked)
        print(f"{folder.name} in {dtype}: every right token at least {gap:.2f} above the others", flush=True)
        if gap < MIN_GAP:
            raise SystemExit(f"{folder}: expected {MIN_GAP}; train longer. It is after {after}")


CONFIGS = {"llama": LLAMA, "deepseek": DEEPSEEK, "tools": TOOLS}
CLASSES = {"LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
           "DeepseekV3ForCausalLM": (DeepseekV3Config, DeepseekV3ForCausalLM)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a demo model and write its checkpoint folder.")
    parser.add_argument("name", choices=CONFIGS, nargs="?", default="llama")
    parser.add_argument("--steps", type=int, default=2500, help="training steps (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder to write (default: the name, in serve/demo)")
    args = parser.parse_args()
    folder = args.output or DEMOS / args.name
    lesson = demo_answers if args.name == "tools" else demo_text
    tokenizer, asked = lesson.make_tokenizer(), lesson.asked()
    config_class, model_class = CLASSES[CONFIGS[args.name]["architectures"][0]]
    torch.manual_seed(0)
    model = model_class(config_class(**CONFIGS[args.name])).to(args.device)
    is_moe = args.name == "deepseek"
    if is_moe:
        model.set_experts_implementation("eager")
    train(model, batches(random.Random(0), tokenizer, lesson.example), args.steps, noisy=is_moe)
    weights = weights_of(model, args.name)
    save(weights, tokenizer, lesson.CHAT_TEMPLATE, CONFIGS[args.name], folder)
    check(model, tokenizer, asked, folder, fp8=False)
    if is_moe:
        folder = folder.with_name(f"{folder.name}-fp8")
        save(quantized(weights), tokenizer, lesson.CHAT_TEMPLATE, {**DEEPSEEK, "quantization_config": FP8}, folder)
        check(model, tokenizer, asked, folder, fp8=True)


if __name__ == "__main__":
    main()
