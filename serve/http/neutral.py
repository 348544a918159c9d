"""Request fields that clients send and wave64 does not support, and the values of each that have no effect.

The names are OpenAI's, SGLang's and vLLM's. Whatever the field, null, false and what is empty ask for nothing, except
in ON_BY_DEFAULT.
"""

from typing import Any

# Of no effect on the tokens of the answer, whatever their value.
WITHOUT_EFFECT = frozenset((
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "max_tool_calls", "reasoning", "reasoning_effort", "verbosity", "include_obfuscation",
    "request_id", "priority", "log_metrics",
    "background", "spaces_between_special_tokens", "separate_reasoning", "stream_reasoning", "include_reasoning",
    "return_text_in_logprobs", "return_flat_raw_top_logprobs_b64", "cache_salt", "extra_key", "session_id",
    "conversation_id", "routing_key", "custom_labels", "cache_prompt", "length_penalty", "early_stopping",
    "mm_processor_kwargs", "mm_hashes", "max_dynamic_patch", "min_dynamic_patch", "images_config", "video_config",
    "use_audio_in_video", "guided_decoding_backend",
))  # fmt: skip

# On by default: false would change the answer. Each with an alternative.
ON_BY_DEFAULT = {
    "enable_thinking": 'put it into chat_template_kwargs: {"enable_thinking": ...}',
    "thinking": 'put it into chat_template_kwargs: {"thinking": ...}',
    "detokenize": "the answer has text in any case; /generate gives output_ids, too",
}

# These would change the answer: generation, tools, other media, what the prompt is made of, which model and where, what
# the answer carries. Some have a value without effect, the default of the servers that have it.
NOT_SERVED: dict[str, tuple[Any, ...]] = dict.fromkeys((
    "suffix", "prediction", "allowed_token_ids", "logits_processors", "vllm_xargs", "custom_params",
    "custom_logit_processor", "watermark", "use_beam_search", "stop_regex", "max_thinking_tokens",
    "thinking_token_budget", "require_reasoning", "repetition_detection", "guided_whitespace_pattern", "tools",
    "functions", "web_search_options", "audio", "image_data", "audio_data", "video_data", "input_embeds",
    "prompt_embeds", "positional_embed_overrides", "chat_template", "documents", "task", "previous_response_id",
    "conversation", "session_params", "lora_path", "lora_id", "disagg_prefill_dp_rank", "bootstrap_host",
    "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size", "kv_transfer_params",
    "http_worker_ipc", "prompt_logprobs", "token_ids_logprob", "return_hidden_states", "return_routed_experts",
    "return_indexer_topk", "return_cached_tokens_details", "return_spec_tokens_details", "return_token_ids",
    "return_tokens_as_token_ids", "return_prompt_token_ids", "return_meta_info", "return_input_ids_in_sglext",
    "return_output_ids_in_sglext", "return_sampling_mask", "return_flat_raw_top_logprobs",
    "return_flat_raw_output_top_logprobs",
), ()) | {
    "beam_width": (1,), "best_of": (1,), "min_length": (0,), "top_logprobs": (0,),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "modalities": (["text"],), "data_parallel_rank": (0,), "routed_dp_rank": (0,), "sampling_logprobs_mode":
    ("selected",), "routed_experts_start_len": (0,),
}  # fmt: skip


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field that is not served may be passed over with this value."""
    if name in WITHOUT_EFFECT or value is None:
        return True
    if name in ON_BY_DEFAULT:
        return value is True and name == "detokenize"
    if value is False or value in ("", [], {}):
        return True
    if isinstance(value, bool):  # True == 1
        return False
    if isinstance(value, list) and name != "modalities":  # /generate: an entry per prompt
        return all(asks_for_nothing(name, entry) for entry in value)
    return value in NOT_SERVED.get(name, ())


def objection(name: str) -> str | None:
    """Why a field is refused that asks for something; None where the name is not known."""
    if name in ON_BY_DEFAULT:
        return f"{name}: not a field of wave64; {ON_BY_DEFAULT[name]}"
    if name in NOT_SERVED:
        return f"{name}: not supported by wave64; leave it out"
    return None
