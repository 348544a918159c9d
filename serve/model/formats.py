"""The FP8 checkpoints that are read: from a quantization_config, as the tools that make them write it, to schemes.

FORMATS is the table, in code and in docs/fp8.md. What is not in it is refused by file, key and value.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from wave64.serve.model.config import ConfigError, Keys
from wave64.serve.model.schemes import CacheScheme, Scheme, Schemes

INSTEAD = "use the float16 or bfloat16 original, which --quantization fp8 serves in FP8"
#: What else is known by name, and not served.
OTHERS = {
    "awq": "INT4 weights", "gptq": "INT4 or INT8 weights", "bitsandbytes": "INT8 or NF4 weights", "mxfp4": "MXFP4",
    "hqq": "weights of 1 to 8 bits", "quanto": "INT4 or INT8 weights", "torchao": "torchao's tensors",
    "aqlm": "codebooks", "compressed_tensors": "another spelling: compressed-tensors",
}  # fmt: skip
MODULES = ("Linear", "torch.nn.Linear", "nn.Linear")  # what a rule for a kind of module may name


@dataclass(frozen=True)
class Format:
    """A row of the table: what quant_method says, who writes it, what weights, activations and KV caches it may have,
    and how it is read."""

    method: str
    made_by: str
    weights: str
    activations: str
    kv_scales: str
    read: Callable[[Keys], Schemes]


def schemes_of(keys: Keys) -> Schemes | None:
    """What config.json says of FP8, or hf_quant_config.json next to it where it says nothing; None: nothing does.

    Raises ConfigError, in one line, for a format, scheme or key that is not served.
    """
    own = next((key for key in ("quantization_config", "compression_config") if keys.get(key)), None)
    said = None if own is None else _read(keys.group(own))
    file = keys.file.with_name("hf_quant_config.json")
    if not file.exists():
        return said
    other = replace(_hf_quant_config(Keys(file, ignored=keys.ignored)), method="modelopt")
    if own is None or said is None:
        return other
    if (said.default, said.kv_scales) != (other.default, other.kv_scales):
        raise ConfigError(f"{keys.error(own, keys.raw[own], f'what {file.name} next to it says ({spelled(other)})')}; "
                          "delete the one that the weights were not quantized with")
    return said


def _read(group: Keys) -> Schemes:
    method = group.get("quant_method", "")
    for row in FORMATS:
        if row.method == method:
            return replace(row.read(group), method=method)
    kind = f": {OTHERS[method]} are not served; {INSTEAD}" if method in OTHERS else f"; {INSTEAD}"
    known = ", ".join(dict.fromkeys(row.method for row in FORMATS))
    raise ConfigError(f"{group.error('quant_method', method, f'FP8 as one of {known} writes it')}{kind}")


def refused(keys: Keys, key: str, expected: str, value: Any = None) -> ConfigError:
    return ConfigError(f"{keys.error(key, keys.raw.get(key) if value is None else value, expected)}; {INSTEAD}")


def names(keys: Keys, key: str) -> tuple[str, ...]:
    """A list of patterns of layers' names."""
    value = keys.get(key, [])
    if not isinstance(value, list) or any(not isinstance(name, str) for name in value):
        raise keys.error(key, value, "a list of names")
    for name in value:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as e:
                raise keys.error(key, name, f"a regular expression behind re: ({e})") from None
    return tuple(value)


def block_of(keys: Keys, key: str) -> tuple[int, int]:
    block = keys.get(key)
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise keys.error(key, block, "two positive integers, rows and columns of a block")
    if block[1] % 32:
        raise keys.error(key, block, "columns of a block that are a multiple of 32")
    return block[0], block[1]


# fp8: DeepSeek's blocks, and per tensor as Quark and others write it for vLLM


