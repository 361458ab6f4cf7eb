"""Weights over a trainer's group, SGLang's dialect: init, update, destroy. Owns their bodies and replies.

What is wrong with an update's body is left to the engine to say: it has to know that the call announced something.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.engine import DEFAULT_UPDATE_TIMEOUT
from headrace.engine.groups import DEFAULT_JOIN_TIMEOUT
from headrace.server.coerce import read_control
from headrace.server.errors import FieldNames, refusal
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.update_body import UPDATE_FIELDS
from headrace.server.wire import json_reply
from headrace.types.errors import HeadraceError
from headrace.types.weights import DEFAULT_GROUP, UpdateReport


class InitGroupBody(msgspec.Struct):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = DEFAULT_GROUP
    backend: Any = "nccl"
    timeout_s: float = DEFAULT_JOIN_TIMEOUT


class DestroyGroupBody(msgspec.Struct):
    group_name: str = DEFAULT_GROUP


class GroupUpdateBody(msgspec.Struct):
    names: Any = None
    dtypes: Any = None
    shapes: Any = None
    group_name: Any = DEFAULT_GROUP
    load_format: Any = None
    weight_version: Any = None
    abort_all_requests: Any = False
    mode: Any = "auto"
    in_flight: Any = None
    timeout_s: Any = DEFAULT_UPDATE_TIMEOUT


class GroupFace:
    """The routes of weight groups. Without an admin key they take the data key."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._engine = state.engine

    def endpoints(self) -> list[Endpoint]:
        table = (
            ("/init_weights_update_group", self.init),
            ("/update_weights_from_distributed", self.update),
            ("/destroy_weights_update_group", self.destroy),
        )
        return [Endpoint(path, handler, ("POST",), access="admin") for path, handler in table]

    async def init(self, request: Request) -> Response:
        """POST /init_weights_update_group: answers when all ranks are there; the trainer makes the group meanwhile."""
        body = await read_control(request, InitGroupBody)
        joining = self._engine.init_weights_update_group(
            body.master_address,
            body.master_port,
            body.rank_offset,
            body.world_size,
            body.group_name,
            body.backend,
            body.timeout_s,
        )
        return await self._answer(request, joining, f"Weight group {body.group_name} is joined.")

    async def update(self, request: Request) -> Response:
        """POST /update_weights_from_distributed: a bucket of an update, broadcast meanwhile. `flush_cache` has nothing
        to do."""
        try:
            body = await read_control(request, GroupUpdateBody)
        except BaseException:  # whatever it is, as in `JoinedUpdate.add`
            await self._engine.runtime.joined.end()
            raise
        updating = self._engine.update_weights_from_distributed(
            body.names,
            body.dtypes,
            body.shapes,
            body.group_name,
            body.load_format,
            body.weight_version,
            mode=body.mode,
            in_flight=body.in_flight or ("abort" if body.abort_all_requests else "drain"),
            timeout=body.timeout_s,
        )
        return await self._answer(request, updating, "The tensors are received.")

    async def destroy(self, request: Request) -> Response:
        """POST /destroy_weights_update_group"""
        body = await read_control(request, DestroyGroupBody)
        leaving = self._engine.destroy_weights_update_group(body.group_name)
        return await self._answer(request, leaving, f"Weight group {body.group_name} is destroyed.")

    async def _answer(self, request: Request, call: Coroutine[Any, Any, UpdateReport | None], message: str) -> Response:
        """What the call comes to, in the dialect. One whose client goes away is given up."""
        try:
            with FieldNames(UPDATE_FIELDS):
                report = await self._state.run(request, call)
        except HeadraceError as error:
            return refusal(error)
        reply = {"success": True, "message": message}
        return json_reply(reply if report is None else {**reply, "report": report})
