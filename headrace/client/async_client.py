"""A client with the surface of `AsyncEngine`: the same calls, values and errors, over HTTP.

Owns the calls; what carries them is a `Transport`. Every call has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import msgspec

from headrace.client import chat, groups
from headrace.client.answers import read, stream_parts
from headrace.client.asks import generate_body, message_body
from headrace.client.buckets import BucketUploads
from headrace.client.calls import GRACE_SECONDS, CallMaker, limit_of
from headrace.client.transport import HttpAnswer, HttpCall, LoopTransport, Transport, check_url
from headrace.client.uploads import Uploads
from headrace.engine.control import DEFAULT_UPDATE_TIMEOUT, seconds_of, tags_of, terms_of, terms_of_part, version_of
from headrace.engine.fields import InputIds, Prompts, Sampling, name_of
from headrace.engine.held_tensors import HeldTensors
from headrace.engine.requests import GenerateOptions
from headrace.engine.rewards import checked_rewards
from headrace.engine.saving import DEFAULT_SAVE_TIMEOUT, DEFAULT_SHARD_BYTES
from headrace.engine.tensors import NamedTensors, to_tensor
from headrace.engine.update_session import Manifest, UpdateSession, check_session, manifest_of
from headrace.telemetry import Rewards
from headrace.types.errors import DeadlineError, HeadraceError, RequestError, UnavailableError, UnreachableError
from headrace.types.generation import Generation
from headrace.types.http import (
    BEGIN_TOKEN_BYTES,
    PREFIX,
    TENSOR_HEADER,
    AbortAsk,
    BeginAsk,
    CommitAsk,
    SessionBegun,
)
from headrace.types.memory import MemoryTag, OnRelease, Restore
from headrace.types.messages import CoreStatus
from headrace.types.profile import Activity
from headrace.types.weights import InFlight, PauseMode, SaveReport, TensorInfo, UpdateMode, UpdateReport, WeightBytes

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 600.0

Result = TypeVar("Result")


class AsyncClient:
    """An engine at `url`, as `AsyncEngine` is one here. To be used on one event loop (`UnavailableError` on another),
    and closed (`ShutdownError` from then on); an async context manager does. `headrace serve`, `headrace.serve` and
    `Runtime` have such addresses.

    api_key, admin_key   the server's keys; calls that steer the engine use the second, which defaults to the first
    timeout              seconds that a call may take as a whole, `stream` between two pieces: `DeadlineError` names it
    shares_memory        stage tensors through shared memory where the server can read it, instead of sending bytes

    Errors are those of the engine. Beside them, `UnreachableError` (an `UnavailableError`, retryable): nobody answers,
    or the answer breaks off; a retry may repeat what was done. `ConfigError` (field "api_key" or "admin_key"): the
    server refuses the key. Proxies that the environment names are not used.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        *,
        shares_memory: bool = True,
        transport: Transport | None = None,
    ) -> None:
        """`transport`: what carries the calls; None: httpx, on the caller's loop."""
        self.url = check_url(url)
        self._calls = CallMaker(api_key, admin_key, timeout)
        self._transport = LoopTransport(self.url) if transport is None else transport
        self._uploads = Uploads(self._stage_part, shares_memory=shares_memory)
        self._buckets = BucketUploads(self._stage_part, self._uploads)

    async def generate(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """See `AsyncEngine.generate`."""
        body = generate_body(prompts, input_ids, sampling_params, options)
        return read((await self._generate("generate", body)).body, list[Generation])

    chat = chat.chat

    async def generate_native(self, body: bytes) -> bytes:
        """What `/generate`, in SGLang's dialect, answers to a body; both are JSON."""
        answer = await self._transport.send(self._calls.to("generate", "/generate", body, "application/json"))
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise RequestError("stream: there is only one answer here", field="stream")
        return bytes(answer.body)

    async def score(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """See `AsyncEngine.score`."""
        body = generate_body(prompts, input_ids, sampling_params, options, scores=True)
        return read((await self._generate("score", body)).body, list[Generation])

    async def stream(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Generation, None]:
        """See `AsyncEngine.stream`."""
        body = generate_body(prompts, input_ids, sampling_params, options, stream=True)
        call = self._calls.to("stream", f"{PREFIX}/generate", body, "application/json")
        async with contextlib.aclosing(stream_parts(self._transport.stream(call))) as parts:
            async for part in parts:
                for piece in part.pieces:
                    yield piece
                if part.error is not None:
                    raise part.error.to_exception()

    async def abort(
        self, request_id: str | None = None, *, prefix: bool = False, all: bool = False, message: str = "Aborted"
    ) -> int:
        """See `AsyncEngine.abort`."""
        arguments = {"request_id": request_id, "prefix": prefix, "all": all, "message": message}
        return await self._control("abort", arguments, int)

    async def pause(self, mode: PauseMode = "abort", *, timeout: float | None = None) -> None:
        """See `AsyncEngine.pause`."""
        seconds = seconds_of(timeout)
        await self._control("pause", {"mode": mode, "timeout": seconds}, type(None), limit_of(seconds))

    async def resume(self) -> None:
        """See `AsyncEngine.resume`."""
        await self._control("resume", {}, type(None))

    async def release_memory_occupation(
        self, tags: Sequence[MemoryTag] | None = None, *, in_flight: OnRelease = "abort", timeout: float | None = None
    ) -> None:
        """See `AsyncEngine.release_memory_occupation`."""
        given, seconds = tags_of(tags), seconds_of(timeout)
        arguments = {"tags": given, "in_flight": in_flight, "timeout": seconds}
        await self._control("release_memory_occupation", arguments, type(None), limit_of(seconds))

    async def resume_memory_occupation(
        self, tags: Sequence[MemoryTag] | None = None, *, restore: Restore = "auto", timeout: float | None = None
    ) -> None:
        """See `AsyncEngine.resume_memory_occupation`."""
        given, seconds = tags_of(tags), seconds_of(timeout)
        arguments = {"tags": given, "restore": restore, "timeout": seconds}
        await self._control("resume_memory_occupation", arguments, type(None), limit_of(seconds))

    async def flush_cache(self) -> int:
        """See `AsyncEngine.flush_cache`."""
        return await self._control("flush_cache", {}, int)

    async def begin_update(
        self,
        version: str | int,
        manifest: Manifest | None,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        partial: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateSession:
        """See `AsyncEngine.begin_update`. A client that goes away leaves its session to its deadline; an ask that is
        cancelled, or has no answer, leaves none if the server can be told within GRACE_SECONDS."""
        terms = terms_of(version, mode, in_flight, timeout, partial)
        entries = None if manifest is None else manifest_of(manifest)
        ask = BeginAsk(
            version=terms.version,
            manifest=entries,
            mode=terms.mode,
            in_flight=terms.in_flight,
            partial=terms.partial,
            timeout=terms.timeout_s,
            token=secrets.token_bytes(BEGIN_TOKEN_BYTES),
        )
        try:
            answer = await self._transport.send(self._calls.admin("begin_update", message_body(ask)))
            begun = read(answer.body, SessionBegun)
        except GeneratorExit:  # dropped by whoever ran it: nothing can be awaited any more
            raise
        except BaseException as error:  # whatever it is: a session of which nobody heard is over before the caller is
            if not isinstance(error, HeadraceError) or isinstance(error, (DeadlineError, UnreachableError)):
                await self._transport.outlast(self._abort_quietly(AbortAsk(token=ask.token)))
            raise
        self._uploads.open(begun, answer.own_end)
        given = begun.session_id, terms.version, begun.mode, entries or (), terms.timeout_s, terms.partial
        return UpdateSession(*given, is_open=entries is None, dtype=begun.dtype, num_ranks=begun.num_ranks)

    async def stage(self, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """See `AsyncEngine.stage`. Of a session that this client has begun."""
        check_session(session)
        await self._uploads.stage(session, named_tensors)

    async def group_address(self, session: UpdateSession) -> str:
        """This host's address for a process group with the engine of a session that this client has begun; "" where
        there is a better road, memory that both read, or where somebody stands between, so that it is not known."""
        check_session(session)
        return await self._uploads.group_address(session)

    async def commit(self, session: UpdateSession) -> UpdateReport:
        """See `AsyncEngine.commit`."""
        check_session(session)
        return await self._control("commit", CommitAsk(session.session_id), UpdateReport)

    async def abort_update(self, session: UpdateSession | None = None) -> None:
        """See `AsyncEngine.abort_update`."""
        if session is not None:
            check_session(session)
        await self._control("abort_update", AbortAsk(None if session is None else session.session_id), type(None))

    async def update_weights_from_tensor(
        self,
        named_tensors: NamedTensors,
        version: str | int,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        partial: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateReport:
        """See `AsyncEngine.update_weights_from_tensor`."""
        held = HeldTensors(named_tensors)
        session = await self.begin_update(
            version, held.manifest, mode=mode, in_flight=in_flight, partial=partial, timeout=timeout
        )
        try:
            await self.stage(session, held)
            return await self.commit(session)
        except GeneratorExit:  # dropped by whoever ran it: nothing can be awaited any more
            raise
        except BaseException:  # whatever it is, the session is over before the caller hears of it
            await self._transport.outlast(self._abort_quietly(AbortAsk(session.session_id)))
            raise

    async def update_weights_from_bucket(
        self,
        named_tensors: NamedTensors,
        version: str | int | None = None,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateReport | None:
        """See `AsyncEngine.update_weights_from_bucket`. All calls of one update are one client's."""
        try:
            return await self._buckets.add(HeldTensors(named_tensors), terms_of_part(version, mode, in_flight, timeout))
        except GeneratorExit:  # dropped by whoever ran it: nothing can be awaited any more
            raise
        except BaseException:  # whatever it is, the update is over before the caller hears of it
            undoing = self._buckets.forget()
            if undoing is not None:
                await self._transport.outlast(self._abort_quietly(undoing))
            raise

    async def update_weights_from_disk(
        self,
        path: str | Path,
        version: str | int,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
        verify: bool = False,
    ) -> UpdateReport:
        """See `AsyncEngine.update_weights_from_disk`. The folder is the server's: below its model's, or one of its
        `weight_roots`."""
        terms = terms_of(version, mode, in_flight, timeout)
        arguments = {
            **{"path": os.fspath(path), "version": terms.version, "mode": terms.mode},
            **{"in_flight": terms.in_flight, "timeout": terms.timeout_s, "verify": verify},
        }
        return await self._control("update_weights_from_disk", arguments, UpdateReport, limit_of(terms.timeout_s))

    init_weights_update_group = groups.init_weights_update_group
    destroy_weights_update_group = groups.destroy_weights_update_group
    stage_from_group = groups.stage_from_group
    update_weights_from_distributed = groups.update_weights_from_distributed

    async def set_weight_version(self, version: str | int) -> None:
        """See `AsyncEngine.set_weight_version`."""
        await self._control("set_weight_version", {"version": version_of(version)}, type(None))

    async def get_weights_by_name(self, name: str) -> torch.Tensor:
        """See `AsyncEngine.get_weights_by_name`."""
        body = message_body({"name": name_of(name, "name")})
        answer = await self._transport.send(self._calls.admin("get_weights_by_name", body))
        info = msgspec.convert(json.loads(answer.headers[TENSOR_HEADER]), TensorInfo)
        return to_tensor(WeightBytes(info, memoryview(answer.body)))

    async def digest(self) -> dict[str, str]:
        """See `AsyncEngine.digest`."""
        return await self._control("digest", {}, dict[str, str])

    async def save_model(
        self,
        path: str | Path,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        timeout: float = DEFAULT_SAVE_TIMEOUT,
    ) -> SaveReport:
        """See `AsyncEngine.save_model`. The folder is the server's: below one of its `save_roots`."""
        arguments = {"path": os.fspath(path), "max_shard_bytes": max_shard_bytes, "timeout": timeout}
        return await self._control("save_model", arguments, SaveReport, limit_of(seconds_of(timeout)))

    async def save_sharded_model(self, path: str | Path, *, timeout: float = DEFAULT_SAVE_TIMEOUT) -> SaveReport:
        """See `AsyncEngine.save_sharded_model`. The folder is the server's: below one of its `save_roots`."""
        arguments = {"path": os.fspath(path), "timeout": timeout}
        return await self._control("save_sharded_model", arguments, SaveReport, limit_of(seconds_of(timeout)))

    async def save_remote_model(
        self, url: str, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, timeout: float = DEFAULT_SAVE_TIMEOUT
    ) -> SaveReport:
        """See `AsyncEngine.save_remote_model`. The URL is as the server sees it: below one of its `save_roots`."""
        arguments = {"url": url, "max_shard_bytes": max_shard_bytes, "timeout": timeout}
        return await self._control("save_remote_model", arguments, SaveReport, limit_of(seconds_of(timeout)))

    async def weights_checker(self, action: str) -> dict[str, str]:
        """See `AsyncEngine.weights_checker`."""
        return await self._control("weights_checker", {"action": action}, dict[str, str])

    async def give_rewards(self, rewards: Rewards) -> int:
        """See `AsyncEngine.give_rewards`."""
        call = self._calls.data("give_rewards", {"rewards": checked_rewards(rewards)})
        return read((await self._transport.send(call)).body, int)

    async def slow_down(self, forward_sleep_time: float | None = None) -> None:
        """See `AsyncEngine.slow_down`."""
        await self._control("slow_down", {"forward_sleep_time": forward_sleep_time}, type(None))

    async def freeze_gc(self) -> None:
        """See `AsyncEngine.freeze_gc`."""
        await self._control("freeze_gc", {}, type(None))

    async def start_profile(
        self,
        output_dir: str | None = None,
        num_steps: int | None = None,
        activities: Sequence[Activity] | None = None,
        *,
        with_stack: bool = False,
        record_shapes: bool = False,
        profile_id: str | None = None,
    ) -> str:
        """See `AsyncEngine.start_profile`. The folder is the server's, below one of its `save_roots`."""
        arguments = {
            **{"output_dir": output_dir, "num_steps": num_steps, "activities": activities, "with_stack": with_stack},
            **{"record_shapes": record_shapes, "profile_id": profile_id},
        }
        return await self._control("start_profile", arguments, str)

    async def stop_profile(self) -> str:
        """See `AsyncEngine.stop_profile`."""
        return await self._control("stop_profile", {}, str)

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """See `AsyncEngine.collective_rpc`."""
        arguments = {"method": method, "timeout": timeout, "args": args, "kwargs": kwargs}
        return await self._control("collective_rpc", arguments, list[Any], limit_of(seconds_of(timeout)))

    async def metrics(self) -> dict[str, float]:
        """See `AsyncEngine.metrics`."""
        return read((await self._transport.send(self._calls.data("metrics", {}))).body, dict[str, float])

    async def status(self, timeout: float | None = None) -> CoreStatus:
        """See `AsyncEngine.status`."""
        seconds = seconds_of(timeout)
        call = self._calls.data("status", {"timeout": seconds}, limit_of(seconds))
        return read((await self._transport.send(call)).body, CoreStatus)

    async def health(self) -> bool:
        """True while the server's core lives, or the next one is being started. `UnreachableError` if nobody answers,
        or the engine is still loading."""
        call = HttpCall(name="health", path="/health", key=None, timeout=self._calls.timeout, method="GET")
        try:
            await self._transport.send(call)
        except UnreachableError:
            raise
        except UnavailableError:
            return False
        return True

    async def close(self) -> None:
        """Close the connections and give shared memory back. The server and its engine run on."""
        self._uploads.close()
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _abort_quietly(self, ask: AbortAsk) -> None:
        try:
            await self._control("abort_update", ask, type(None), GRACE_SECONDS)
        except HeadraceError as error:
            logger.debug("the session was over: %s", error)

    async def _stage_part(self, name: str, body: bytes, media_type: str) -> bytearray:
        call = self._calls.admin(name, body, media_type=media_type)
        return (await self._transport.send(call)).body

    async def _generate(self, name: str, body: bytes) -> HttpAnswer:
        return await self._transport.send(self._calls.to(name, f"{PREFIX}/generate", body, "application/json"))

    async def _control(self, name: str, ask: Any, kind: type[Result], limit: float | None = None) -> Result:
        answer = await self._transport.send(self._calls.admin(name, message_body(ask), limit))
        return read(answer.body, kind)