def _fp8(keys: Keys) -> Schemes:
    keys.choice("fmt", "e4m3", {"e4m3": "e4m3", "float8_e4m3fn": "e4m3"})
    plain = tuple(dict.fromkeys((*names(keys, "modules_to_not_convert"), *names(keys, "ignored_layers"))))
    keys.choice("expert_dtype", "fp8", {"fp8": "fp8"})
    for key in ("export", "dequantize"):  # how it was written, and what transformers does
        keys.get(key)
    if keys.get("weight_block_size") is not None:
        keys.choice("activation_scheme", "dynamic", {"dynamic": "dynamic"})
        ue8m0 = keys.choice("scale_fmt", "float", {"float": False, "ue8m0": True})
        scheme = Scheme("block", "group", block_of(keys, "weight_block_size"), "weight_scale_inv", ue8m0)
        keys.refuse_the_rest()
        return Schemes(plain, default=scheme)
    activations = keys.choice("activation_scheme", "dynamic", {"static": "static", "dynamic": "token"})
    kv = keys.get("kv_cache_scheme")
    if kv not in (None, "static"):
        raise keys.error("kv_cache_scheme", kv, '"static" or null')
    keys.refuse_the_rest()
    scales = CacheScheme("self_attn.k_scale", "self_attn.v_scale") if kv else None
    return Schemes(plain or ("lm_head",), default=Scheme("tensor", activations), kv_scales=scales)


def _fbgemm(keys: Keys) -> Schemes:
    bound = keys.number("activation_scale_ub", 1200.0)
    plain = names(keys, "modules_to_not_convert")
    keys.refuse_the_rest()
    return Schemes((*plain, "lm_head"), default=Scheme("channel", "token", bound=bound))


# compressed-tensors


def _compressed(keys: Keys) -> Schemes:
    status = keys.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise keys.error("quantization_status", status, '"compressed"')
    kind = keys.get("format", "float-quantized")
    if kind not in ("float-quantized", "naive-quantized", "mixed-precision"):
        raise refused(keys, "format", "float-quantized, which is FP8")
    for key in ("global_compression_ratio", "version", "moe_sparsity_config"):
        keys.get(key)
    for key, why in (("sparsity_config", "sparse weights"), ("transform_config", "transformed weights")):
        if keys.get(key):
            raise refused(keys, key, f"none: {why} are not served")
    plain, by_name, default = names(keys, "ignore"), [], None
    groups = keys.group("config_groups")
    for name in groups.raw:
        group = groups.group(name)
        scheme = _compressed_group(group)
        for target in names(group, "targets"):
            if target in MODULES:
                default = scheme
            else:
                by_name.append((target, scheme))
    by_name.sort(key=lambda rule: rule[0].startswith("re:"))  # a name itself comes before an expression
    if default is None and not by_name:
        raise keys.error("config_groups", groups.raw, "groups with targets")
    kv = _compressed_kv(keys)
    keys.refuse_the_rest()
    return Schemes(plain, tuple(by_name), default, kv)


def _compressed_group(group: Keys) -> Scheme:
    weights, inputs = _args(group, "weights"), _args(group, "input_activations")
    for key in ("output_activations", "format"):
        if group.get(key) not in (None, "float-quantized", "naive-quantized"):
            raise refused(group, key, "null")
    weight = weights.choice("strategy", "tensor", {name: name for name in ("tensor", "channel", "block")})
    if weights.get("dynamic", False) is not False:
        raise refused(weights, "dynamic", "false")
    if weight == "block":
        block = block_of(weights, "block_structure")
        inputs.choice("strategy", "group", {"group": "group"})
        if inputs.get("dynamic") is not True or inputs.count("group_size", block[1]) != block[1]:
            raise refused(inputs, "group_size", f"{block[1]}, the columns of a block, at run time")
        return Scheme("block", "group", block)
    strategy = inputs.choice("strategy", "tensor", {"tensor": "tensor", "token": "token"})
    dynamic = inputs.get("dynamic", False)
    if strategy == "token" and dynamic is not True or dynamic not in (True, False):
        raise refused(inputs, "dynamic", "true for a scale per token")
    return Scheme(weight, "token" if dynamic else "static")


