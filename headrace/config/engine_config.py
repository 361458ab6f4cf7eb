"""What an engine is asked to be. Owns the names and defaults of every setting; the CLI's flags are generated from it.

Nothing here is decided: `None` and "auto" stay as they are until `resolve()` turns them into a `ResolvedConfig`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_seconds, as_setting, hint
from headrace.types.sampling_params import LogprobMode
from headrace.types.weights import MAX_VERSION_LENGTH


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine. Every field is a keyword of `Engine(...)` and a flag of `headrace serve`.

    model                    a Hugging Face folder or hub id
    tokenizer                folder or id of the tokenizer; None: the model's
    skip_tokenizer_init      no tokenizer at all: token ids in, token ids out
    device                   "auto" (cuda where it can run) | "cpu" | "cuda" (the caller's current device of torch, or
                             before torch uses one the first that CUDA_VISIBLE_DEVICES shows)
    tp_size                  ranks that hold the model together, over which its heads have to split; each is a process,
                             and on cuda has a device of its own, one after the other
    pp_size                  stages that follow each other, each with some of the layers and `tp_size` ranks; they work
                             on different steps at once
    nnodes                   hosts that the ranks are on, an equal number each: one process per host. The first
                             serves; the others, `headrace serve` too, have their ranks and end with it
    node_rank                which of them this is, from 0 on
    dist_init_addr           "host:port" at which the first node listens for the others; all of them have the same
                             secret in HEADRACE_DIST_SECRET
    dtype                    "auto" (the checkpoint's on cuda, float32 on cpu) | "float32" | "bfloat16" | "float16"
    kv_dtype                 "auto" (dtype) | "fp8_e4m3" (half the memory, less accurate; triton and flashinfer only)
    load_format              "auto" | "safetensors" | "bin" | "dummy" (random weights from `seed`) | "sharded" (what
                             `save_sharded_model` wrote)
    check_finite             refuse weights that hold NaN or infinity, at start and in updates
    context_length           most tokens of one sequence; None: the model's
    page_size                tokens per KV page, 1 to 64
    kv_pool_tokens           tokens the KV pool holds; None: on cuda measured at start, on cpu see docs/architecture.md
    host_kv_tokens           tokens of computed prefixes that host memory holds beside the pool: what is evicted from it
                             is found again there, and copied back
    memory_fraction          cuda: share of the device memory that is free when the core starts, for weights,
                             workspace, graphs and KV together
    memory_saver             cuda: take weights and KV so that their memory can be released (a CPU's always can)
    keep_weights_copy        a release of weights leaves a copy of them in host memory, as large as they are, from which
                             they come back; it is dropped then
    max_running_requests     sequences that may hold a slot at once; None: 512 on cuda, 256 on cpu
    max_waiting_requests     queue bound; more are refused with 503
    max_num_batched_tokens   token budget of one step; None: 2048, on cuda for wide models max_running_requests + 256
    prefill_step_tokens      token budget of a step while few rows decode, so that prompts are computed in large pieces;
                             None: 8192 on cuda, on cpu or where `max_num_batched_tokens` is given as much as that
    max_step_ms              cuda: a step of `prefill_step_tokens` may take so long, as measured at the start, or they
                             are fewer: rows that decode beside it wait for it. Prompts that attend to long contexts
                             come in smaller pieces beside such rows, by an estimate of what attention takes
    prefix_cache             keep and match computed prefixes
    overlap_depth            plans issued ahead of the oldest unknown result; None: 1 on cuda, 0 on cpu, and with
                             stages one less than they are at least
    numerics                 "fast" | "invariant" (same bits whatever runs beside, at a cost)
    attention_backend        "auto" | "reference" (slow oracle) | "cpu" | "triton" | "flashinfer"
    cuda_graphs              replay steps as CUDA graphs
    max_graph_tokens         most tokens of a step that is captured as a graph
    kernel_cache             folder of built kernels, which may be carried to another host; None: the libraries' own
    seed                     seeds dummy weights and the seeds given to requests that bring none; None: drawn from the
                             system at each start, and reported
    num_threads              torch threads of the core process; None: OMP_NUM_THREADS, else the cores it may use, on
                             cuda at most 4 of them
    keep_routed_experts      which experts each computed token was given to, so that requests may ask: 2 bytes of host
                             memory for each token of the KV pool, layer, and expert of a token
    logprob_mode             default meaning of output log-probabilities
    prompt_logprob_mode      default meaning of prompt log-probabilities
    sampling_defaults        what stands for sampling parameters that a request does not give: "headrace" (those of
                             `SamplingParams`) | "model" (temperature, top_p, top_k, min_p and repetition_penalty of
                             the folder's generation_config.json come before them)
    served_model_name        name answered by the OpenAI routes; None: `model`
    initial_version          weight version label at start
    pause_timeout            seconds a request may wait behind a pause
    request_timeout          seconds a request may take in all; None: no limit of its own
    start_timeout            seconds the core may take to become ready
    control_timeout          seconds a control call may take
    watchdog_timeout         seconds one step or one command may take before the core is killed
    max_core_restarts        times a core that died is started again within core_restart_window, unless it shares the
                             caller's process; None: 3 under `headrace serve`, 0 in Python
    core_restart_window      seconds
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tp_size: int = 1
    pp_size: int = 1
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    load_format: Literal["auto", "safetensors", "bin", "sharded", "dummy"] = "auto"
    check_finite: bool = True
    context_length: int | None = None
    page_size: int = 16
    kv_pool_tokens: int | None = None
    host_kv_tokens: int = 0
    memory_fraction: float = 0.9
    memory_saver: bool = False
    keep_weights_copy: bool = False
    max_running_requests: int | None = None
    max_waiting_requests: int = 65536
    max_num_batched_tokens: int | None = None
    prefill_step_tokens: int | None = None
    max_step_ms: float = 250.0
    prefix_cache: bool = True
    overlap_depth: int | None = None
    numerics: Literal["fast", "invariant"] = "fast"
    attention_backend: Literal["auto", "reference", "cpu", "triton", "flashinfer"] = "auto"
    cuda_graphs: bool = True
    max_graph_tokens: int = 2048
    kernel_cache: str | None = None
    seed: int | None = None
    num_threads: int | None = None
    keep_routed_experts: bool = False
    logprob_mode: LogprobMode = "temperature"
    prompt_logprob_mode: LogprobMode = "raw"
    sampling_defaults: Literal["headrace", "model"] = "headrace"
    served_model_name: str | None = None
    initial_version: str = "default"
    pause_timeout: float = 600.0
    request_timeout: float | None = None
    start_timeout: float = 600.0
    control_timeout: float = 600.0
    watchdog_timeout: float = 1800.0
    max_core_restarts: int | None = None
    core_restart_window: float = 600.0

    def __post_init__(self) -> None:
        _make_plain(self)
        _check_bounds(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
        for key in values:
            if key not in cls.__struct_fields__:
                raise ConfigError(f"{key} is not an engine setting{hint(key, cls.__struct_fields__)}", field=key)
        if "model" not in values:
            raise ConfigError("model must name a folder or a hub id", field="model")
        return cls(**values)


class SettledConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An `EngineConfig` whose sizes and seed are known: what `ResolvedConfig.engine` is."""

    max_running_requests: int
    max_num_batched_tokens: int
    prefill_step_tokens: int = 1
    overlap_depth: int
    seed: int

    @property
    def max_step_tokens(self) -> int:
        """Tokens of the largest step."""
        return max(self.max_num_batched_tokens, self.prefill_step_tokens)

    @property
    def max_sequences(self) -> int:
        """Sequences that may run or wait at once: more in one call could never all be taken."""
        return self.max_running_requests + self.max_waiting_requests


