"""Makes the FP8 checkpoints of tests/serve/quantized with the tools that users have: AMD's Quark, compressed-tensors,
NVIDIA's ModelOpt and transformers. Each folder gets, next to what its tool wrote, `expected.safetensors`: token ids and
the logits of the tool's own quantized model in fp32, and of the model as it was; and `made_by.json` with versions.

    python tools/quantize_demos.py [NAME ...]

needs, next to torch and transformers: pip install amd-quark llmcompressor nvidia-modelopt accelerate. LLM Compressor
finds no KV cache in transformers newer than it asks for (5.17 for 0.14), and leaves out the scales without a word.
"""

# pyright: reportMissingImports=false, reportArgumentType=false

import copy
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tests" / "serve" / "quantized"
DEMO = ROOT / "serve" / "demo" / "llama"
TINY = dict(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=None,
            eos_token_id=None, tie_word_embeddings=False)  # fmt: skip
TOKENS = 24

#: name -> (packages, function of the folder)
MAKERS: dict[str, tuple[tuple[str, ...], Callable[[Path], None]]] = {}


def maker(*packages: str):
    def add(function: Callable[[Path], None]):
        MAKERS[function.__name__.replace("_", "-")] = packages, function
        return function
    return add


def tiny(family: str = "Llama", **changes: Any) -> Any:
    """A random model in fp32. Projections of one input differ in range, so that each has a scale of its own."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**TINY | changes, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            weight.normal_(1.0 if "norm" in name else 0.0, 0.1 * (1 + number % 5))
            if weight.ndim == 2:  # and its rows do, too
                weight.mul_(torch.rand(len(weight), 1) + 0.25)
    return model


def demo() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def tokens(model: Any, rows: int = 1, seed: int = 11) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def save_expected(folder: Path, quantized: Any, original: Any, one_by_one: bool = False) -> None:
    """quantized: called with token ids; original: the model before. one_by_one: a token at a time, of which a scale
    for all of a tensor is the token's own, as it is in a server, whose answers do not depend on the batch."""
    ids, cache, found = tokens(original), None, []
    for part in ids.split(1, 1) if one_by_one else (ids,):
        out = quantized(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0].float())
    save_file(dict(ids=ids[0], logits=torch.cat(found), unquantized=original(ids).logits[0].float().contiguous()),
              folder / "expected.safetensors")


def quantize_inputs(model: Any, group: int | None, bound: float = float("inf"), ue8m0: bool = False) -> Any:
    """Has the linear layers of a dequantized model round their inputs to FP8, with scales per group of columns or per
    token: transformers has no such product on a CPU."""
    def rounded(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].unflatten(-1, (-1, group or inputs[0].shape[-1]))
        x = x.clamp(-bound, bound)
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        scale = torch.exp2(torch.ceil(torch.log2(scale))) if ue8m0 else scale
        return ((x / scale).to(torch.float8_e4m3fn).float().mul(scale).flatten(-2),)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded)
    return model


# Quark


def quark(folder: Path, model: Any, weight: Any, inputs: Any, kv: Any = None, custom_mode: str = "quark",
          batches: Any = None, layers: dict[str, Any] | None = None) -> Any:
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config.config import QConfig, QLayerConfig

    of_weights = QLayerConfig(weight=weight, input_tensors=inputs)
    of_kv = {name: QLayerConfig(weight=weight, input_tensors=inputs, output_tensors=kv)
             for name in ("*k_proj", "*v_proj")} if kv else {}
    config = QConfig(global_quant_config=of_weights, layer_quant_config=of_kv | (layers or {}),
                     kv_cache_quant_config=dict(of_kv), kv_cache_group=list(of_kv), exclude=["lm_head"])
    batches = [tokens(model, 4, seed) for seed in range(2)] if batches is None else batches
    quantizer = ModelQuantizer(config)
    model = quantizer.freeze(quantizer.quantize_model(model, batches))
    before = copy.deepcopy(model)
    for module in before.modules():  # it rounds keys in front of RoPE, a server what it caches, behind it
        if getattr(module, "_output_quantizer", None) is not None:
            module._output_quantizer = None
    export_safetensors(model, folder, custom_mode=custom_mode)
    return before


def per_tensor(dynamic: bool = False) -> Any:
    from quark.torch.quantization.config.config import FP8E4M3PerTensorSpec

    return FP8E4M3PerTensorSpec(is_dynamic=dynamic).to_quantization_spec()


