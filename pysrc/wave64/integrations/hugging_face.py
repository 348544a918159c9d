"""wave64's attention, norms and experts inside Hugging Face's transformers, from 5 on:

    from wave64.integrations import hugging_face

    hugging_face.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="wave64")
    hugging_face.use_norms(model)
    model.set_experts_implementation("wave64")     # a mixture of experts

transformers' caches keep the keys of a sequence in one tensor, so each sequence is one page as long as the cache, and
no key is copied. With padding, on the left or on the right, the tokens that count are gathered first, which waits for
the device. What the kernels do not compute is refused by ValueError, with the reason: dropout, gradients, masks with
more in them than causality, a sliding window and padding, attention weights as an output.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wave64 import ops

#: Norms whose formula is `x / sqrt(mean(x^2) + variance_epsilon) * weight`, unlike Gemma's, which adds 1 to the weight.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen2MoeRMSNorm", "Qwen3RMSNorm",
         "Qwen3MoeRMSNorm", "DeepseekV2RMSNorm", "DeepseekV3RMSNorm")
#: What a mask of transformers may be composed of: the functions' names in transformers.masking_utils.
MASKS = ("causal_mask_function", "sliding_window_overlay.<locals>.inner_mask")
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}


def register(name: str = "wave64") -> None:
    """Makes `attn_implementation=name` and `experts_implementation=name` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    ExpertsInterface.register(name, experts)


def use_norms(model: nn.Module) -> int:
    """Has every norm of `model` that is in NORMS computed by `rms_norm`; how many these are."""
    found = [module for module in model.modules() if type(module).__name__ in NORMS]
    for module in found:
        module.forward = types.MethodType(_norm, module)
    return len(found)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return ops.rms_norm(rows, self.weight, self.variance_epsilon).view(hidden_states.shape)


def _parts(function: Callable) -> list[str]:
    """The names of the functions that a mask of transformers is composed of, by `and` and by `or`."""
    inside = [cell.cell_contents for cell in function.__closure__ or ()]
    composed = [each for each in inside if isinstance(each, tuple) and each and all(map(callable, each))]
    if not composed:
        return [function.__qualname__]
    return [function.__qualname__.replace(".<locals>.and_mask", ""), *(name for each in composed for part in each
                                                                      for name in _parts(part))]


def mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
         mask_function: Callable | None = None, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """transformers' mask interface: which keys count, bool [batch_size, keys so far], or None if all do.

    attention_mask  [batch_size, tokens so far]  0 for padding
    raises          ValueError for a mask that is more than causal, with a sliding window, and padding
    """
    if mask_function is not None and (more := {*_parts(mask_function)} - {*MASKS, "and_masks"}):
        raise _refusal("attention_mask", f"causality, a sliding window and padding, got {', '.join(sorted(more))}")
    length = int(q_offset) + q_length - kv_offset  # a static cache has more slots than that
    if attention_mask is None:
        return None if length == kv_length else torch.ones(batch_size, length, dtype=torch.bool,
                                                           device=others.get("device"))
    kept = attention_mask[:, kv_offset: kv_offset + length].bool()
    return None if length == kv_length and bool(kept.all()) else kept


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
              scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
              softcap: float | None = None, s_aux: Tensor | None = None, **others: Any) -> tuple[Tensor, None]:
    """transformers' attention interface.

    query           [batch, num_heads, queries, head_dim]  the last positions of their sequences
    key             [batch, num_kv_heads, keys, head_dim]
    value           [batch, num_kv_heads, keys, value_dim]  another width than head_dim without window, cap and sinks
    attention_mask  what `mask` gave
    s_aux           [num_heads]  sinks, as gpt-oss has them
    returns         [batch, queries, num_heads, value_dim], zeros for padding; and no weights
    raises          ValueError for what the kernels do not compute
    """
    if dropout:
        raise _refusal("dropout", f"0, got {dropout}; call model.eval()")
    if others.get("output_attentions"):
        raise _refusal("output_attentions", "False: the weights are never stored")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise _refusal("is_causal", "True: encoders and cross-attention are not served")
    if others.get("position_bias") is not None:
        raise _refusal("position_bias", "None: no term is added to the logits")
    if attention_mask is not None and attention_mask.ndim != 2:
        got = f"{list(attention_mask.shape)}"
        raise _refusal("attention_mask", f"[batch, tokens so far], 0 for padding, got {got}")
    batch, heads, queries, head_dim = query.shape
    length = key.shape[2] if attention_mask is None else attention_mask.shape[1]
    keys, values = (each[:, :, :length].transpose(1, 2) for each in (key, value))
    if attention_mask is None or bool(attention_mask.all()):
        counts, valid = torch.full((batch,), length, dtype=torch.int32, device=query.device), None
    else:
        counts, valid = attention_mask.sum(1, dtype=torch.int32), attention_mask[:, -queries:]
        first = (~attention_mask).to(torch.int8).argsort(dim=1, stable=True)  # those that count come first, in order
        keys, values = (each.gather(1, first[:, :, None, None].expand(each.shape)) for each in (keys, values))
    scale = head_dim**-0.5 if scaling is None else scaling
    window = -1 if sliding_window is None else sliding_window
    asked = query.transpose(1, 2)
    if value.shape[3] != head_dim:
        if window >= 0 or softcap or s_aux is not None:
            raise _refusal("value", f"heads of {head_dim} with a window, a cap or sinks, got {value.shape[3]}")
        packed = _ragged(asked, keys, values, counts, valid, scale)
    else:
        options = dict(sliding_window=window, logit_cap=softcap or 0.0, sinks=s_aux)
        packed = _paged(asked, keys, values, counts, valid, scale, options)
    if valid is None or packed.ndim == 4:
        return packed.view(batch, queries, heads, value.shape[3]), None
    out = packed.new_zeros(batch, queries, heads, value.shape[3])
    out[valid] = packed
    return out, None


