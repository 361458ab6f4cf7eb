"""What verl's words mean here: its rollout config as settings, its sampling parameters as a request, a generation as
the fields of its `TokenOutput`. Knows neither verl nor Ray, whose objects it only reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.config import EngineConfig
from headrace.engine.requests import GenerateOptions
from headrace.types.errors import ConfigError, RequestError
from headrace.types.generation import Generation
from headrace.types.plain_values import as_integer
from headrace.types.sampling_params import LogprobMode

NAME = "headrace"

_LOGPROB_MODES: dict[str | None, LogprobMode] = {
    **{None: "temperature", "processed_logprobs": "sampled"},
    "raw_logprobs": "raw",
}
_NOT_TAKEN = {
    "data_parallel_size": (1,),
    "expert_parallel_size": (1,),
    "quantization": (None,),
    "quantization_config_file": (None,),
}
"""Fields of a rollout config that mean something here only at these values. (Replicas are verl's data parallelism.)"""

_STOP_REASONS = {"abort": "aborted", "stop": "completed", "length": "completed"}


class Launch(msgspec.Struct, frozen=True):
    """What one server is started with. `engine` and `server` are keywords of `Engine` and `headrace.serve`.

    awaits_weights    nothing is generated before the first update: what is loaded at the start is no policy
    frees_memory      `sleep` releases memory at all
    keeps_weights     memory of weights stays while it sleeps
    restores_weights  nobody sends weights: after a sleep they come from the folder
    """

    engine: dict[str, Any]
    server: dict[str, Any]
    prompt_length: int
    response_length: int
    awaits_weights: bool
    frees_memory: bool
    keeps_weights: bool
    restores_weights: bool


def launch_of(rollout: Any, model_path: str, mode: str, replica_rank: int) -> Launch:
    """From a `RolloutConfig`; `mode` is the value of a `RolloutMode`. `engine_kwargs.headrace` has further settings of
    the engine and of its server, which win.

    Raises `ConfigError` naming the field of the rollout config that asks for what is not there.
    """
    for name, values in _NOT_TAKEN.items():
        if getattr(rollout, name) not in values:
            message = f"rollout.{name}={getattr(rollout, name)!r} is not supported by rollout.name={NAME}"
            raise ConfigError(f"{message}; leave it at {values[0]}", field=name)
    if rollout.logprobs_mode not in _LOGPROB_MODES:
        raise ConfigError(f"rollout.logprobs_mode={rollout.logprobs_mode!r} is not known", field="logprobs_mode")
    given = dict(rollout.engine_kwargs.get(NAME) or {})
    engine = {
        "model": model_path,
        "tp_size": rollout.tensor_model_parallel_size,
        "pp_size": rollout.pipeline_model_parallel_size,
        "dtype": rollout.dtype,
        "load_format": rollout.load_format,
        "skip_tokenizer_init": rollout.skip_tokenizer_init,
        "context_length": rollout.max_model_len,
        "max_running_requests": rollout.max_num_seqs,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "memory_fraction": rollout.gpu_memory_utilization,
        "memory_saver": rollout.free_cache_engine,
        "prefix_cache": rollout.enable_prefix_caching,
        "cuda_graphs": not rollout.enforce_eager,
        "numerics": "invariant" if rollout.full_determinism else "fast",
        "logprob_mode": _LOGPROB_MODES[rollout.logprobs_mode],
        "keep_routed_experts": bool(rollout.enable_rollout_routing_replay),
        "seed": rollout.seed + replica_rank,  # replicas that get equal prompts are not to answer alike
    }
    server = {name: value for name, value in given.items() if name not in EngineConfig.__struct_fields__}
    is_synced = mode != "colocated"
    return Launch(
        engine={**engine, **{name: value for name, value in given.items() if name in EngineConfig.__struct_fields__}},
        server={"host": _loopback(replica_rank), **server},
        prompt_length=rollout.prompt_length,
        response_length=rollout.response_length,
        awaits_weights=is_synced and rollout.load_format == "dummy",
        frees_memory=rollout.free_cache_engine,
        keeps_weights=mode == "standalone",
        restores_weights=not is_synced,
    )


def server_name(replica_rank: int, role: str = "", suffix: str = "") -> str:
    """The name of a replica's server among Ray's actors; `role`: "reward" or "teacher", "" for the policy's."""
    return "_".join(filter(None, (NAME, "server", role, f"{replica_rank}"))) + suffix


def _loopback(replica_rank: int) -> str:
    """An address of this host only, of its own: verl knows replicas on several hosts by their servers' addresses."""
    return f"127.0.{replica_rank >> 8 & 255}.{(replica_rank & 255) + 1}"


class AskedSample(msgspec.Struct, frozen=True):
    """A request of verl's. `num_prompt_top`: most probable tokens wanted per prompt position, 0 for the prompt's own
    only; None: the prompt is not scored."""

    sampling: dict[str, Any]
    options: GenerateOptions
    wants_logprobs: bool
    num_prompt_top: int | None


def asked_of(request_id: str, num_prompt_tokens: int, params: Mapping[str, Any], launch: Launch) -> AskedSample:
    """From verl's `sampling_params`: what verl adds to them is taken out, the rest is `SamplingParams`'.

    Without a limit a response fills what is left of `prompt_length` and `response_length`. `RequestError` names what
    is given wrong.
    """
    sampling = {name: value for name, value in params.items() if name != "detokenize"}  # ids are what is answered
    wants_logprobs = bool(sampling.pop("logprobs", False))
    num_top = sampling.pop("prompt_logprobs", None)
    limits = [sampling.pop(name) for name in ("max_tokens", "max_new_tokens") if sampling.get(name) is not None]
    if len(limits) > 1:
        raise RequestError("sampling_params.max_tokens and max_new_tokens are both given", field="max_tokens")
    room = launch.prompt_length + launch.response_length - num_prompt_tokens
    sampling["max_new_tokens"] = max(
        0, as_integer(limits[0], "max_tokens") if limits else min(launch.response_length, room)
    )
    options: GenerateOptions = {"request_id": request_id, "clip_to_context": True, "progress": False}
    if num_top is not None:
        num_top = as_integer(num_top, "prompt_logprobs")
        options["return_prompt_logprobs"] = True
        options["top_logprobs"] = num_top
    if launch.engine.get("keep_routed_experts"):
        options["return_routed_experts"] = True
    return AskedSample(sampling, options, wants_logprobs, num_top)


def output_of(generation: Generation, asked: AskedSample, prompt_ids: Sequence[int], version: str) -> dict[str, Any]:
    """The fields of a `TokenOutput`. `version` labels the live weights, for a generation that has no token."""
    steps = [step_of(label) for label, _ in generation.version_spans] or [step_of(version)]
    known = [step for step in steps if step is not None]
    extra = {
        "global_steps": steps[-1],
        "min_global_steps": min(known, default=None),
        "max_global_steps": max(known, default=None),
        "num_cached_tokens": generation.num_cached_tokens,
    }
    if asked.num_prompt_top is not None and len(generation.prompt_logprobs) == len(prompt_ids):
        extra |= _prompt_scores(generation, asked.num_prompt_top, prompt_ids)
    return {
        "token_ids": generation.token_ids,
        "log_probs": generation.logprobs if asked.wants_logprobs else None,
        "routed_experts": None if generation.routed_experts is None else generation.routed_experts.array(),
        "stop_reason": _STOP_REASONS[generation.finish_reason or "abort"],
        "num_preempted": generation.num_preemptions,
        "extra_fields": extra,
    }


def aborted_output(version: str) -> dict[str, Any]:
    """The fields of a `TokenOutput` of a request that is to be sent again: nothing of it was generated."""
    return {
        "token_ids": [],
        "log_probs": [],
        "stop_reason": "aborted",
        "extra_fields": {"global_steps": step_of(version)},
    }


def step_of(version: str) -> int | None:
    """The trainer's step that a label of weights names; None for one that is nobody's."""
    return int(version) if version.isascii() and version.isdigit() else None


def _prompt_scores(generation: Generation, num_top: int, prompt_ids: Sequence[int]) -> dict[str, Any]:
    """As verl's teachers answer: row `i` is of token `i + 1`, most probable first, and the last row is padding."""
    ids: list[list[int]] = []
    values: list[list[float]] = []
    for position in range(1, len(prompt_ids)):
        own = {int(prompt_ids[position]): generation.prompt_logprobs[position] or 0.0}
        found = (generation.prompt_top_logprobs[position] or {}) if num_top else own
        ranked = sorted(found.items(), key=lambda pair: -pair[1])
        ids.append([token for token, _ in ranked])
        values.append([value for _, value in ranked])
    width = max(1, num_top)
    return {"prompt_ids": [*ids, [0] * width], "prompt_logprobs": [*values, [0.0] * width]}