def per_channel(axis: int, dynamic: bool) -> Any:
    from quark.torch.quantization.config.config import FP8E4M3PerChannelSpec

    return FP8E4M3PerChannelSpec(ch_axis=axis, is_dynamic=dynamic).to_quantization_spec()


@maker("amd-quark")
def quark_tensor(folder: Path) -> None:
    """Per tensor, static."""
    save_expected(folder, quark(folder, tiny(), per_tensor(), per_tensor()), tiny())


@maker("amd-quark")
def quark_channel(folder: Path) -> None:
    """Per output channel, activations per token at run time."""
    save_expected(folder, quark(folder, tiny(), per_channel(0, False), per_channel(1, True)), tiny())


@maker("amd-quark")
def quark_fp8_kv(folder: Path) -> None:
    """What Quark writes for vLLM: `quant_method` fp8, with scales of keys and values."""
    quantized = quark(folder, tiny(), per_tensor(), per_tensor(), per_tensor(), custom_mode="fp8")
    save_expected(folder, quantized, tiny())


@maker("amd-quark")
def quark_fp8_dynamic(folder: Path) -> None:
    quantized = quark(folder, tiny(), per_tensor(), per_tensor(True), custom_mode="fp8")
    save_expected(folder, quantized, tiny(), one_by_one=True)


@maker("amd-quark")
def demo_quark_kv(folder: Path) -> None:
    """demo-llama as AMD publishes its Llamas: per tensor, static, keys and values in FP8."""
    text = (DEMO.parent / "gettysburg.txt").read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    batches = [tokenizer(tokenizer.bos_token + text, return_tensors="pt", add_special_tokens=False).input_ids]
    save_expected(folder, quark(folder, demo(), per_tensor(), per_tensor(), per_tensor(), batches=batches), demo())
    weights = load_file(folder / "model.safetensors")  # what was bf16 and is not quantized is so again
    weights = {name: weight if weight.dtype != torch.float32 or name.endswith("_scale") else weight.to(torch.bfloat16)
               for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(dtype="bfloat16"), indent=2) + "\n")


# llm-compressor, which writes compressed-tensors


def compressed(folder: Path, model: Any, schemes: dict[str, dict], kv: dict | None = None,
               ignore: tuple[str, ...] = ("lm_head",)) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    plain = folder / "plain"  # the tool looks for the folder that a model was loaded from
    model.save_pretrained(plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=model.dtype)
    rows = torch.cat([tokens(model, 4, seed) for seed in range(2)])
    data = Dataset.from_dict(dict(input_ids=rows.tolist(), attention_mask=torch.ones_like(rows).tolist()))
    modifier = QuantizationModifier(config_groups=schemes, kv_cache_scheme=kv, ignore=list(ignore))
    oneshot(model=model, recipe=modifier, dataset=data, num_calibration_samples=len(rows), max_seq_length=TOKENS,
            pipeline="basic", processor=transformers.AutoTokenizer.from_pretrained(DEMO))
    model.save_pretrained(folder, save_compressed=True)
    shutil.rmtree(plain)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def fp8(strategy: str, dynamic: bool = False, **more: Any) -> dict[str, Any]:
    return dict(num_bits=8, type="float", strategy=strategy, dynamic=dynamic, symmetric=True) | more


def scheme(weights: dict, inputs: dict, targets: tuple[str, ...] = ("Linear",)) -> dict[str, Any]:
    return dict(targets=list(targets), weights=weights, input_activations=inputs)


@maker("llmcompressor", "compressed-tensors")
def compressed_tensor(folder: Path) -> None:
    """Per tensor, static, with scales of keys and values; one layer's outputs stay as they were."""
    quantized = compressed(folder, tiny(num_hidden_layers=2), dict(group_0=scheme(fp8("tensor"), fp8("tensor"))),
                           fp8("tensor"), ignore=("lm_head", "re:.*layers.1.self_attn.o_proj"))
    save_expected(folder, quantized, tiny(num_hidden_layers=2))


@maker("llmcompressor", "compressed-tensors")
def compressed_heads(folder: Path) -> None:
    """Scales of keys and values per head; weights per output channel."""
    groups = dict(group_0=scheme(fp8("channel"), fp8("token", True)))
    save_expected(folder, compressed(folder, tiny(), groups, fp8("attn_head")), tiny())