def _args(group: Keys, key: str) -> Keys:
    """The description of one tensor, which has to be FP8."""
    if group.get(key) is None:
        raise refused(group, key, "FP8 weights and FP8 activations")
    args = group.group(key)
    return _float8(args)


def _float8(args: Keys) -> Keys:
    if args.get("num_bits", 8) != 8 or args.get("type", "float") != "float":
        key = "num_bits" if args.get("num_bits", 8) != 8 else "type"
        raise refused(args, key, "8 bits of type float, which is FP8")
    if args.get("symmetric", True) is not True:
        raise refused(args, "symmetric", "true")
    if args.get("actorder"):
        raise refused(args, "actorder", "null")
    return args


def _compressed_kv(keys: Keys) -> CacheScheme | None:
    if keys.get("kv_cache_scheme") is None:
        return None
    args = _float8(keys.group("kv_cache_scheme"))
    per_head = args.choice("strategy", "tensor", {"tensor": False, "attn_head": True})
    if args.get("dynamic", False) is not False:
        raise refused(args, "dynamic", "false: scales of keys and values that are stored")
    return CacheScheme("self_attn.k_scale", "self_attn.v_scale", per_head)


# Quark


def _quark(keys: Keys) -> Schemes:
    export = keys.group("export")
    export.choice("weight_format", "real_quantized", {"real_quantized": "real_quantized"})
    for key in ("algo_config", "softmax_quant_spec"):
        if keys.get(key):
            raise refused(keys, key, "null")
    default = _quark_layer(keys, "global_quant_config")
    types, layers = keys.group("layer_type_quant_config"), keys.group("layer_quant_config")
    for name in types.raw:
        if name.rpartition(".")[2] == "Linear":
            default = _quark_layer(types, name)
    by_name = tuple((name, _quark_layer(layers, name)) for name in layers.raw)
    cache = keys.group("kv_cache_quant_config").raw or {
        name: layer for name, layer in layers.raw.items() if isinstance(layer, dict) and layer.get("output_tensors")}
    kv = None
    if cache:
        for name, layer in cache.items():
            _quark_cache(Keys(keys.file, layer, f"{keys.prefix}kv_cache_quant_config.{name}.", keys.ignored))
        kv = CacheScheme("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale")
    return Schemes(names(keys, "exclude"), by_name, default, kv)


def _quark_cache(layer: Keys) -> None:
    spec = _quark_spec(layer, "output_tensors")
    if spec.get("qscheme") != "per_tensor" or spec.get("is_dynamic") is not False:
        raise refused(spec, "qscheme", "per_tensor with is_dynamic false: one stored scale of keys, one of values")


def _quark_layer(keys: Keys, key: str) -> Scheme | None:
    layer = keys.group(key)
    if layer.get("weight") is None and layer.get("input_tensors") is None:
        return None
    if layer.get("bias") is not None:
        raise refused(layer, "bias", "null: biases are not quantized")
    weight, inputs = _quark_spec(layer, "weight"), _quark_spec(layer, "input_tensors")
    kind = weight.choice("qscheme", "", {"per_tensor": "tensor", "per_channel": "channel"})
    if weight.get("is_dynamic") is not False or kind == "channel" and weight.get("ch_axis") != 0:
        raise refused(weight, "ch_axis", "0 and is_dynamic false: a stored scale for each output feature")
    activations = inputs.choice("qscheme", "", {"per_tensor": "static", "per_channel": "token", "per_token": "token"})
    dynamic = inputs.get("is_dynamic")
    if activations == "token" and (dynamic is not True or inputs.get("ch_axis", 1) not in (0, 1, -1)):
        raise refused(inputs, "is_dynamic", "true for a scale per token")
    return Scheme(kind, "token" if dynamic else activations)


def _quark_spec(layer: Keys, key: str) -> Keys:
    if not isinstance(layer.get(key), dict):
        raise refused(layer, key, "FP8 (fp8_e4m3)")
    spec = layer.group(key)
    if spec.get("dtype") != "fp8_e4m3":
        raise refused(spec, "dtype", '"fp8_e4m3", FP8')
    if spec.get("symmetric", True) is not True:
        raise refused(spec, "symmetric", "true")
    return spec


