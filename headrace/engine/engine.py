"""The engine for callers without an event loop: a facade over `AsyncEngine`, whose docstrings say what methods do.

Owns nothing. Every method may be called from any thread, also from one in which an event loop runs (which it blocks).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, Unpack

from headrace.config import EngineConfig, ResolvedConfig
from headrace.engine.async_engine import AsyncEngine
from headrace.engine.calls import run_here
from headrace.engine.control import DEFAULT_UPDATE_TIMEOUT, terms_of
from headrace.engine.core_host import ExecutorKind
from headrace.engine.fields import InputIds, Prompts, Sampling
from headrace.engine.rank_group import share_engine
from headrace.engine.requests import GenerateOptions
from headrace.engine.runtime import Regret, result_of
from headrace.engine.tensors import NamedTensors, to_tensor
from headrace.engine.update_session import Manifest, UpdateSession
from headrace.text import Tokenizer
from headrace.types.errors import HeadraceError, RequestError
from headrace.types.generation import Generation
from headrace.types.weights import InFlight, PauseMode, UpdateMode, UpdateReport

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from headrace.core.rank_thread import RankThread

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _blocking(
    method: Callable[Concatenate[AsyncEngine, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Engine, Parameters], Result]:
    """The method of `Engine` that waits for one of `AsyncEngine`; what it takes, returns and raises is the same."""

    @functools.wraps(method)
    def wait(self: Engine, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return self._wait(method(self.asynchronous, *args, **kwargs))

    return wait


class Engine:
    """A running engine with blocking methods. A context manager; `shutdown` is also done when it is dropped."""

    def __init__(
        self,
        model: str | Path,
        *,
        inprocess: bool = False,
        executor: ExecutorKind = "local",
        rank_group: ProcessGroup | DeviceMesh | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> None:
        """See `AsyncEngine`.

        `rank_group` is a `torch.distributed` group, or a mesh of one dimension, every rank of which constructs this
        engine: its processes are the engine's ranks. The first has the engine, in a thread as with `inprocess`; each
        other one hosts its rank in a thread and can only `shutdown`, which waits for that of the first. `tp_size` is
        the size of the group, or of each of its `pp_size` stages. Raises on every rank what keeps one of them from
        starting, and `DeadlineError` naming those that have not come.
        """
        self._engine: AsyncEngine | RankThread
        if rank_group is None:
            self._engine = AsyncEngine(model, inprocess=inprocess, executor=executor, progress=progress, **settings)
            self._engine.wait_started()
        else:
            self._engine = share_engine(rank_group, model, settings, progress=progress)

    @property
    def asynchronous(self) -> AsyncEngine:
        """The engine that this one waits for. `RequestError` on a rank that only hosts a part of it."""
        if not isinstance(self._engine, AsyncEngine):
            message = f"this is rank {self._engine.number} of rank_group: call it on rank 0, which has the engine"
            raise RequestError(message, field="rank_group")
        return self._engine

    @property
    def is_leading(self) -> bool:
        """Whether calls are made here: not on another rank than the first of `rank_group`."""
        return isinstance(self._engine, AsyncEngine)

    @property
    def config(self) -> EngineConfig:
        return self.asynchronous.config

    @property
    def resolved(self) -> ResolvedConfig:
        return self.asynchronous.resolved

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.asynchronous.tokenizer

    @property
    def version(self) -> str:
        return self.asynchronous.version

    @property
    def is_alive(self) -> bool:
        return self.asynchronous.is_alive

    @property
    def is_ready(self) -> bool:
        return self.asynchronous.is_ready

    @property
    def is_responsive(self) -> bool:
        return self.asynchronous.is_responsive

    generate = _blocking(AsyncEngine.generate)
    chat = _blocking(AsyncEngine.chat)
    score = _blocking(AsyncEngine.score)
    abort = _blocking(AsyncEngine.abort)
    resume = _blocking(AsyncEngine.resume)
    release_memory_occupation = _blocking(AsyncEngine.release_memory_occupation)
    resume_memory_occupation = _blocking(AsyncEngine.resume_memory_occupation)
    flush_cache = _blocking(AsyncEngine.flush_cache)
    commit = _blocking(AsyncEngine.commit)
    abort_update = _blocking(AsyncEngine.abort_update)
    init_weights_update_group = _blocking(AsyncEngine.init_weights_update_group)
    destroy_weights_update_group = _blocking(AsyncEngine.destroy_weights_update_group)
    stage_from_group = _blocking(AsyncEngine.stage_from_group)
    update_weights_from_distributed = _blocking(AsyncEngine.update_weights_from_distributed)
    update_weights_from_disk = _blocking(AsyncEngine.update_weights_from_disk)
    set_weight_version = _blocking(AsyncEngine.set_weight_version)
    digest = _blocking(AsyncEngine.digest)
    save_model = _blocking(AsyncEngine.save_model)
    save_sharded_model = _blocking(AsyncEngine.save_sharded_model)
    save_remote_model = _blocking(AsyncEngine.save_remote_model)
    weights_checker = _blocking(AsyncEngine.weights_checker)
    give_rewards = _blocking(AsyncEngine.give_rewards)
    slow_down = _blocking(AsyncEngine.slow_down)
    freeze_gc = _blocking(AsyncEngine.freeze_gc)
    start_profile = _blocking(AsyncEngine.start_profile)
    stop_profile = _blocking(AsyncEngine.stop_profile)
    collective_rpc = _blocking(AsyncEngine.collective_rpc)
    metrics = _blocking(AsyncEngine.metrics)
    status = _blocking(AsyncEngine.status)

    def stream(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Generation, None, None]:
        """See `AsyncEngine.stream`."""
        opening, regret = self.asynchronous.undoable_stream(prompts, input_ids, sampling_params, options)
        group = self._wait(opening, regret)
        try:
            while pieces := self.asynchronous.runtime.wait_part(group.next_pieces, group.rest):
                yield from pieces
        finally:
            self.asynchronous.runtime.post(group.cancel)

    def pause(self, mode: PauseMode = "abort", *, timeout: float | None = None) -> None:
        """See `AsyncEngine.pause`."""
        pausing, regret = self.asynchronous.undoable_pause(mode, timeout)
        self._wait(pausing, regret)

    def begin_update(
        self,
        version: str | int,
        manifest: Manifest | None,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        partial: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateSession:
        """See `AsyncEngine.begin_update`."""
        terms = terms_of(version, mode, in_flight, timeout, partial)
        return self._wait(*self.asynchronous.undoable_begin(manifest, terms))

    def stage(self, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """See `AsyncEngine.stage`. The iterable is read in the calling thread."""
        run_here(self.asynchronous.stage_by(self._run, session, named_tensors))

    def update_weights_from_tensor(
        self,
        named_tensors: NamedTensors,
        version: str | int,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        partial: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateReport:
        """See `AsyncEngine.update_weights_from_tensor`. The iterable is read in the calling thread."""
        terms = terms_of(version, mode, in_flight, timeout, partial)
        return run_here(self.asynchronous.update_by(self._run, named_tensors, terms))

    def update_weights_from_bucket(
        self,
        named_tensors: NamedTensors,
        version: str | int | None = None,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateReport | None:
        """See `AsyncEngine.update_weights_from_bucket`. The iterable is read in the calling thread."""
        return run_here(self.asynchronous.add_by(self._run, named_tensors, version, mode, in_flight, timeout))

    def get_weights_by_name(self, name: str) -> torch.Tensor:
        """See `AsyncEngine.get_weights_by_name`."""
        return to_tensor(self._wait(self.asynchronous.read_weight(name)))

    def wait_ended(self) -> HeadraceError:
        """See `AsyncEngine.wait_ended`."""
        runtime = self.asynchronous.runtime
        return runtime.foreign or result_of(runtime.supervisor.ended)

    def shutdown(self) -> None:
        """See `AsyncEngine.shutdown`. On another rank than the first of `rank_group` it waits for that one to shut the
        engine down, or leaves it after `control_timeout`, which ends the engine."""
        self._engine.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    async def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._wait(coroutine)

    def _wait(self, coroutine: Coroutine[Any, Any, Result], regret: Regret[Result] | None = None) -> Result:
        return self.asynchronous.runtime.wait(coroutine, regret)
