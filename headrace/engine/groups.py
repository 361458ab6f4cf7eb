"""Weights that a trainer broadcasts over a `torch.distributed` group, as a caller asks for them: methods of
`AsyncEngine`, in the words of SGLang.

Owns their checks. What a call announces is sent whatever the engine says to it, so one that is refused here tells the
core to let it pass (`headrace.core.grouping`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args

from headrace.engine.calls import outlast
from headrace.engine.client import CoreClient
from headrace.engine.control import DEFAULT_UPDATE_TIMEOUT, seconds_of, terms_of_part
from headrace.engine.fields import name_of
from headrace.engine.sender import Sender
from headrace.engine.update_session import UpdateSession, check_session
from headrace.types.errors import HeadraceError, RequestError, encodable
from headrace.types.messages import Discard, GroupTensor, JoinGroup, LeaveGroup, Receive
from headrace.types.plain_values import as_choice, as_integer, as_list, plain_text
from headrace.types.weights import (
    DEFAULT_GROUP,
    ELEMENT_BYTES,
    MAX_DIMENSIONS,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
    SEPARATE,
    TOGETHER,
    InFlight,
    Rendezvous,
    TensorInfo,
    UpdateMode,
    UpdateReport,
    shape_problem,
)
from headrace.weights.weight_map import is_recomputed

if TYPE_CHECKING:
    from headrace.engine.async_engine import AsyncEngine
    from headrace.engine.runtime import EngineLoop

DEFAULT_JOIN_TIMEOUT = 300.0
_BUCKET = "flattened_bucket"
Backend = Literal["gloo", "nccl"]


async def init_weights_update_group(
    self: AsyncEngine,
    master_address: str,
    master_port: int | str,
    rank_offset: int,
    world_size: int,
    group_name: str = DEFAULT_GROUP,
    backend: Backend = "nccl",
    timeout: float = DEFAULT_JOIN_TIMEOUT,
) -> None:
    """Join the group that a trainer makes as its rank 0 at `master_address`; this engine is rank `rank_offset`.

    Waits until all `world_size` ranks are there: the trainer makes the group meanwhile. An engine on a CPU has "gloo"
    only. Raises `WeightUpdateError` and `RequestError` naming the field, `UpdateConflictError` for a name that is in
    use, and `DeadlineError` after `timeout` seconds; nothing is left of the group then.
    """
    await join_group(self.runtime, master_address, master_port, rank_offset, world_size, group_name, backend, timeout)


async def join_group(
    runtime: EngineLoop,
    master_address: Any,
    master_port: Any,
    rank_offset: Any,
    world_size: Any,
    group_name: Any,
    backend: Any,
    timeout: Any,
    rendezvous: Rendezvous = "sglang",
    unique_id: bytes = b"",
) -> None:
    """What `init_weights_update_group` does, by either rendezvous, or none where an id is given. An update in buckets
    that is open is another sender's."""
    name, address = _group_of(group_name), name_of(master_address, "master_address").strip("[]")
    if not (address or unique_id):
        raise RequestError("master_address must not be empty", field="master_address")
    port = 0 if unique_id else _integer_of(master_port, "master_port", 1, 65535)
    size = _integer_of(world_size, "world_size", 2, 1 << 20)
    rank = _integer_of(rank_offset, "rank_offset", 1, size - 1)
    kind = as_choice(backend, get_args(Backend), "backend")
    await runtime.client.call(
        lambda call_id: JoinGroup(call_id, name, address, port, rank, size, kind, rendezvous, unique_id),
        NoneType,
        seconds_of(timeout),
    )
    await runtime.joined.note_joined(name)


async def destroy_weights_update_group(self: AsyncEngine, group_name: str = DEFAULT_GROUP) -> None:
    """Leave a group. What is being received of it fails, and an update in buckets that it has brought a part of is
    dropped. `WeightUpdateError` if there is none of that name."""
    name = _group_of(group_name)
    await self.runtime.client.call(lambda call_id: LeaveGroup(call_id, name), NoneType)
    await self.runtime.joined.note_left(name)


async def stage_from_group(
    self: AsyncEngine,
    session: UpdateSession,
    names: Sequence[str],
    group_name: str = DEFAULT_GROUP,
    load_format: str | int | None = None,
) -> None:
    """As `stage`, of tensors of the session's manifest that rank 0 of a group broadcasts in this order: one broadcast
    each, or with `load_format="flattened_bucket"` one of the bytes of all, or with an integer one of as many as it
    takes to exceed so many bytes. Waits for the session's time at most."""
    async with _Announced(self.runtime.client) as announced:
        announced.group = _group_of(group_name)
        check_session(session)
        announced.seconds = session.timeout_s
        infos = [session.info_of(name) for name in _names_of(names)]
        announced.sends(infos, load_format)
        await announced.receive(session, infos)


