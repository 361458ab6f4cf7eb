"""Health, identity and load. Owns nothing: every answer is read from the engine when asked."""

from __future__ import annotations

import datetime
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from headrace import __version__
from headrace.server import metrics
from headrace.server.errors import error_body, respond
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import json_reply
from headrace.types.errors import DeadlineError, HeadraceError, RequestError
from headrace.types.messages import CoreStatus
from headrace.types.sampling_params import LogprobMode

HEALTH_SECONDS = 5.0
_LAYOUT: dict[str, Any] = {
    **{name: 1 for name in ("dp_size", "ep_size", "moe_dp_size")},
    "disaggregation_mode": "null",
    "disaggregation_bootstrap_port": None,
    "encoder_only": False,
    "load_balance_method": "round_robin",
    "trust_remote_code": False,
    "enable_metrics": True,
}

_LOGPROBS_MODES: dict[LogprobMode, str] = {
    "raw": "raw_logprobs",
    **dict.fromkeys(("temperature", "sampled"), "processed_logprobs"),
}
"""What vLLM calls them. At "temperature" they are not of what top-k, top-p and min-p leave."""


class InfoFace:
    """The routes that only look."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._engine = state.engine
        self._throughput = _Throughput()

    def endpoints(self) -> list[Endpoint]:
        return [
            *(Endpoint(path, self.health, access="open") for path in ("/health", "/liveness")),
            Endpoint("/health_generate", self.health_generate, access="open"),
            Endpoint("/ready", self.ready, access="open"),
            *(Endpoint(path, self.model_info) for path in ("/model_info", "/get_model_info")),
            *(Endpoint(path, self.server_info) for path in ("/server_info", "/get_server_info")),
            *(Endpoint(path, self.weight_version) for path in ("/weight_version", "/get_weight_version")),
            Endpoint("/get_load", self.get_load),
            Endpoint("/v1/loads", self.loads),
            Endpoint("/metrics", self.metrics),
        ]

    async def health(self, request: Request) -> Response:
        """GET /health: this process lives, and so does its core or the next one, which is being started. Until the
        engine is ready for the first time, `headrace.server.starting` answers instead."""
        if not self._engine.is_alive:
            return respond(error_body(503, "the engine is dead; this process serves no more"))
        return Response()

    async def health_generate(self, request: Request) -> Response:
        """GET /health_generate: the core answers, or is at work on something long. Nothing is generated."""
        try:
            await self._engine.status(HEALTH_SECONDS)
        except HeadraceError as error:
            is_busy = isinstance(error, DeadlineError) and self._engine.is_responsive
            if not is_busy:
                return respond(error_body(503, f"the core does not answer: {error.message}"))
        return Response()

    async def ready(self, request: Request) -> Response:
        """GET /ready: a request that came now would start now."""
        if not self._state.is_ready:
            told = error_body(503, f"not ready: {self._why_not()}", retryable=True)
            return respond({**told, "weights_state": self._weights_state()})
        return json_reply({"ready": True, "weight_version": self._engine.version})

    async def model_info(self, request: Request) -> Response:
        config, model = self._engine.config, self._engine.resolved.model
        return json_reply(
            {
                "model_path": config.model,
                "tokenizer_path": config.tokenizer or config.model,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self._engine.version,
                "weights_state": self._weights_state(),
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": model.model_type,
                "architectures": [model.architecture],
            }
        )

    async def weight_version(self, request: Request) -> Response:
        return json_reply({"weight_version": self._engine.version, "weights_state": self._weights_state()})

    async def server_info(self, request: Request) -> Response:
        status = await self._engine.status(HEALTH_SECONDS)
        config, resolved, model = self._engine.config, self._engine.resolved, self._engine.resolved.model
        settings = {
            **msgspec.to_builtins(resolved.engine),
            **_LAYOUT,
            "num_gpus": resolved.num_ranks,
            "enable_memory_saver": resolved.engine.memory_saver,
            "enable_return_routed_experts": resolved.engine.keep_routed_experts,
            "model_path": config.model,
            "tokenizer_path": config.tokenizer or config.model,
            "served_model_name": self._state.model_name,
            "dtype": resolved.dtype,
            "kv_dtype": resolved.kv_dtype,
            "device": resolved.device,
            "context_length": resolved.context_length,
            "attention_backend": resolved.attention_backend,
            "eos_token_ids": model.eos_token_ids,
            "eos_sources": model.eos_sources,
            "random_seed": resolved.engine.seed,
            "mem_fraction_static": config.memory_fraction,
            "incremental_streaming_output": self._state.options.incremental_streaming_output,
        }
        internal = {
            **settings,
            "last_gen_throughput": self._throughput.measure(status),
            "memory_usage": {"token_capacity": status.max_total_num_tokens},
            "effective_max_running_requests_per_dp": resolved.engine.max_running_requests,
        }
        facts = {
            "status": status.state,
            "max_total_num_tokens": status.max_total_num_tokens,
            "max_req_input_len": resolved.context_length - 1,
            "weight_version": status.version,
            "weights_state": status.state,
            "internal_states": [internal],
            "version": __version__,
            "kv_events": None,
        }
        if "config_format" in request.query_params:
            facts["vllm_config"] = self._vllm_config()
        return json_reply({**settings, **facts})

    def _vllm_config(self) -> dict[str, Any]:
        """What trainers that speak vLLM's dialect look at."""
        resolved = self._engine.resolved
        return {
            "weight_transfer_config": {"backend": "gloo" if resolved.device == "cpu" else "nccl"},
            "model_config": {
                "model": self._engine.config.model,
                "dtype": f"torch.{resolved.dtype}",
                "max_model_len": resolved.context_length,
                "logprobs_mode": _LOGPROBS_MODES[self._engine.config.logprob_mode],
            },
            "parallel_config": {
                "tensor_parallel_size": resolved.engine.tp_size,
                "pipeline_parallel_size": resolved.engine.pp_size,
                "data_parallel_size": 1,
            },
            "lora_config": None,
        }

    async def get_load(self, request: Request) -> Response:
        status = await self._engine.status(HEALTH_SECONDS)
        load = {
            "dp_rank": 0,
            "num_reqs": status.num_running + status.num_waiting,
            "num_waiting_reqs": status.num_waiting,
            "num_tokens": status.num_used_tokens,
            "num_pending_tokens": 0,
            "ts_tic": time.perf_counter(),
        }
        return json_reply([load])

    async def loads(self, request: Request) -> Response:
        query = request.query_params
        if query.get("dp_rank") not in (None, "", "0"):
            raise RequestError("dp_rank must be 0, the only one", field="dp_rank")
        status = await self._engine.status(HEALTH_SECONDS)
        load = self._load(status)
        if query.get("format", "json") == "prometheus":
            lines = [
                f'headrace_load_{name}{{dp_rank="0"}} {value}' for name, value in load.items() if name != "dp_rank"
            ]
            return PlainTextResponse("\n".join(lines) + "\n", media_type=metrics.CONTENT_TYPE)
        if query.get("format", "json") != "json":
            raise RequestError("format must be json or prometheus", field="format")
        now = datetime.datetime.now(datetime.UTC).isoformat()
        return json_reply({"timestamp": now, "version": __version__, "dp_rank_count": 1, "loads": [load]})

    async def metrics(self, request: Request) -> Response:
        try:
            values = await self._engine.metrics()
        except HeadraceError:
            values = {}
        values = {**values, "is_ready": float(self._state.is_ready), "is_alive": float(self._engine.is_alive)}
        labels = {"model_name": self._state.model_name}
        latencies = self._engine.runtime.lookback.latencies
        return Response(self._state.metrics.render(values, latencies, labels), media_type=metrics.CONTENT_TYPE)

    def _weights_state(self) -> str:
        """That of the core as last heard of, "no_core" while there is none."""
        client = self._engine.runtime.client
        return client.status.state if client.is_alive and client.status is not None else "no_core"

    def _why_not(self) -> str:
        ailment = self._engine.runtime.client.diagnose()
        if not self._engine.is_alive:
            return "the core is dead"
        if not self._engine.runtime.client.is_alive:
            return "the core died and is being started again"
        if self._state.is_draining:
            return "draining"
        return "paused, updating, or without memory or whole weights" if ailment is None else ailment.message

    def _load(self, status: CoreStatus) -> dict[str, Any]:
        counts = status.metrics
        num_prompt = counts.get("num_prompt_tokens", 0.0)
        usage = status.num_used_tokens / max(status.max_total_num_tokens, 1)
        return {
            "dp_rank": 0,
            "num_running_reqs": status.num_running,
            "num_waiting_reqs": status.num_waiting,
            "num_total_reqs": status.num_running + status.num_waiting,
            "num_waiting_uncached_tokens": 0,
            "num_used_tokens": status.num_used_tokens,
            "num_total_tokens": status.num_used_tokens,
            "max_total_num_tokens": status.max_total_num_tokens,
            "max_running_requests": self._engine.resolved.engine.max_running_requests,
            "token_usage": usage,
            "gen_throughput": self._throughput.measure(status),
            "cache_hit_rate": counts.get("num_cached_tokens", 0.0) / num_prompt if num_prompt else 0.0,
            "utilization": usage,
        }


class _Throughput:
    """Generated tokens per second between one look and the next."""

    def __init__(self) -> None:
        self._seen_at = time.perf_counter()
        self._num_tokens = 0.0
        self._latest = 0.0

    def measure(self, status: CoreStatus) -> float:
        """The rate since the last look; looks within a tenth of a second of each other see the same."""
        now = time.perf_counter()
        if now - self._seen_at >= 0.1:
            num_tokens = status.metrics.get("num_generated_tokens", 0.0)
            self._latest = max(0.0, num_tokens - self._num_tokens) / (now - self._seen_at)
            self._seen_at, self._num_tokens = now, num_tokens
        return self._latest
