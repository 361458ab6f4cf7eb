"""Bodies and queries of vLLM's RL routes. Owns their names and defaults, and how a route is read whose arguments may be
in either, or nowhere."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from headrace.engine import DEFAULT_UPDATE_TIMEOUT
from headrace.engine.groups import DEFAULT_JOIN_TIMEOUT
from headrace.server.coerce import read_control
from headrace.types.errors import RequestError
from headrace.types.weights import InFlight, UpdateMode

Ask = TypeVar("Ask")
DEFAULT_PACKED_BYTES = 1 << 30
_LISTS = ("tags",)


class PauseAsk(msgspec.Struct):
    """`clear_cache` has nothing to do: entries of the prefix cache belong to the weights that made them."""

    mode: str = "abort"
    wait_for_inflight_requests: bool = False
    clear_cache: bool = True
    timeout_s: float | None = None


class SleepAsk(msgspec.Struct):
    """Level 1 keeps the weights on the host, level 2 does not. `timeout_s` is ours."""

    level: int = 1
    mode: str = "abort"
    tags: list[str] | None = None
    timeout_s: float | None = None


class WakeAsk(msgspec.Struct):
    tags: list[str] | None = None
    timeout_s: float | None = None


class ResetAsk(msgspec.Struct):
    reset_running_requests: bool = False
    reset_external: bool = False


class AbortRequestsAsk(msgspec.Struct):
    request_ids: list[str] | None = None


class InitInfo(msgspec.Struct):
    """Where a trainer, rank 0, is found. `backend` is ours: the servers of vLLM are started with one. `packed` and the
    size may come with an update instead; how many buffers a sender has does not matter to a receiver."""

    master_address: str = ""
    master_port: int = 0
    rank_offset: int = 1
    world_size: int = 2
    packed: bool = False
    packed_buffer_size_bytes: int = DEFAULT_PACKED_BYTES
    packed_num_buffers: int = 2
    nccl_unique_id_b64: str | None = None
    backend: str | None = None


class InitAsk(msgspec.Struct):
    init_info: InitInfo
    timeout_s: float = DEFAULT_JOIN_TIMEOUT


class StartAsk(msgspec.Struct):
    is_checkpoint_format: bool = True


class FinishAsk(msgspec.Struct):
    weight_version: str | int | None = None


class UpdateAsk(msgspec.Struct, kw_only=True):
    """Tensors that are broadcast, or, with the key of prime-rl, a folder. What is wrong with `update_info` is left to
    the engine to say: it has to know that the call announced something. The rest is ours."""

    update_info: dict[str, Any] | None = None
    weight_dir: str | None = None
    weight_version: str | int | None = None
    mode: UpdateMode = "auto"
    in_flight: InFlight = "keep"
    timeout_s: float = DEFAULT_UPDATE_TIMEOUT


async def read_ask(request: Request, kind: type[Ask]) -> Ask:
    """The query with the body, where there is one, before it. Raises `RequestError` naming the field."""
    query = request.query_params
    given: dict[str, Any] = {name: query.getlist(name) if name in _LISTS else _plain(query[name]) for name in query}
    return await read_control(request, kind, given)


def _plain(text: str) -> str:
    """What Python writes for a flag, as JSON does."""
    return text.lower() if text in ("True", "False") else text


def check_unsupported(is_asked: bool, message: str, field: str) -> None:
    """Refuse what only the engines of others have."""
    if is_asked:
        raise RequestError(message, field=field)
