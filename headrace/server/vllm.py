"""vLLM's routes for trainers: pause, sleep, and weights that are broadcast. Owns their replies, and what was agreed on
with the trainer that sends weights.

An update is the implicit one of the engine (`headrace.engine.joined_update`): `/start_weight_update` begins it anew,
`/finish_weight_update` commits it, and calls without these two around them commit it with the last tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.engine.calls import outlast
from headrace.engine.control import version_of
from headrace.engine.groups import join_group
from headrace.server.admin import PAUSE_MODES
from headrace.server.errors import FieldNames
from headrace.server.folders import Folders
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.update_body import UPDATE_FIELDS
from headrace.server.vllm_types import (
    DEFAULT_PACKED_BYTES,
    AbortRequestsAsk,
    FinishAsk,
    InitAsk,
    PauseAsk,
    ResetAsk,
    SleepAsk,
    StartAsk,
    UpdateAsk,
    WakeAsk,
    check_unsupported,
    read_ask,
)
from headrace.server.wire import json_reply
from headrace.types.errors import RequestError, UpdateConflictError, WeightUpdateError
from headrace.types.memory import OnRelease
from headrace.types.weights import TRANSFER_GROUP, UpdateReport
from headrace.weights.unique_id import decode_unique_id

_INFO_FIELDS = {
    **UPDATE_FIELDS,
    **{"names": "update_info.names", "dtypes": "update_info.dtype_names", "shapes": "update_info.shapes"},
    "load_format": "update_info.packed_buffer_size_bytes",
}
_INIT_FIELDS = {
    **{name: f"init_info.{name}" for name in ("master_address", "master_port", "rank_offset", "world_size", "backend")},
    "timeout": "timeout_s",
}
_SLEEP_MODES: dict[str, OnRelease] = {"abort": "abort", "keep": "recompute", "wait": "recompute"}


class VllmFace:
    """The routes of vLLM that trainers call. Without an admin key they take the data key."""

    def __init__(self, state: ServerState, folders: Folders) -> None:
        self._state = state
        self._engine = state.engine
        self._folders = folders
        self._packing: int | None = None  # of the trainer that has joined; None: each tensor by itself
        self._has_joined = False

    def endpoints(self) -> list[Endpoint]:
        changing = (
            ("/pause", self.pause),
            ("/resume", self.resume),
            ("/abort_requests", self.abort_requests),
            ("/sleep", self.sleep),
            ("/wake_up", self.wake_up),
            ("/reset_prefix_cache", self.reset_prefix_cache),
            ("/init_weight_transfer_engine", self.init_weight_transfer),
            ("/start_weight_update", self.start_update),
            ("/start_draft_weight_update", self.start_draft_update),
            ("/update_weights", self.update_weights),
            ("/finish_weight_update", self.finish_update),
        )
        looking = (
            ("/is_paused", self.is_paused),
            ("/is_sleeping", self.is_sleeping),
            ("/weight_info", self.weight_info),
            ("/get_world_size", self.get_world_size),
        )
        return [
            *(Endpoint(path, handler, ("POST",), access="admin") for path, handler in changing),
            *(Endpoint(path, handler) for path, handler in looking),
        ]

    async def pause(self, request: Request) -> Response:
        ask = await read_ask(request, PauseAsk)
        mode = "wait" if ask.wait_for_inflight_requests else ask.mode
        if mode not in PAUSE_MODES:
            raise RequestError(f"mode must be one of {', '.join(PAUSE_MODES)}", field="mode")
        with FieldNames({"timeout": "timeout_s"}):
            await self._state.run(request, *self._engine.undoable_pause(PAUSE_MODES[mode], ask.timeout_s))
        return json_reply({"status": "paused"})

    async def resume(self, request: Request) -> Response:
        await read_ask(request, dict[str, Any])
        await self._state.run(request, self._engine.resume())
        return json_reply({"status": "resumed"})

    async def is_paused(self, request: Request) -> Response:
        return json_reply({"is_paused": bool((await self._engine.status()).paused)})

    async def abort_requests(self, request: Request) -> Response:
        """POST /abort_requests: those of these names, of which there may be none, or without a list all."""
        ask = await read_ask(request, AbortRequestsAsk)
        if ask.request_ids is None:
            num_aborted = await self._engine.abort(all=True)
        else:
            num_aborted = sum([await self._engine.abort(name) for name in ask.request_ids])
        return json_reply({"status": "aborted", "aborted": num_aborted})

    async def sleep(self, request: Request) -> Response:
        """POST /sleep: memory is given back, all of it or that of `tags`; an empty reply when the system has it."""
        ask = await read_ask(request, SleepAsk)
        check_unsupported(ask.level not in (1, 2), "level must be 1 or 2", "level")
        check_unsupported(ask.mode not in _SLEEP_MODES, f"mode must be one of {', '.join(_SLEEP_MODES)}", "mode")
        loses = ask.level == 1 and not self._engine.resolved.engine.keep_weights_copy
        if loses and (not ask.tags or "weights" in ask.tags):
            message = (
                "level 1 needs a copy of the weights on the host (keep_weights_copy); at level 2 an update follows"
            )
            raise RequestError(message, field="level")
        tags: Any = ask.tags
        how: Any = {"in_flight": _SLEEP_MODES[ask.mode], "timeout": ask.timeout_s}
        release = functools.partial(self._engine.release_memory_occupation, tags, **how)
        with FieldNames({"timeout": "timeout_s"}):
            await self._state.run(request, self._drained(release, ask) if ask.mode == "wait" else release())
        return Response()

    async def _drained(self, release: Callable[[], Coroutine[Any, Any, None]], ask: SleepAsk) -> None:
        """A release behind a pause that lets requests end; when it is over there is no pause of it."""
        pausing, undo = self._engine.undoable_pause("drain", ask.timeout_s)
        pause = await pausing
        try:
            await release()
        finally:
            await outlast(undo(pause))

    async def wake_up(self, request: Request) -> Response:
        """POST /wake_up: an empty reply when the memory of `tags`, or all, is there."""
        ask = await read_ask(request, WakeAsk)
        tags: Any = [*ask.tags, "cuda_graph"] if ask.tags else ask.tags  # of which its clients know nothing
        with FieldNames({"timeout": "timeout_s"}):
            await self._state.run(request, self._engine.resume_memory_occupation(tags, timeout=ask.timeout_s))
        return Response()

    async def is_sleeping(self, request: Request) -> Response:
        released = set((await self._engine.status()).released)
        return json_reply({"is_sleeping": bool(released & {"weights", "kv_cache"})})

    async def reset_prefix_cache(self, request: Request) -> Response:
        """POST /reset_prefix_cache: requests that run give up what is computed of them only if asked to."""
        ask = await read_ask(request, ResetAsk)
        if ask.reset_running_requests:
            pausing, undo = self._engine.undoable_pause("recompute", None)
            await undo(await self._state.run(request, pausing, undo))
        await self._state.run(request, self._engine.flush_cache())
        return json_reply({"success": True})

    async def weight_info(self, request: Request) -> Response:
        return json_reply({"weight_version": self._engine.version})

    async def get_world_size(self, request: Request) -> Response:
        return json_reply({"world_size": self._engine.resolved.num_ranks})

    async def init_weight_transfer(self, request: Request) -> Response:
        """POST /init_weight_transfer_engine: answers when all ranks are there; the trainer makes the group meanwhile. A
        trainer that begins anew takes the place of the one before."""
        ask = await read_ask(request, InitAsk)
        info = ask.init_info
        backend = info.backend or ("gloo" if self._engine.resolved.device == "cpu" else "nccl")
        unique_id = b""
        if info.nccl_unique_id_b64 is not None:
            unique_id = decode_unique_id(info.nccl_unique_id_b64, "init_info.nccl_unique_id_b64")
            if backend != "nccl":
                message = f"an id is for backend 'nccl', not {backend!r}: leave it out, and give a master_address"
                raise WeightUpdateError(message, field="init_info.nccl_unique_id_b64")
        if info.packed_buffer_size_bytes < 0:
            raise RequestError("a buffer holds at least 0 bytes", field="init_info.packed_buffer_size_bytes")
        self._has_joined = False
        with contextlib.suppress(WeightUpdateError):  # there is none
            await self._engine.destroy_weights_update_group(TRANSFER_GROUP)
        place = info.master_address, info.master_port, info.rank_offset, info.world_size
        with FieldNames(_INIT_FIELDS):
            joining = join_group(
                self._engine.runtime, *place, TRANSFER_GROUP, backend, ask.timeout_s, "vllm", unique_id
            )
            await self._state.run(request, joining)
        self._packing = info.packed_buffer_size_bytes if info.packed else None
        self._has_joined = True
        return json_reply({"message": "Weight transfer initialized"})

    async def start_update(self, request: Request) -> Response:
        """POST /start_weight_update: what is open ends, and the next tensors begin an update."""
        ask = await read_ask(request, StartAsk)
        message = "tensors are taken by their names in a checkpoint only"
        check_unsupported(not ask.is_checkpoint_format, message, "is_checkpoint_format")
        await self._state.run(request, self._engine.runtime.joined.begin())
        return json_reply({"message": "Weight update started"})

    async def start_draft_update(self, request: Request) -> Response:
        raise RequestError("this engine has no draft model", field="selector")

    async def update_weights(self, request: Request) -> Response:
        """POST /update_weights: tensors that are broadcast meanwhile, or all of a folder."""
        try:
            ask = await read_ask(request, UpdateAsk)
            self._check_update(ask)
        except BaseException:  # whatever it is, as in `JoinedUpdate.add`
            await self._engine.runtime.joined.end()
            raise
        with FieldNames(_INFO_FIELDS):
            report = await self._state.run(request, self._updating(ask, ask.update_info))
        return json_reply({"message": "Weights updated", **({} if report is None else {"report": report})})

    def _check_update(self, ask: UpdateAsk) -> None:
        """What no announced broadcast follows."""
        if ask.update_info is None:
            check_unsupported(ask.weight_dir is None, "update_info is missing (or weight_dir, a folder)", "update_info")
            return
        for name in ("ipc_handles", "ipc_handles_pickled"):
            message = "memory of a device is taken by POST /update_weights_from_tensor"
            check_unsupported(name in ask.update_info, message, f"update_info.{name}")
        if not self._has_joined:
            message = "no trainer has joined: POST /init_weight_transfer_engine first"
            raise UpdateConflictError(message, field="init_info")

    def _packing_of(self, info: dict[str, Any]) -> Any:
        """How the tensors of an update come, if it says it, else as the trainer that joined did."""
        if not info.get("packed", self._packing is not None):
            return None
        return info.get("packed_buffer_size_bytes", self._packing or DEFAULT_PACKED_BYTES)

    async def _updating(self, ask: UpdateAsk, info: dict[str, Any] | None) -> UpdateReport | None:
        if info is None:
            folder, root = self._folders.allowed(str(ask.weight_dir), "weight_dir")
            label = self._state.last_version if ask.weight_version is None else ask.weight_version
            terms: Any = {"mode": ask.mode, "in_flight": ask.in_flight, "timeout": ask.timeout_s}
            return await self._engine.update_weights_from_disk(folder, label, root=root, **terms)
        return await self._engine.update_weights_from_distributed(
            info.get("names", ()),
            info.get("dtype_names", ()),
            info.get("shapes", ()),
            TRANSFER_GROUP,
            self._packing_of(info),
            ask.weight_version,
            mode=ask.mode,
            in_flight=ask.in_flight,
            timeout=ask.timeout_s,
        )

    async def finish_update(self, request: Request) -> Response:
        """POST /finish_weight_update: the update has to be complete, and is live then; else it is over. A second one
        changes nothing, and has the same answer."""
        ask = await read_ask(request, FinishAsk)
        with FieldNames(UPDATE_FIELDS):
            label = "" if ask.weight_version is None else version_of(ask.weight_version)
            report = await self._state.run(request, self._engine.runtime.joined.finish(label))
        return json_reply({"message": "Weight update finished", "report": report})
