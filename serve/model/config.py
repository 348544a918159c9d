"""What a Hugging Face folder says of a model: config.json and generation_config.json, read once into ModelConfig.

Every key of config.json is understood, known to be without effect on inference, skipped with a line in the log, or
refused if its name says that it changes the mathematics: a key that is skipped silently is a model that answers wrongly
and silently. Reads two JSON files, and of weights their headers where config.json says that dtype is theirs.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wave64.serve.model.checkpoint import DTYPES as STORED_DTYPES
from wave64.serve.model.checkpoint import stored_tensors
from wave64.serve.model.schemes import Scheme, Schemes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"
}  # fmt: skip
MAX_LAYERS = 4096  # more would be made for minutes before a weight is missed
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

# Keys that do not change what a forward pass computes: names, training, transformers' own switches, generation
# defaults of old configs. pretraining_tp only splits the same matrix products in slices; auto_map names Python code
# of the checkpoint, which is never run.
WITHOUT_EFFECT = frozenset((
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "pretraining_tp", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "max_sequence_length", "unsloth_version", "unsloth_fixed",
    "tokenizer_class", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "return_dict",
    "return_dict_in_generate", "output_hidden_states", "output_attentions", "output_scores", "torchscript",
    "finetuning_task", "prefix", "chunk_size_feed_forward", "use_bfloat16", "tf_legacy_loss", "bad_words_ids",
    "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "max_length", "min_length", "max_new_tokens", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "remove_invalid_values", "repetition_penalty", "suppress_tokens", "temperature",
    "top_k", "top_p", "typical_p", "min_p", "is_llama_config", "transformers.js_config",
))  # fmt: skip

# Parts of the names of keys that change what a forward pass computes, and of training's, which do not.
MATHEMATICS = re.compile(
    "rope|rotary|posit|alibi|attn|attention|head|kv|qk|mla|moe|expert|router|gate|topk|norm|scal|mult|quant|window|"
    "slid|chunk|sparse|softcap|capping|clip|logit|bias|activ|act_fn|residual|parallel|embed|layer|lora|rank|dim|"
    "hidden|width|mamba|ssm|conv|recur|index|compress|interleav|factor|eps|loop|depth|tie_|tied|vocab|num_|_size"
)  # fmt: skip
TRAINING = re.compile("dropout|pdrop|loss|initializer")

# rope type -> (required keys, optional keys) in addition to rope_theta and the type itself
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": ((), ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
                  "mscale", "mscale_all_dim", "truncate")),
}  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot be served; names the file, the key, its value and what is supported."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one model; `wave64.serve.model.rope` has the mathematics of each type."""

    rope_type: str = "default"  # a key of ROPE_KEYS
    theta: float = 10000.0
    factor: float = 1.0  # how far beyond the trained context the frequencies are stretched
    original_max_position_embeddings: int = 0  # the trained context (llama3, yarn, dynamic)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention; widths of one head, but for the ranks."""

    q_lora_rank: int  # 0: queries have no latent of their own
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool  # pairs are adjacent elements, not half a head apart
    softmax_scale: float


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: in layers from `first_dense_layers` on whose number `layer_freq` divides."""

    num_experts: int
    top_k: int
    num_groups: int  # 1: none
    topk_groups: int
    scoring_func: str  # softmax or sigmoid
    correction_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_shared_experts: int
    intermediate_size: int  # of an expert
    first_dense_layers: int
    layer_freq: int


@dataclass(frozen=True)
class QuantConfig:
    """Weights in FP8 (e4m3fn) with a scale per block of [rows, columns]; activations are quantized at run time."""

    weight_block_size: tuple[int, int]
    scale_ue8m0: bool = False  # activations' scales are powers of two
    kv_scales: bool = False  # latents have stored ones


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, sizes in elements. `sampling_defaults` holds those of SAMPLING_KEYS that the
    checkpoint's generation_config.json sets."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool  # of q, k, v and o projections
    mlp_bias: bool
    hidden_act: str  # silu, gelu or gelu_tanh
    dtype: torch.dtype  # what the checkpoint was saved in
    context_length: int  # longest sequence that can be served; `dataclasses.replace` it to serve another
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    quantization: QuantConfig | None = None  # DeepSeek's
    schemes: Schemes | None = None  # of linear layers in FP8, of the other families
    qkv_bias: bool = False  # of q, k and v projections alone
    sliding_window: int = -1  # w > 0: a query sees the last w tokens, its own among them; -1: all
    num_nextn_predict_layers: int = 0  # stored behind the last layer, for predicting the token after next
    passed_by: tuple[str, ...] = field(default=(), compare=False)  # keys that were not understood

    def layer(self, number: int) -> "ModelConfig":
        """The same, for building one layer: `scheme` is asked for names within it."""
        return replace(self, schemes=self.schemes and self.schemes.within(f"model.layers.{number}."))

    def scheme(self, name: str) -> Scheme | None:
        """How the linear layer `name` is stored in FP8; None: it is not."""
        return self.schemes.of(name) if self.schemes else None

    @classmethod
    def from_folder(cls, path: str | Path, ignored: Collection[str] = ()) -> "ModelConfig":
        """Reads `path`/config.json and, where present, `path`/generation_config.json. `ignored`: keys, dotted where
        they are within others, that are read as if they were not there.

        Raises ConfigError for a missing or malformed file, an architecture, value or key that is not supported, and
        WeightsError for a checkpoint whose headers are needed and damaged.
        """
        from wave64.serve.model import FAMILIES  # here, because families are built on this module

        keys = Keys(Path(path) / "config.json", ignored=ignored)
        names = keys.raw.get("architectures") or []
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str) and name in FAMILIES:
                return replace(FAMILIES[name].read_config(name, keys), passed_by=keys.pass_by_the_rest())
        raise keys.error("architectures", names, f"one of {', '.join(FAMILIES)}")


class Keys:
    """The keys of one JSON object, each read by name and type; keys that were not read are refused at the end."""

    def __init__(self, file: Path, raw: dict[str, Any] | None = None, prefix: str = "", ignored: Collection[str] = ()):
        self.file, self.prefix, self.ignored = file, prefix, ignored
        raw = _read_json(file) if raw is None else raw
        self.raw = {key: value for key, value in raw.items() if prefix + key not in ignored}
        self.asked: set[str] = set()

    def error(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.file}: {self.prefix}{key}: expected {expected}, got {json.dumps(value)[:120]}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where the key is absent or null."""
        self.asked.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None, max_value: int = 2**31 - 1) -> int:
        """An integer from 1 to `max_value`; required where there is no default."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, value, "a positive integer")
        if value > max_value:
            raise self.error(key, value, f"at most {max_value}")
        return value

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < float("inf"):
            raise self.error(key, value, f"a number above {above:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, choices: dict[str, Any]) -> Any:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(key, value, f"one of {', '.join(choices)}")
        return choices[value]

    def group(self, key: str) -> "Keys":
        """The keys of the object under `key`; none where it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, value, "an object or null")
        return Keys(self.file, value, f"{self.prefix}{key}.", self.ignored)

    def refused(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.error(key, self.raw[key], 'no such key')}: {why}; if it does not matter here, start "
                           f"with --ignore-config-key {self.prefix}{key}")

    def pass_by_the_rest(self) -> tuple[str, ...]:
        """The keys that were not read. Raises ConfigError for a key whose name says that it changes the mathematics.
        Keys that are off (null, false, empty) cannot, nor keys with a leading underscore, which are private to
        transformers."""
        known = self.asked | WITHOUT_EFFECT
        left = [key for key, value in self.raw.items()
                if key not in known and not key.startswith("_") and not _is_off(value)]
        for key in left:
            if MATHEMATICS.search(key.lower()) and not TRAINING.search(key.lower()):
                raise self.refused(key, "wave64 does not know it, and by its name it changes the mathematics")
        return tuple(left)

    def refuse_the_rest(self) -> None:
        """Raises ConfigError for any key that was not read and is not off."""
        for key, value in self.raw.items():
            if key not in self.asked and not _is_off(value):
                raise self.refused(key, "wave64 does not know it")


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == "" or value == [] or value == {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; expected a folder in Hugging Face format") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file}: cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def read_heads(keys: Keys, num_kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, int]:
    """num_heads, num_kv_heads and head_dim of grouped-query attention. num_kv_heads, head_dim: what a key that is
    missing means; None: num_attention_heads, and hidden_size / num_attention_heads."""
    hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    default = num_heads if num_kv_heads is None or "num_key_value_heads" in keys.raw else num_kv_heads
    num_kv_heads = keys.count("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        raise keys.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    if keys.get("head_dim", head_dim) is None and hidden_size % num_heads:
        raise keys.error("hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}, or a head_dim")
    head_dim = keys.count("head_dim", head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise keys.error("head_dim", head_dim, "an even number: RoPE rotates pairs of elements")
    return dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


def refuse_other_layers(keys: Keys, kind: str, family: str) -> None:
    """Raises ConfigError unless every entry of `layer_types` is `kind`, and for interleaved RoPE."""
    for key in ("rope_interleave", "rope_interleaved"):
        if keys.flag(key):
            raise keys.error(key, True, f"false: {family} rotates the two halves of a head")
    layer_types = keys.get("layer_types", [])
    if not isinstance(layer_types, list) or any(each != kind for each in layer_types):
        raise keys.error("layer_types", layer_types, f"{kind} in every layer")


def common(keys: Keys, rope: RopeConfig, max_position_embeddings: int, bos: int | None = 1,
           eos: int | None = 2) -> dict[str, Any]:
    """The fields of ModelConfig that every model's config.json spells alike. bos, eos: what a missing key means."""
    generation_file = keys.file.with_name("generation_config.json")
    generation = Keys(generation_file, _read_json(generation_file) if generation_file.exists() else {})
    return dict(
        rope=rope,
        max_position_embeddings=max_position_embeddings,
        context_length=int(max_position_embeddings * (rope.factor if rope.rope_type in ("linear", "dynamic") else 1)),
        vocab_size=keys.count("vocab_size"),
        hidden_size=keys.count("hidden_size"),
        intermediate_size=keys.count("intermediate_size"),
        num_layers=keys.count("num_hidden_layers", max_value=MAX_LAYERS),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        hidden_act=keys.choice("hidden_act", "silu", ACTIVATIONS),
        dtype=_dtype(keys),
        bos_token_id=generation.get("bos_token_id", keys.raw.get("bos_token_id", bos)),
        eos_token_ids=_end_ids(generation, keys, default=eos),
        sampling_defaults=_sampling_defaults(generation),
    )


def _sampling_defaults(generation: Keys) -> dict[str, float]:
    given = [key for key in SAMPLING_KEYS if generation.get(key) is not None]
    for key in given:
        generation.number(key, above=float("-inf"))
    greedy = {"temperature": 0.0} if generation.get("do_sample") is False else {}
    return {key: generation.get(key) for key in given} | greedy


def _end_ids(generation: Keys, keys: Keys, default: int | None) -> tuple[int, ...]:
    """The tokens that end a text: those of both files. An explicit null means none; `default`: where neither has the
    key."""
    if "eos_token_id" not in generation.raw and "eos_token_id" not in keys.raw:
        return () if default is None else (default,)
    return tuple(dict.fromkeys((*_token_ids(generation), *_token_ids(keys))))


def _token_ids(keys: Keys) -> tuple[int, ...]:
    value = keys.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise keys.error("eos_token_id", value, "a token id or a list of them")
    return tuple(ids)


def _dtype(keys: Keys) -> torch.dtype:
    """`dtype` is transformers 5's spelling of `torch_dtype`; old checkpoints that say neither hold float32. "auto" is
    what most of the weights are stored in, FP8 apart."""
    key = "dtype" if keys.get("dtype") is not None else "torch_dtype"
    known = DTYPES | {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
    if keys.get(key) != "auto":
        return keys.choice(key, "float32", known)
    folder = keys.file.parent
    sizes = dict.fromkeys(DTYPES.values(), 0)
    for tensor in stored_tensors(folder).values() if any(folder.glob("*.safetensors")) else ():
        if (dtype := STORED_DTYPES.get(tensor.dtype)) in sizes:
            sizes[dtype] += tensor.end - tensor.begin
    return max(sizes, key=sizes.__getitem__) if any(sizes.values()) else torch.float32


def read_rope(keys: Keys, max_position_embeddings: int) -> RopeConfig:
    """Either `rope_theta` and `rope_scaling`, or everything in `rope_parameters`; the type under `rope_type` or `type`.
    Both spellings may be present if they agree."""
    given = [keys.group(name) for name in ("rope_scaling", "rope_parameters") if keys.get(name)]
    rope = given[0] if given else Keys(keys.file, {}, "rope_scaling.", keys.ignored)
    if len(given) == 2 and given[0].raw != given[1].raw:
        raise keys.error("rope_parameters", given[1].raw, f"the same as rope_scaling, {json.dumps(given[0].raw)}")
    types = {name: rope.get(name) for name in ("rope_type", "type") if rope.get(name) is not None}
    if len(set(types.values())) > 1:
        raise rope.error("type", types["type"], f"the same as rope_type, {types['rope_type']}")
    type_key, rope_type = next(iter(types.items()), ("rope_type", "default"))
    if rope_type not in ROPE_KEYS:
        raise rope.error(type_key, rope_type, f"one of {', '.join(ROPE_KEYS)}")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    if keys.get("rope_theta") not in (None, theta):
        raise keys.error("rope_theta", keys.get("rope_theta"), f"the same as {rope.prefix}rope_theta, {theta:g}")
    for group in (keys, rope):
        if group.number("partial_rotary_factor", 1.0) != 1.0:
            value = group.get("partial_rotary_factor")
            raise group.error("partial_rotary_factor", value, "1.0: RoPE on whole heads")

    required, optional = ROPE_KEYS[rope_type]
    # Checkpoints repeat the trained context and write out what a type does not scale.
    neutral = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": max_position_embeddings}
    unknown = {k for k, v in rope.raw.items() if not _is_off(v) and neutral.get(k) != v}
    # yarn checkpoints note by `finetuned` how they were made
    for key in sorted(unknown - {*required, *optional, *rope.asked, "finetuned"}):
        known = ", ".join((*required, *optional)) or "none"
        raise rope.refused(key, f"rope type {rope_type} does not have it (its keys: {known})")
    original = keys.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    values: dict[str, Any] = {"original_max_position_embeddings": max_position_embeddings}
    if original is not None and rope_type in ("llama3", "yarn"):
        group = keys if keys.get("original_max_position_embeddings") is not None else rope
        values["original_max_position_embeddings"] = group.count("original_max_position_embeddings")
    if rope_type == "yarn":
        default_factor = max_position_embeddings / values["original_max_position_embeddings"]
        values |= {
            "factor": rope.number("factor", default_factor),
            "beta_fast": rope.number("beta_fast", 32.0),
            "beta_slow": rope.number("beta_slow", 1.0),
            "truncate": rope.flag("truncate", True),
            **{key: rope.optional_number(key) for key in ("attention_factor", "mscale", "mscale_all_dim")},
        }
    else:
        values |= {key: rope.number(key) for key in required}
    if values.get("high_freq_factor", 2) <= values.get("low_freq_factor", 1):
        raise rope.error("high_freq_factor", values["high_freq_factor"], "more than low_freq_factor")
    return RopeConfig(rope_type=rope_type, theta=theta, **values)