@functools.cache
def _fields() -> tuple[msgspec.structs.FieldInfo, ...]:
    """Those of a config; to find them is to evaluate every annotation."""
    return msgspec.structs.fields(EngineConfig)


def _make_plain(config: EngineConfig) -> None:
    """Check the type of every field; scalars of NumPy and torch become numbers, paths strings."""
    for field in _fields():
        value = getattr(config, field.name)
        plain = as_setting(value, field.type, field.name, ConfigError)
        if plain is not value:
            msgspec.structs.force_setattr(config, field.name, plain)


_RANGES: dict[str, tuple[float, float]] = {
    "tp_size": (1, 64),
    "pp_size": (1, 8),
    "nnodes": (1, 64),
    "node_rank": (0, 63),
    "page_size": (1, 64),
    "max_running_requests": (1, 65536),
    "max_waiting_requests": (1, 1 << 24),
    "max_num_batched_tokens": (1, 1 << 20),
    "prefill_step_tokens": (1, 1 << 20),
    "max_step_ms": (1.0, 1e6),
    "overlap_depth": (0, 8),
    "max_graph_tokens": (1, 1 << 16),
    "seed": (0, (1 << 64) - 1),
    "memory_fraction": (0.01, 1.0),
    "pause_timeout": (0.0, 1e9),
    "max_core_restarts": (0, 1 << 16),
    "core_restart_window": (0.0, 1e9),
    "context_length": (1, 1 << 24),
    "kv_pool_tokens": (1, 1 << 32),
    "host_kv_tokens": (0, 1 << 32),
    "num_threads": (1, 4096),
}
_TIMES_TO_WORK = ("request_timeout", "start_timeout", "control_timeout", "watchdog_timeout")
_TEXTS = ("model", "tokenizer", "kernel_cache", "served_model_name", "initial_version", "dist_init_addr")


def _check_bounds(config: EngineConfig) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name} must be in [{low}, {high}], got {value}", field=name)
    for name in _TIMES_TO_WORK:
        if getattr(config, name) is not None:
            as_seconds(getattr(config, name), name, ConfigError)
    for name in _TEXTS:
        if getattr(config, name) == "":
            raise ConfigError(f"{name} is empty", field=name)
    _check_nodes(config)
    if len(config.initial_version) > MAX_VERSION_LENGTH:
        message = f"initial_version must have at most {MAX_VERSION_LENGTH} characters"
        raise ConfigError(message, field="initial_version")


_NODE_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s/]+):([0-9]{1,5})")


def _check_nodes(config: EngineConfig) -> None:
    if config.node_rank >= config.nnodes:
        message = f"node_rank must be in [0, {config.nnodes - 1}] with nnodes {config.nnodes}, got {config.node_rank}"
        raise ConfigError(message, field="node_rank")
    if config.nnodes == 1:
        return  # an address of nobody else is of no use, and does no harm
    found = _NODE_ADDRESS.fullmatch(config.dist_init_addr or "")
    if found is None or not 1 <= int(found[2]) <= 65535:
        message = f'dist_init_addr must be "host:port" with nnodes {config.nnodes}, got {config.dist_init_addr!r}'
        raise ConfigError(message, field="dist_init_addr")