# ModelOpt


def _modelopt(keys: Keys) -> Schemes:
    """config.json's form, of newer versions."""
    producer = keys.get("producer")
    if producer is not None and not isinstance(producer, dict):
        raise keys.error("producer", producer, "an object")
    for key in ("config_groups", "quant_library"):  # they say again what quant_algo says
        keys.get(key)
    kv = keys.get("kv_cache_scheme")
    if kv is not None and kv != "FP8" and not (isinstance(kv, dict) and kv.get("num_bits") == 8 and
                                               kv.get("type") == "float" and not kv.get("dynamic")):
        raise refused(keys, "kv_cache_scheme", "FP8 with stored scales")
    schemes = _algorithm(keys, names(keys, "ignore"), kv is not None)
    keys.refuse_the_rest()
    return schemes


def _hf_quant_config(keys: Keys) -> Schemes:
    group = keys.group("quantization")
    kv = group.get("kv_cache_quant_algo")
    if kv not in (None, "FP8"):
        raise refused(group, "kv_cache_quant_algo", "FP8 or null")
    schemes = _algorithm(group, names(group, "exclude_modules"), kv is not None)
    group.refuse_the_rest()
    return schemes


def _algorithm(keys: Keys, plain: tuple[str, ...], kv: bool) -> Schemes:
    algorithms = {"FP8": Scheme("tensor", "static"), "FP8_PER_CHANNEL_PER_TOKEN": Scheme("channel", "token")}
    algorithm = keys.get("quant_algo")
    if algorithm not in algorithms:
        raise refused(keys, "quant_algo", f"one of {', '.join(algorithms)}")
    scales = CacheScheme("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale") if kv else None
    return Schemes(plain, default=algorithms[algorithm], kv_scales=scales)


STATIC, TOKEN = "one stored scale", "per token at run time"
FORMATS = (
    Format("fp8", "DeepSeek, Qwen; transformers", "per block, scales float or ue8m0", "per group at run time", "none",
           _fp8),
    Format("fp8", "Quark (custom_mode fp8), AutoFP8", "per tensor", f"{STATIC}; per token for dynamic",
           "self_attn.k_scale, v_scale", _fp8),
    Format("quark", "Quark", "per tensor; per channel", f"{STATIC}; {TOKEN}",
           "self_attn.k_proj.output_scale, v_proj.output_scale", _quark),
    Format("compressed-tensors", "LLM Compressor", "per tensor; per channel; per block",
           f"{STATIC}; {TOKEN}; per group at run time", "self_attn.k_scale, v_scale; also per head", _compressed),
    Format("fbgemm_fp8", "FBGEMM, transformers", "per channel", f"{TOKEN}, at most activation_scale_ub", "none",
           _fbgemm),
    Format("modelopt", "ModelOpt, also by hf_quant_config.json", "per tensor; per channel", f"{STATIC}; {TOKEN}",
           "self_attn.k_proj.k_scale, v_proj.v_scale", _modelopt),
)  # fmt: skip


def table() -> str:
    """The rows as Markdown."""
    head = ("quant_method", "written by", "weights' scales", "activations' scales", "KV scales")
    rows = [head, ["---"] * len(head), *([f"`{row.method}`", row.made_by, row.weights, row.activations, row.kv_scales]
                                         for row in FORMATS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spelled(schemes: Schemes) -> str:
    """One line for the log."""
    used = dict.fromkeys(scheme for scheme in (schemes.default, *(rule[1] for rule in schemes.by_name)) if scheme)
    said = "; ".join(f"weights per {scheme.weight}, activations {scheme.activations}" for scheme in used)
    kept = f", plain: {json.dumps(list(schemes.plain))[:200]}" if schemes.plain else ""
    return f"{said}{', scales of keys and values' if schemes.kv_scales else ''}{kept}"
