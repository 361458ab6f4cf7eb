"""The client for callers without an event loop: a facade over `AsyncClient`, whose docstrings say what methods do.

Owns nothing: with a transport that blocks, the coroutines of `AsyncClient` never wait, and are run on the spot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

from headrace.client.async_client import DEFAULT_TIMEOUT, AsyncClient
from headrace.client.transport import BlockingTransport, check_url
from headrace.engine.calls import run_here
from headrace.engine.fields import InputIds, Prompts, Sampling
from headrace.engine.requests import GenerateOptions
from headrace.types.generation import Generation

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _blocking(
    method: Callable[Concatenate[AsyncClient, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Client, Parameters], Result]:
    """The method of `Client` that does what one of `AsyncClient` does."""

    @functools.wraps(method)
    def wait(self: Client, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return run_here(method(self.asynchronous, *args, **kwargs))

    return wait


class Client:
    """An engine at `url`, as `Engine` is one here. See `AsyncClient`. May be used from any thread, and in a fork."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        *,
        shares_memory: bool = True,
    ) -> None:
        transport = BlockingTransport(check_url(url))
        self.asynchronous = AsyncClient(
            url, api_key, admin_key, timeout, shares_memory=shares_memory, transport=transport
        )
        """The same calls as coroutines, which block all the same."""

    @property
    def url(self) -> str:
        return self.asynchronous.url

    generate = _blocking(AsyncClient.generate)
    chat = _blocking(AsyncClient.chat)
    generate_native = _blocking(AsyncClient.generate_native)
    score = _blocking(AsyncClient.score)
    abort = _blocking(AsyncClient.abort)
    pause = _blocking(AsyncClient.pause)
    resume = _blocking(AsyncClient.resume)
    release_memory_occupation = _blocking(AsyncClient.release_memory_occupation)
    resume_memory_occupation = _blocking(AsyncClient.resume_memory_occupation)
    flush_cache = _blocking(AsyncClient.flush_cache)
    begin_update = _blocking(AsyncClient.begin_update)
    stage = _blocking(AsyncClient.stage)
    stage_from_group = _blocking(AsyncClient.stage_from_group)
    group_address = _blocking(AsyncClient.group_address)
    commit = _blocking(AsyncClient.commit)
    abort_update = _blocking(AsyncClient.abort_update)
    update_weights_from_tensor = _blocking(AsyncClient.update_weights_from_tensor)
    update_weights_from_bucket = _blocking(AsyncClient.update_weights_from_bucket)
    update_weights_from_disk = _blocking(AsyncClient.update_weights_from_disk)
    init_weights_update_group = _blocking(AsyncClient.init_weights_update_group)
    destroy_weights_update_group = _blocking(AsyncClient.destroy_weights_update_group)
    update_weights_from_distributed = _blocking(AsyncClient.update_weights_from_distributed)
    set_weight_version = _blocking(AsyncClient.set_weight_version)
    get_weights_by_name = _blocking(AsyncClient.get_weights_by_name)
    digest = _blocking(AsyncClient.digest)
    save_model = _blocking(AsyncClient.save_model)
    save_sharded_model = _blocking(AsyncClient.save_sharded_model)
    save_remote_model = _blocking(AsyncClient.save_remote_model)
    weights_checker = _blocking(AsyncClient.weights_checker)
    give_rewards = _blocking(AsyncClient.give_rewards)
    slow_down = _blocking(AsyncClient.slow_down)
    freeze_gc = _blocking(AsyncClient.freeze_gc)
    start_profile = _blocking(AsyncClient.start_profile)
    stop_profile = _blocking(AsyncClient.stop_profile)
    collective_rpc = _blocking(AsyncClient.collective_rpc)
    metrics = _blocking(AsyncClient.metrics)
    status = _blocking(AsyncClient.status)
    health = _blocking(AsyncClient.health)
    close = _blocking(AsyncClient.close)

    def stream(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Generation, None, None]:
        """See `AsyncEngine.stream`."""
        pieces = self.asynchronous.stream(prompts, input_ids, sampling_params, **options)
        try:
            while (piece := run_here(_next(pieces))) is not None:
                yield piece
        finally:
            run_here(pieces.aclose())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _next(pieces: Any) -> Generation | None:
    return await anext(pieces, None)
