"""Weights that a trainer broadcasts over a `torch.distributed` group, as a client asks for them: methods of
`AsyncClient`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from headrace.client.calls import limit_of
from headrace.engine import DEFAULT_UPDATE_TIMEOUT
from headrace.engine.control import seconds_of
from headrace.engine.groups import DEFAULT_JOIN_TIMEOUT, Backend
from headrace.engine.update_session import UpdateSession, check_session
from headrace.types.http import StageGroupAsk
from headrace.types.weights import DEFAULT_GROUP, InFlight, UpdateMode, UpdateReport

if TYPE_CHECKING:
    from headrace.client.async_client import AsyncClient


async def init_weights_update_group(
    self: AsyncClient,
    master_address: str,
    master_port: int | str,
    rank_offset: int,
    world_size: int,
    group_name: str = DEFAULT_GROUP,
    backend: Backend = "nccl",
    timeout: float = DEFAULT_JOIN_TIMEOUT,
) -> None:
    """See `AsyncEngine.init_weights_update_group`. The address is as the server sees it."""
    arguments = {
        **{"master_address": master_address, "master_port": master_port, "rank_offset": rank_offset},
        **{"world_size": world_size, "group_name": group_name, "backend": backend, "timeout": timeout},
    }
    await self._control("init_weights_update_group", arguments, type(None), limit_of(seconds_of(timeout)))


async def destroy_weights_update_group(self: AsyncClient, group_name: str = DEFAULT_GROUP) -> None:
    """See `AsyncEngine.destroy_weights_update_group`."""
    await self._control("destroy_weights_update_group", {"group_name": group_name}, type(None))


async def stage_from_group(
    self: AsyncClient,
    session: UpdateSession,
    names: Sequence[str],
    group_name: str = DEFAULT_GROUP,
    load_format: str | int | None = None,
) -> None:
    """See `AsyncEngine.stage_from_group`. Of a session that this client has begun."""
    check_session(session)
    infos = [session.info_of(name) for name in names if name in session]
    indices, is_settled = {session.index_of(info) for info in infos}, False
    await self._uploads.announce(session)
    try:
        ask = StageGroupAsk(session.session_id, tuple(names), group_name, load_format)
        await self._control("stage_from_group", ask, type(None), limit_of(session.timeout_s))
        is_settled = True
        session.num_bytes_staged += sum(info.num_bytes for info in infos)
    finally:
        session.note_sent(indices, is_settled=is_settled)


async def update_weights_from_distributed(
    self: AsyncClient,
    names: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    group_name: str = DEFAULT_GROUP,
    load_format: str | int | None = None,
    version: str | int | None = None,
    *,
    mode: UpdateMode = "auto",
    in_flight: InFlight = "drain",
    timeout: float = DEFAULT_UPDATE_TIMEOUT,
) -> UpdateReport | None:
    """See `AsyncEngine.update_weights_from_distributed`."""
    arguments = {
        **{"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group_name},
        **{"load_format": load_format, "version": version, "mode": mode, "in_flight": in_flight},
        "timeout": timeout,
    }
    limit, kind = limit_of(seconds_of(timeout)), cast("type[UpdateReport | None]", UpdateReport | None)
    return await self._control("update_weights_from_distributed", arguments, kind, limit)