def _starts(counts: Tensor) -> Tensor:
    return nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _queries(asked: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries of all sequences one behind the other, and how many each has."""
    batch, queries = asked.shape[:2]
    if valid is None:
        return asked.reshape(batch * queries, *asked.shape[2:]), torch.full((batch,), queries, dtype=torch.int32,
                                                                            device=asked.device)
    return asked[valid], valid.sum(1, dtype=torch.int32)


def _paged(asked: Tensor, keys: Tensor, values: Tensor, counts: Tensor, valid: Tensor | None, scale: float,
           options: dict[str, Any]) -> Tensor:
    """Each sequence is a page."""
    batch, queries = asked.shape[:2]
    keys, values = (each if each.stride(3) == 1 else each.contiguous() for each in (keys, values))
    table = torch.arange(batch, dtype=torch.int32, device=asked.device)[:, None]
    if queries == 1:  # a query that is padding gets what its sequence has: no one reads it
        return ops.paged_attention(asked[:, 0], keys, values, table, counts, scale, **options)[:, None]
    packed, numbers = _queries(asked, valid)
    return ops.prefill_attention(packed, keys, values, table, _starts(numbers), counts, queries, scale, **options)[0]


def _ragged(asked: Tensor, keys: Tensor, values: Tensor, counts: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Heads of values as wide as they are: MLA's."""
    length, (packed, numbers) = keys.shape[1], _queries(asked, valid)
    counted = torch.arange(length, device=asked.device) < counts[:, None]
    return ops.varlen_attention(packed, keys[counted], values[counted], _starts(numbers), _starts(counts),
                                asked.shape[1], length, scale)[0]


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts interface, of modules with gate_up_proj [experts, 2 * inter, hidden] and down_proj.

    raises  ValueError for experts with biases, transposed or interleaved weights, another gate or a norm behind
    """
    activation = ACTIVATIONS.get(type(self.act_fn).__name__)
    default = type(self)._apply_gate.__name__ == "_default_apply_gate"
    for what, wanted in (("has_bias", False), ("has_gate", True), ("is_transposed", False), ("is_concatenated", True),
                         ("has_post_expert_norm", False)):
        if getattr(self, what, wanted) != wanted:
            raise _refusal(f"{type(self).__name__}.{what}", f"{wanted}: fused_moe has no other experts")
    if activation is None or not default:
        raise _refusal(f"{type(self).__name__}.act_fn", f"one of {', '.join(ACTIVATIONS)} on the gate alone")
    return ops.fused_moe(hidden_states, self.gate_up_proj, self.down_proj, top_k_weights.float().contiguous(),
                         top_k_index.to(torch.int32).contiguous(), activation=activation)


def _refusal(argument: str, expected: str) -> ValueError:
    return ValueError(f"wave64.integrations.hugging_face: {argument}: expected {expected}; "
                      'what else the model needs is served by attn_implementation="sdpa"')