async def update_weights_from_distributed(
    self: AsyncEngine,
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
    """As `update_weights_from_bucket`, of tensors that rank 0 of a group broadcasts in this order: one broadcast each,
    or with `load_format="flattened_bucket"` one of the bytes of all. The sender makes this call and broadcasts at the
    same time. What the call announces is received even if it is refused, so that the next one gets its own."""
    async with _Announced(self.runtime.client) as announced:
        try:
            announced.group = _group_of(group_name)
            infos = _described(names, dtypes, shapes)
            announced.sends(infos, load_format)
            terms = terms_of_part(version, mode, in_flight, timeout)
        except HeadraceError:  # as in `JoinedUpdate.add`
            await self.runtime.joined.end()
            raise
        announced.seconds = terms.timeout_s
        wanted = [info for info in infos if not is_recomputed(info.name)]

        async def stage(session: UpdateSession, _: Sequence[int]) -> None:
            await announced.receive(session, wanted)

        return await self.runtime.joined.add(wanted, terms, stage, sender=Sender("group", announced.group))


class _Announced:
    """What a call says that rank 0 sends. If the core is not asked for it before the block is left, it is told to let
    it pass."""

    def __init__(self, client: CoreClient) -> None:
        self.group = ""
        self.seconds = DEFAULT_UPDATE_TIMEOUT
        self._client = client
        self._infos: tuple[TensorInfo, ...] | None = None
        self._packing = SEPARATE
        self._is_asked = False

    def sends(self, infos: Iterable[TensorInfo], load_format: Any) -> None:
        """So much is sent, in this way."""
        self._packing = _packing_of(load_format)
        self._infos = tuple(infos)

    async def receive(self, session: UpdateSession, infos: Sequence[TensorInfo]) -> None:
        """Have all that is sent received, and these tensors of it staged."""
        indices = {info.name: session.index_of(info) for info in infos}
        tensors = tuple(
            GroupTensor(info, indices.get(info.name, -1), session.replaces(indices.get(info.name, -1)))
            for info in self._infos or ()
        )
        is_settled = False
        self._is_asked = True
        try:
            await self._client.bring(
                lambda call_id: Receive(call_id, session.session_id, self.group, tensors, self._packing),
                session.mode,
                self.seconds,
            )
            is_settled = True
            session.roads.add("broadcast")
            session.num_bytes_staged += sum(info.num_bytes for info in infos)
        finally:
            session.note_sent(set(indices.values()), is_settled=is_settled)

    async def __aenter__(self) -> _Announced:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.group and not self._is_asked:
            await outlast(self._discard())

    async def _discard(self) -> None:
        with contextlib.suppress(HeadraceError):  # the core is gone, and its groups with it
            await self._client.call(
                lambda call_id: Discard(call_id, self.group, self._infos, self._packing, self.seconds),
                NoneType,
                math.inf,
            )


def load_format_of(load_format: Any) -> bool:
    """Whether tensors come as one bucket."""
    if load_format not in (None, _BUCKET):
        message = f"load_format {load_format!r:.100} is not supported, only null and {_BUCKET!r} are"
        raise RequestError(message, field="load_format")
    return load_format is not None


def _packing_of(load_format: Any) -> int:
    """How tensors are packed that are broadcast."""
    if type(load_format) is int:
        if not 0 <= load_format < TOGETHER:
            raise RequestError(f"load_format must not be {load_format}", field="load_format")
        return load_format
    return TOGETHER if load_format_of(load_format) else SEPARATE


def _described(names: Any, dtypes: Any, shapes: Any) -> tuple[TensorInfo, ...]:
    """What three lists say of tensors. Raises `RequestError` naming the list that is wrong."""
    listed = _names_of(names)
    kinds = [_text_in(kind, "dtypes").removeprefix("torch.") for kind in as_list(dtypes, "dtypes", "a list of names")]
    sizes = [_shape_of(shape) for shape in as_list(shapes, "shapes", "a list of lists of integers")]
    for field, found in (("dtypes", kinds), ("shapes", sizes)):
        if len(found) != len(listed):
            raise RequestError(f"{field} has {len(found)} entries for {len(listed)} names", field=field)
    for kind in kinds:
        if kind not in ELEMENT_BYTES:
            raise RequestError(f"dtypes: {kind!r:.100} is no dtype of a tensor", field="dtypes")
    return tuple(map(TensorInfo, listed, sizes, kinds))


def _names_of(names: Any) -> list[str]:
    return [_text_in(name, "names") for name in as_list(names, "names", "a list of names", MAX_TENSORS)]


def _shape_of(shape: Any) -> tuple[int, ...]:
    sizes = as_list(shape, "shapes", "a list of lists of integers", MAX_DIMENSIONS)
    found = tuple(as_integer(size, "shapes") for size in sizes)
    problem = shape_problem(found)
    if problem:
        raise RequestError(f"shapes: one {problem}", field="shapes")
    return found


def _group_of(group_name: Any) -> str:
    name = name_of(group_name, "group_name")
    if not name:
        raise RequestError("group_name must not be empty", field="group_name")
    return name


def _text_in(value: Any, field: str) -> str:
    text = plain_text(value)
    if not isinstance(text, str) or len(text) > MAX_TENSOR_NAME or text != encodable(text):
        message = f"{field} must be a list of texts of at most {MAX_TENSOR_NAME} characters"
        raise RequestError(message, field=field)
    return text


def _integer_of(value: Any, field: str, least: int, most: int) -> int:
    """Frameworks send ports as text."""
    text = plain_text(value)
    is_digits = isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20
    number = int(text) if is_digits else as_integer(value, field)
    if not least <= number <= most:
        raise RequestError(f"{field} must be from {least} to {most}, got {number}", field=field)
    return number