@maker("llmcompressor", "compressed-tensors")
def compressed_channel(folder: Path) -> None:
    """Per output channel, activations per token, in bf16; a Qwen2, which has biases. Down projections per tensor."""
    made = tiny("Qwen2").to(torch.bfloat16)
    original = copy.deepcopy(made).float()
    groups = dict(group_0=scheme(fp8("channel"), fp8("token", True), ("re:.*proj$",)),
                  group_1=scheme(fp8("tensor"), fp8("tensor"), ("re:.*down_proj$",)))
    groups["group_0"]["targets"] = ["re:.*self_attn.*", "re:.*gate_proj", "re:.*up_proj"]
    save_expected(folder, compressed(folder, made, groups), original)


@maker("llmcompressor", "compressed-tensors")
def compressed_block(folder: Path) -> None:
    blocks = fp8("block", block_structure=[32, 32])
    save_expected(folder, compressed(folder, tiny("Qwen3"), dict(group_0=scheme(
        blocks, fp8("group", True, group_size=32)))), tiny("Qwen3"))


# ModelOpt


@maker("nvidia-modelopt")
def modelopt_kv(folder: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = tiny()
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config = mtq.utils.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = mtq.quantize(model, config, lambda m: [m(tokens(model, 4, seed)) for seed in range(2)])
    save_expected(folder, copy.deepcopy(model), tiny())
    export_hf_checkpoint(model, export_dir=folder)


@maker("nvidia-modelopt")
def modelopt_channel(folder: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = mtq.quantize(tiny(), copy.deepcopy(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
                         lambda m: [m(tokens(m, 4, seed)) for seed in range(2)])
    save_expected(folder, copy.deepcopy(model), tiny())
    export_hf_checkpoint(model, export_dir=folder)


# transformers, which writes DeepSeek's form


def blocks(folder: Path, scale_fmt: str | None) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    model = tiny("Qwen3")
    config = transformers.FineGrainedFP8Config(weight_block_size=(32, 32), modules_to_not_convert=["lm_head"],
                                               **(dict(scale_fmt=scale_fmt) if scale_fmt else {}))
    quantize = Fp8Quantize(type("Quantizer", (), dict(quantization_config=config)))
    weights = {}
    for name, weight in model.state_dict().items():
        linear = "_proj" in name and weight.ndim == 2
        weights |= quantize.convert({name: weight}) if linear else {name: weight}
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    model.config.quantization_config = config
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.save_pretrained(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    save_expected(folder, quantize_inputs(read, 32, ue8m0=scale_fmt == "ue8m0"), model)


@maker("accelerate")
def deepseek_blocks(folder: Path) -> None:
    blocks(folder, None)


@maker("accelerate")
def deepseek_ue8m0(folder: Path) -> None:
    blocks(folder, "ue8m0")


@maker()
def fbgemm(folder: Path) -> None:
    """In FBGEMM's form, written here: its quantizer runs on GPUs alone. A bound that some activations exceed."""
    model, original, bound = tiny(), tiny(), 1.5
    weights = {}
    for name, weight in model.state_dict().items():
        if "_proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 448
            q = (weight / scale).to(torch.float8_e4m3fn)
            weights |= {name: q, f"{name}_scale": scale}
            weight.copy_(q.float() * scale)
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    model.config.quantization_config = dict(quant_method="fbgemm_fp8", activation_scale_ub=bound,
                                            modules_to_not_convert=["lm_head"])
    model.config.save_pretrained(folder)
    save_expected(folder, quantize_inputs(model, None, bound), original)


def main(names: list[str]) -> None:
    for name in names or MAKERS:
        packages, make = MAKERS[name]
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        for file in folder.iterdir():
            if file.name not in ("config.json", "hf_quant_config.json", "model.safetensors", "expected.safetensors"):
                file.unlink()
        if name.startswith("demo-"):
            for kept in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                shutil.copy(DEMO / kept, folder)
        versions = {package: importlib.metadata.version(package) for package in (*packages, "torch", "transformers")}
        (folder / "made_by.json").write_text(json.dumps(versions, indent=1) + "\n")
        print(name, {file.name: file.stat().st_size for file in folder.iterdir()})


if __name__ == "__main__":
    main(sys.argv[1:])
