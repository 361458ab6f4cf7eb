"""Looking into a server that runs: slowed down, traced, asked by name, SGLang's dialect. Owns these bodies."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.server.coerce import read_control
from headrace.server.folders import Folders
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import json_reply
from headrace.types.errors import RequestError


class SlowBody(msgspec.Struct):
    forward_sleep_time: float | None = None


class ProfileBody(msgspec.Struct):
    """What else SGLang's have is refused by name if it asks for something."""

    output_dir: str | None = None
    num_steps: int | None = None
    activities: list[Any] | None = None
    with_stack: bool = False
    record_shapes: bool = False
    profile_id: str | None = None
    profile_prefix: str | None = None
    start_step: int | None = None
    profile_by_stage: bool = False
    merge_profiles: bool = False
    profile_stages: list[Any] | None = None


class RpcBody(msgspec.Struct):
    """As vLLM spells it too."""

    method: Any
    args: Any = ()
    kwargs: Any = None
    timeout: Any = None


_REFUSED = ("start_step", "profile_by_stage", "merge_profiles", "profile_stages")


class ProbeFace:
    """These routes change the engine: without an admin key they take the data key. None of them needs a body, but for
    the name of a method."""

    def __init__(self, state: ServerState, folders: Folders) -> None:
        self._state = state
        self._engine = state.engine
        self._folders = folders

    def endpoints(self) -> list[Endpoint]:
        table = (
            ("/slow_down", self.slow_down),
            ("/freeze_gc", self.freeze_gc),
            ("/start_profile", self.start_profile),
            ("/stop_profile", self.stop_profile),
            ("/collective_rpc", self.collective_rpc),
        )
        return [Endpoint(path, handler, ("POST",), access="admin") for path, handler in table]

    async def slow_down(self, request: Request) -> Response:
        """POST /slow_down: null, the dialect's whole reply."""
        body = await read_control(request, SlowBody, {})
        await self._state.run(request, self._engine.slow_down(body.forward_sleep_time))
        return json_reply(None)

    async def freeze_gc(self, request: Request) -> Response:
        """POST /freeze_gc: an empty reply."""
        await read_control(request, dict[str, Any], {})
        await self._state.run(request, self._engine.freeze_gc())
        return Response()

    async def start_profile(self, request: Request) -> Response:
        """POST /start_profile: the reply names the file that the trace will be in, on the server's machine."""
        body = await read_control(request, ProfileBody, {})
        for name in _REFUSED:
            if getattr(body, name):
                raise RequestError(f"{name} is not supported by this engine", field=name)
        names = [name for name in (body.profile_prefix, body.profile_id) if name]
        folder = None if body.output_dir is None else str(self._folders.to_save(body.output_dir, "output_dir")[0])
        starting = self._engine.start_profile(
            folder,
            body.num_steps,
            body.activities,
            with_stack=body.with_stack,
            record_shapes=body.record_shapes,
            profile_id="-".join(names) or None,
        )
        file = await self._state.run(request, starting)
        return json_reply({"success": True, "message": "Start profiling.", "file": file})

    async def stop_profile(self, request: Request) -> Response:
        """POST /stop_profile: answers when the file is complete."""
        await read_control(request, dict[str, Any], {})
        file = await self._state.run(request, self._engine.stop_profile())
        return json_reply({"success": True, "message": "Stop profiling.", "file": file})

    async def collective_rpc(self, request: Request) -> Response:
        """POST /collective_rpc: what the method comes to, once for each rank."""
        body = await read_control(request, RpcBody)
        calling = self._engine.collective_rpc(body.method, body.timeout, body.args, body.kwargs)
        return json_reply({"results": await self._state.run(request, calling)})
