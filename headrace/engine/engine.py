"""The engine for callers without an event loop: a facade over `AsyncEngine`, whose docstrings say what methods do.

Owns nothing. Every method may be called from any thread, also from one in which an event loop runs (which it blocks).
"""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from headrace.config import EngineConfig, ResolvedConfig
from headrace.engine.async_engine import DEFAULT_UPDATE_TIMEOUT, AsyncEngine, stop_server
from headrace.engine.fields import InputIds, Prompts, Sampling
from headrace.engine.launch import ExecutorKind
from headrace.engine.requests import GenerateOptions
from headrace.engine.runtime import Regret, result_of
from headrace.engine.tensors import NamedTensors, to_tensor
from headrace.engine.update import Manifest, UpdateSession, drive
from headrace.text import Tokenizer
from headrace.types.errors import HeadraceError, ShutdownError
from headrace.types.generation import Generation
from headrace.types.messages import CoreStatus
from headrace.types.weights import InFlight, PauseMode, UpdateMode, UpdateReport

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


class ServerHandle:
    """A running HTTP server of an engine."""

    def __init__(self, running: Any, engine: AsyncEngine) -> None:
        self._running = running
        self._engine = engine
        self.port: int = running.port
        self.url: str = running.url

    def stop(self, timeout: float | None = None) -> None:
        """Stop serving; the engine runs on. Requests have `timeout` seconds (None: the server's own) to finish."""
        with contextlib.suppress(ShutdownError):  # the engine has ended, and its servers with it
            self._engine.runtime.wait(self._running.stop(timeout))


class Engine:
    """A running engine with blocking methods. A context manager; `shutdown` is also done when it is dropped."""

    def __init__(
        self, model: str | Path, *, inprocess: bool = False, executor: ExecutorKind = "local", **settings: Any
    ) -> None:
        """See `AsyncEngine`."""
        self.asynchronous = AsyncEngine(model, inprocess=inprocess, executor=executor, **settings)
        self.asynchronous.wait_started()

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

    def generate(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """See `AsyncEngine.generate`."""
        return self._wait(self.asynchronous.generate(prompts, input_ids, sampling_params, **options))

    def score(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """See `AsyncEngine.score`."""
        return self._wait(self.asynchronous.score(prompts, input_ids, sampling_params, **options))

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

    def abort(
        self, request_id: str | None = None, *, prefix: bool = False, all: bool = False, message: str = "Aborted"
    ) -> int:
        """See `AsyncEngine.abort`."""
        return self._wait(self.asynchronous.abort(request_id, prefix=prefix, all=all, message=message))

    def pause(self, mode: PauseMode = "abort", *, timeout: float | None = None) -> None:
        """See `AsyncEngine.pause`."""
        pausing, regret = self.asynchronous.undoable_pause(mode, timeout)
        self._wait(pausing, regret)

    def resume(self) -> None:
        """See `AsyncEngine.resume`."""
        self._wait(self.asynchronous.resume())

    def flush_cache(self) -> int:
        """See `AsyncEngine.flush_cache`."""
        return self._wait(self.asynchronous.flush_cache())

    def begin_update(
        self,
        version: str | int,
        manifest: Manifest,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        partial: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateSession:
        """See `AsyncEngine.begin_update`."""
        begin = self.asynchronous.undoable_begin
        beginning, regret = begin(version, manifest, mode, in_flight, partial, timeout)
        return self._wait(beginning, regret)

    def stage(self, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """See `AsyncEngine.stage`. The iterable is read in the calling thread."""
        drive(self.asynchronous.stage_script(session, named_tensors), self._wait)

    def commit(self, session: UpdateSession) -> UpdateReport:
        """See `AsyncEngine.commit`."""
        return self._wait(self.asynchronous.commit(session))

    def abort_update(self, session: UpdateSession | None = None) -> None:
        """See `AsyncEngine.abort_update`."""
        self._wait(self.asynchronous.abort_update(session))

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
        script = self.asynchronous.update_script
        return drive(script(named_tensors, version, mode, in_flight, partial, timeout), self._wait)

    def update_weights_from_disk(
        self,
        path: str | Path,
        version: str | int,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
        root: str | Path | None = None,
    ) -> UpdateReport:
        """See `AsyncEngine.update_weights_from_disk`."""
        update = self.asynchronous.update_weights_from_disk
        return self._wait(update(path, version, mode=mode, in_flight=in_flight, timeout=timeout, root=root))

    def set_weight_version(self, version: str | int) -> None:
        """See `AsyncEngine.set_weight_version`."""
        self._wait(self.asynchronous.set_weight_version(version))

    def get_weights_by_name(self, name: str) -> torch.Tensor:
        """See `AsyncEngine.get_weights_by_name`."""
        return to_tensor(self._wait(self.asynchronous.read_weight(name)))

    def digest(self) -> dict[str, str]:
        """See `AsyncEngine.digest`."""
        return self._wait(self.asynchronous.digest())

    def weights_checker(self, action: str) -> dict[str, str]:
        """See `AsyncEngine.weights_checker`."""
        return self._wait(self.asynchronous.weights_checker(action))

    def metrics(self) -> dict[str, float]:
        """See `AsyncEngine.metrics`."""
        return self._wait(self.asynchronous.metrics())

    def status(self, timeout: float | None = None) -> CoreStatus:
        """See `AsyncEngine.status`."""
        return self._wait(self.asynchronous.status(timeout))

    def serve(self, port: int = 0, host: str = "127.0.0.1", **options: Any) -> ServerHandle:
        """Serve this engine over HTTP while it goes on being used here; port 0 takes a free one."""
        running = self._wait(self.asynchronous.serve(port, host, **options), stop_server)
        return ServerHandle(running, self.asynchronous)

    def wait_ended(self) -> HeadraceError:
        """See `AsyncEngine.wait_ended`."""
        runtime = self.asynchronous.runtime
        return runtime.foreign or result_of(runtime.supervisor.ended)

    def shutdown(self) -> None:
        """See `AsyncEngine.shutdown`."""
        self.asynchronous.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _wait(self, coroutine: Coroutine[Any, Any, Result], regret: Regret[Result] | None = None) -> Result:
        return self.asynchronous.runtime.wait(coroutine, regret)
