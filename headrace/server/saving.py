"""Saves over HTTP, as `Engine` has them, to folders and stores below the save roots of a server. Owns their bodies."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.engine.saving import DEFAULT_SAVE_TIMEOUT, DEFAULT_SHARD_BYTES
from headrace.server.folders import Folders
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.surface import MAX_CALL_BYTES, packed_reply, read_ask
from headrace.types.http import PREFIX
from headrace.types.weights import SaveReport


class ShardedAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`Engine.save_sharded_model`; the folder is one of the server's."""

    path: str
    timeout: float = DEFAULT_SAVE_TIMEOUT


class FolderAsk(ShardedAsk, frozen=True, kw_only=True):
    """`Engine.save_model`."""

    max_shard_bytes: int = DEFAULT_SHARD_BYTES


class RemoteAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`Engine.save_remote_model`."""

    url: str
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    timeout: float = DEFAULT_SAVE_TIMEOUT


class SaveFace:
    """The routes of saves."""

    def __init__(self, state: ServerState, folders: Folders) -> None:
        self._state = state
        self._engine = state.engine
        self._folders = folders

    def endpoints(self) -> list[Endpoint]:
        handlers = (self.save_model, self.save_sharded_model, self.save_remote_model)
        return [Endpoint(f"{PREFIX}/{each.__name__}", each, ("POST",), access="admin") for each in handlers]

    async def save_model(self, request: Request) -> Response:
        ask = await read_ask(request, FolderAsk, MAX_CALL_BYTES)
        folder, root = self._folders.to_save(ask.path)
        most, seconds = ask.max_shard_bytes, ask.timeout
        return await self._do(
            request, self._engine.save_model(folder, max_shard_bytes=most, timeout=seconds, root=root)
        )

    async def save_sharded_model(self, request: Request) -> Response:
        ask = await read_ask(request, ShardedAsk, MAX_CALL_BYTES)
        folder, root = self._folders.to_save(ask.path)
        return await self._do(request, self._engine.save_sharded_model(folder, timeout=ask.timeout, root=root))

    async def save_remote_model(self, request: Request) -> Response:
        ask = await read_ask(request, RemoteAsk, MAX_CALL_BYTES)
        self._folders.check_url(ask.url)
        most, seconds = ask.max_shard_bytes, ask.timeout
        return await self._do(request, self._engine.save_remote_model(ask.url, max_shard_bytes=most, timeout=seconds))

    async def _do(self, request: Request, save: Coroutine[Any, Any, SaveReport]) -> Response:
        return packed_reply(await self._state.run(request, save))
