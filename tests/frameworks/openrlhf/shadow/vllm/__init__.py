"""A package that has vLLM's name, for tests alone: OpenRLHF imports vLLM by name, and finds this on the path that the
test gives to its actors. What it asks of vLLM goes to `headrace.rl.openrlhf.OpenRLHFWorker`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

from headrace.rl.openrlhf import OpenRLHFWorker

__version__ = "0.29.0"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = 16
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None


class AsyncEngineArgs:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput] = field(default_factory=list)


class OutputProcessor:
    def __init__(self, worker: OpenRLHFWorker) -> None:
        self._worker = worker

    def get_num_unfinished_requests(self) -> int:
        return self._worker.num_unfinished


class AsyncLLMEngine:
    def __init__(self, worker: OpenRLHFWorker) -> None:
        self._worker = worker
        self.output_processor = OutputProcessor(worker)
        self.is_sleeping = worker.is_sleeping
        self.reset_prefix_cache = worker.reset_prefix_cache
        self.pause_generation = worker.pause_generation
        self.resume_generation = worker.resume_generation
        self.sleep = worker.sleep
        self.wake_up = worker.wake_up

    @classmethod
    def from_engine_args(cls, given: AsyncEngineArgs) -> AsyncLLMEngine:
        return cls(OpenRLHFWorker(**given.settings))

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return [await getattr(self._worker, method)(*args)]

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[RequestOutput]:
        sample = await self._worker.generate(prompt["prompt_token_ids"], asdict(params), request_id)
        drawn = zip(sample.token_ids, sample.logprobs, strict=True)
        logprobs = None if params.logprobs is None else [{token: Logprob(value)} for token, value in drawn]
        yield RequestOutput([CompletionOutput(sample.token_ids, sample.text, sample.finish_reason, logprobs)])
