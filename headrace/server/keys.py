"""Keys of other engines' dialects: which exist there but not here, and what is said about keys nobody knows."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Set
from typing import Any

from headrace.types.errors import RequestError
from headrace.types.plain_values import hint
from headrace.types.sampling_params import SamplingParams

MAX_ABSENT_DEPTH = 8
MAX_NAMED = 32

LACKING_SAMPLING = frozenset(("json_schema", "regex", "ebnf", "structural_tag", "stop_regex", "stream_interval"))
LACKING_GENERATE = frozenset(
    (
        *("image_data", "video_data", "audio_data", "mm_hashes", "modalities", "input_embeds"),
        *("positional_embed_overrides", "custom_logit_processor", "require_reasoning", "background"),
        *("return_hidden_states", "return_indexer_topk"),
        *("return_sampling_mask", "return_entropy", "lora_path", "lora_id", "session_params"),
        *("bootstrap_host", "bootstrap_port", "bootstrap_room", "routed_dp_rank", "data_parallel_rank"),
    )
)
LACKING_OPENAI = LACKING_GENERATE | {
    *("response_format", "json_schema", "regex", "ebnf", "structural_tag", "structured_outputs", "custom_params"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "functions", "function_call", "audio"),
    *("prediction", "web_search_options", "echo", "suffix", "use_beam_search", "stop_regex"),
    *("return_routed_experts", "routed_experts_start_len"),
    *("input_ids", "documents", "chat_template", "prompt_embeds", "best_of"),
    *("allowed_token_ids", "bad_words", "logprob_token_ids", "logits_processors", "length_penalty", "early_stopping"),
    *("guided_decoding_backend", "guided_whitespace_pattern", "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs"),
    *("kv_transfer_params", "thinking_token_budget", "repetition_detection", "no_repeat_ngram_size"),
}

_DEFAULTS: dict[str, Any] = {"modalities": ["text"], "length_penalty": 1}
"""Values that say what this engine does anyway."""

_IDS = frozenset(("allowed_token_ids", "logprob_token_ids", "input_ids"))
"""Keys whose lists hold token ids: 0 is one."""


def refuse_lacking(values: Mapping[str, Any], lacking: Iterable[str], field: str = "") -> None:
    """Raise `RequestError` for a key of `lacking` that asks for something: null, false, 0 and empty mostly do not, nor
    do defaults."""
    for key in values.keys() & set(lacking):
        if _is_asked_for(key, values[key]):
            name = f"{field}.{key}" if field else key
            raise RequestError(f"{name} is not supported by this engine", field=name)


def _is_asked_for(key: str, value: Any) -> bool:
    if key in _IDS:
        return bool(value)
    if key in _DEFAULTS and type(value) is not bool and value == _DEFAULTS[key]:
        return False
    return not is_absent(value)


def is_absent(value: Any, depth: int = MAX_ABSENT_DEPTH) -> bool:
    """True for null, false, 0, "", {}, and lists of nothing but such, unless they are nested deeper than `depth`."""
    if isinstance(value, list):
        return depth > 0 and all(is_absent(each, depth - 1) for each in value)
    return not value


def warnings_for(values: Mapping[str, Any], known: Set[str]) -> list[str]:
    """What to tell a caller about keys that are not known."""
    unknown = values.keys() - known
    if not unknown:
        return []
    named = heapq.nsmallest(MAX_NAMED, unknown)
    warnings = [f"{ascii(key[:64])} is not known and was ignored{_meant(key, known)}" for key in named]
    return warnings if len(unknown) <= MAX_NAMED else [*warnings, f"so were {len(unknown) - MAX_NAMED} more"]


def _meant(key: str, known: Set[str]) -> str:
    """What to add to such a warning: where the key belongs, or which was meant."""
    if key in SamplingParams.__struct_fields__ and "sampling_params" in known:
        return "; it belongs in sampling_params"
    return hint(key, known)
