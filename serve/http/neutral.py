"""Request fields that clients send and wave64 does not support, and the values of each that have no effect.

The names are OpenAI's, SGLang's and vLLM's. Whatever the field, null, false and what is empty ask for nothing, except
in ON_BY_DEFAULT.
"""

import difflib
from collections.abc import Iterable
from typing import Any

MAX_GUESSED = 64  # characters of a name that may be a slip
SLIP = 0.8  # how alike a slip is to the name that was meant

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

# Of what is not served, the default of the servers that have it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "beam_width": (1,), "best_of": (1,), "min_length": (0,), "top_logprobs": (0,), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "modalities": (["text"],), "data_parallel_rank": (0,), "routed_dp_rank": (0,),
    "sampling_logprobs_mode": ("selected",), "routed_experts_start_len": (0,),
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
    return value in NEUTRAL.get(name, ())


def objection(name: str, known: Iterable[str]) -> str:
    """Why a field is refused that asks for something; known: the names of those that are served."""
    if name in ON_BY_DEFAULT:
        return f"not a field of wave64; {ON_BY_DEFAULT[name]}"
    if near := difflib.get_close_matches(name[:MAX_GUESSED], known, n=1, cutoff=SLIP):
        return f"unknown field; did you mean {near[0]}?"
    return "not supported by wave64; leave it out"
