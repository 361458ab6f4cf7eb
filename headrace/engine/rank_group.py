"""One engine whose ranks are the processes of a trainer: every rank of a `torch.distributed` group constructs it, the
first has it, the others host a rank each in a thread.

Owns how they find each other: by the store of the trainer's `torch.distributed`, in which rank 0 says where it listens,
a secret, and what keeps it from starting. Nothing is sent over the trainer's group, which may be in use meanwhile.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.config import EngineConfig
from headrace.engine.async_engine import AsyncEngine
from headrace.engine.core_host import ExecutorKind, current_device, resolve_settings
from headrace.ipc.rank_meeting import Meeting
from headrace.types.errors import ConfigError, DeadlineError, ErrorInfo, HeadraceError, InternalError, UnavailableError

if TYPE_CHECKING:
    from headrace.core.rank_thread import RankThread

FIELD = "rank_group"
SECRET_BYTES = 32
HEAR_SECONDS = 60.0
"""How long a rank whose own settings are refused waits for rank 0, to tell it."""

LOOK_SECONDS = 0.5


class _Place(msgspec.Struct, frozen=True, tag=True):
    """Where rank 0 listens."""

    host: str
    port: int
    secret: bytes


class _Refusal(msgspec.Struct, frozen=True, tag=True):
    """What keeps it from starting."""

    error: ErrorInfo


_SAID: msgspec.json.Decoder[_Place | _Refusal] = msgspec.json.Decoder(_Place | _Refusal)


class TrainerGroup:
    """A trainer's ranks at their next common call, seen from one of them."""

    def __init__(self, group: Any) -> None:
        """See `trainer_group`."""
        from torch.distributed import get_process_group_ranks

        from headrace.parallel.rendezvous import trainer_group, trainer_store

        group = trainer_group(group, FIELD, ConfigError)
        self.rank: int = group.rank()
        ranks = get_process_group_ranks(group)
        self.size = len(ranks)
        self.store = trainer_store()
        self._prefix = f"headrace/ranks/{hashlib.sha256(repr(ranks).encode()).hexdigest()}"
        try:
            self._number = self._next_number()
        except RuntimeError as error:  # whoever keeps the store is gone
            reason = str(error).partition("\n")[0]
            raise UnavailableError(f"the trainer's store cannot be reached: {reason}", field=FIELD) from None

    def _next_number(self) -> int:
        """Which call of rank 0's this is. On another rank it is the first that it has not heard of: how often that rank
        has called in vain before is of no account."""
        if self.rank == 0:
            return int(self.store.add(f"{self._prefix}/calls", 1))
        return int(self.store.add(self._heard_key, 0)) + 1

    @property
    def _heard_key(self) -> str:
        return f"{self._prefix}/heard/{self.rank}"

    @property
    def _key(self) -> str:
        return f"{self._prefix}/said/{self._number}"

    def say(self, said: _Place | _Refusal) -> None:
        """To all other ranks, where there is a store still."""
        with contextlib.suppress(RuntimeError):
            self.store.set(self._key, msgspec.json.encode(said))

    def hear(self, seconds: float) -> _Place:
        """What rank 0 says. Raises its error, and `DeadlineError` if it says nothing within so many seconds."""
        try:
            self.store.wait([self._key], datetime.timedelta(seconds=seconds))
            said = _SAID.decode(self.store.get(self._key))
            self.store.add(self._heard_key, self._number - int(self.store.add(self._heard_key, 0)))
        except RuntimeError:  # the store's, also where it has waited in vain
            message = f"rank 0 has not come to Engine(rank_group=...) within {seconds:g} s"
            raise DeadlineError(message, field="start_timeout") from None
        if isinstance(said, _Refusal):
            raise said.error.to_exception()
        return said

    def forget(self) -> None:
        """All have heard it."""
        with contextlib.suppress(RuntimeError):
            self.store.delete_key(self._key)


def share_engine(
    rank_group: Any, model: str | Path, settings: dict[str, Any], *, progress: bool = True
) -> AsyncEngine | RankThread:
    """This rank's part of an engine that every rank of the group shares: all of it, on the first."""
    group = TrainerGroup(rank_group)
    return lead(group, model, settings, progress=progress) if group.rank == 0 else follow(group, model, settings)


def lead(group: TrainerGroup, model: str | Path, settings: dict[str, Any], *, progress: bool = True) -> AsyncEngine:
    """The engine, on rank 0, once all ranks have started. Every rank raises what keeps any from that."""
    meeting: Meeting | None = None
    executor: ExecutorKind = "local"
    try:
        config = _config_of(model, settings, group.size)
        if group.size > 1:
            executor = meeting = _open_meeting(group, config.start_timeout)
        given = msgspec.structs.asdict(config)
        engine = AsyncEngine(inprocess=True, executor=executor, progress=progress, **given)
        engine.wait_started()
    except BaseException as error:  # whatever it is, the others wait for it
        known = _known(error, 0)
        group.say(_Refusal(known.info()))
        if meeting is not None:
            meeting.refuse(known)
            meeting.close()
        raise
    group.forget()
    return engine


def _open_meeting(group: TrainerGroup, seconds: float) -> Meeting:
    from headrace.parallel.rendezvous import listen_beside

    secret = secrets.token_bytes(SECRET_BYTES)
    missing = f"not come to Engine(rank_group=...) in time (start_timeout {seconds:g} s)"
    listener = listen_beside(group.store, group.size)
    meeting = Meeting(listener, secret, num_guests=group.size - 1, kind="rank", missing=missing)
    group.say(_Place(*meeting.address, secret))
    return meeting


def follow(group: TrainerGroup, model: str | Path, settings: dict[str, Any]) -> RankThread:
    """This rank of the engine, once all have started. Raises as `lead`."""
    from headrace.core.rank_thread import RankThread, tell_refusal

    seconds = HEAR_SECONDS
    try:
        config = _config_of(model, settings, group.size)
        seconds = config.start_timeout
        resolved = resolve_settings(config, first_device=current_device(), ranks_here=1)
    except Exception as error:  # whatever it is, the others wait for it
        place = group.hear(seconds)
        tell_refusal((place.host, place.port), place.secret, group.rank, _known(error, group.rank))
        raise
    place = group.hear(seconds)
    try:
        return RankThread((place.host, place.port), place.secret, group.rank, resolved)
    except HeadraceError:
        with contextlib.suppress(DeadlineError):
            group.hear(LOOK_SECONDS)  # where it has given up, what it says says more
        raise


def _known(error: BaseException, rank: int) -> HeadraceError:
    """As other ranks are told of it."""
    if isinstance(error, HeadraceError):
        return error
    return InternalError(f"rank {rank} failed: {type(error).__name__}: {error}")


def _config_of(model: str | Path, settings: dict[str, Any], size: int) -> EngineConfig:
    config = EngineConfig.from_dict({"model": model, **settings})
    if "tp_size" not in settings:
        config = msgspec.structs.replace(config, tp_size=max(1, size // config.pp_size))
    if config.tp_size * config.pp_size != size:
        message = f"tp_size {config.tp_size} times pp_size {config.pp_size} is not the size of rank_group, {size}"
        raise ConfigError(message, field="tp_size")
    if config.nnodes != 1:
        message = "nnodes is for ranks that Headrace starts; those of rank_group are where they are"
        raise ConfigError(message, field="nnodes")
    return config
