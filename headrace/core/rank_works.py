"""What a rank other than the first does between steps for a message, in slices. Owns what it has opened for that:
folders, payloads, groups, shared buffers. Decides nothing: what is done, and when, rank 0 says.

A work is a generator that rests after each slice, and returns the values of its answer, or the bytes that were asked
for. It yields whether it waits for something that has not come.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.executor import ArrivingTensors, LocalExecutor, WeightGroup
from headrace.core.rank_bytes import SentBytes, one_after_the_other
from headrace.core.rank_messages import (
    AbortOn,
    BeginOn,
    BeginOpenOn,
    CloseForeignOn,
    CommitOn,
    DevicesOn,
    DigestOn,
    DropArrivalsOn,
    DropCopyOn,
    ExtendOn,
    FillOn,
    ForgetOn,
    JoinOn,
    KeepOn,
    LeaveOn,
    LetGoOn,
    MissingOn,
    OpenFolderOn,
    OpenForeignOn,
    Place,
    ReadOn,
    ReceiveOn,
    ReleaseOn,
    ResumeOn,
    ScrambleOn,
    StageArrivalsOn,
    StageBufferOn,
    StageFileOn,
    StageForeignOn,
)
from headrace.core.staging import COPY_LOOK_S
from headrace.ipc import SharedBuffer
from headrace.types.errors import CheckpointError, UpdateConflictError
from headrace.types.memory import MemoryTag
from headrace.types.weights import BufferRef, DeviceRef
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.foreign_memory import ForeignMemory
from headrace.weights.memory import StageCopy, StagePiece
from headrace.weights.store import WeightStore

Work = Generator[bool, None, tuple[str, ...] | bytes]
SLICE_SECONDS = 0.0008
"""As rank 0 takes at a step boundary."""


class RankWorks:
    """The works of one rank over its weights and memory. Unless it `shares_memory` with rank 0, bytes are sent."""

    def __init__(self, rank: int, executor: LocalExecutor, store: WeightStore, *, shares_memory: bool = True) -> None:
        self._rank = rank
        self._shares_memory = shares_memory
        self._executor = executor
        self._store = store
        self._released: set[MemoryTag] = set()
        self._tensors: Iterator[tuple[str, Any]] = iter(())  # of the open folder
        self._payloads: dict[int, ForeignMemory] = {}
        self._groups: dict[int, WeightGroup] = {}
        self._calls: dict[int, ArrivingTensors] = {}
        self._sent: dict[int, SentBytes] = {}  # by ticket

    def work_of(self, message: Any) -> Work | None:
        """What a message that is answered asks for."""
        match message:
            case StageBufferOn():
                return self._stage_buffer(message)
            case StageFileOn():
                return self._stage_file(message)
            case StageArrivalsOn():
                return self._stage_arrivals(message)
            case StageForeignOn():
                return self._stage_foreign(message)
            case DigestOn():
                return self._digest(message.owner)
            case ReadOn():
                return self._read(message)
            case CommitOn():
                return self._commit()
            case LetGoOn():
                return self._let_go()
            case KeepOn() | ReleaseOn() | ResumeOn():
                return self._occupy(message)
            case JoinOn():
                return self._join(message)
            case (
                BeginOn()
                | BeginOpenOn()
                | DevicesOn()
                | ExtendOn()
                | MissingOn()
                | ScrambleOn()
                | OpenForeignOn()
                | CloseForeignOn()
            ):
                return self._at_once(message)
        return None

    def do(self, message: Any) -> None:
        """What a message that is not answered asks for."""
        match message:
            case FillOn():
                if message.target in self._sent:  # else it was given up
                    self._sent[message.target].fill(message)
            case ForgetOn():
                self._store.forget(message.index)
            case AbortOn():
                self._abort()
            case OpenFolderOn():
                self._tensors = _tensors_of(Path(message.folder), Path(message.root) if message.root else None)
            case ReceiveOn():
                expected = message.tensors, message.packing, message.seconds, message.skipped
                self._calls[message.call] = self._group(message.key).receive(*expected)
            case DropArrivalsOn():
                self._calls.pop(message.call).drop()
            case DropCopyOn():
                self._executor.drop_copy()
            case LeaveOn():
                if (group := self._groups.pop(message.key, None)) is not None:  # which may have refused the terms
                    group.fail(message.reason)

    def close(self) -> None:
        """Let go of everything."""
        for group in self._groups.values():
            group.fail("the engine has ended")

    # Works.

    def _at_once(self, message: Any) -> Work:
        values: tuple[str, ...] = ()
        match message:
            case DevicesOn():
                values = self._store.device_ids
            case BeginOn():
                self._store.begin(message.manifest, message.mode, message.partial)
            case BeginOpenOn():
                self._store.begin_open(message.mode, message.partial)
            case ExtendOn():
                values = (str(self._store.extend(message.manifest)),)
            case MissingOn():
                values = tuple(self._store.missing())
            case ScrambleOn():
                self._store.scramble(message.seed)
            case OpenForeignOn():
                payload = message.payload
                own = payload.of_ranks[self._rank - 1] if payload.of_ranks else payload
                self._payloads[message.key] = self._store.open_payload(own)
            case CloseForeignOn():
                if message.key in self._payloads:  # else it could not be opened here
                    self._payloads.pop(message.key).close()
        yield from ()
        return values

    def _stage_buffer(self, message: StageBufferOn) -> Work:
        if isinstance(message.buffer, DeviceRef) or message.buffer.path:
            return (yield from self._stage_places(message.buffer, message.places))
        sent = self._sent[message.ticket] = SentBytes(message.buffer.size)
        try:
            while not sent.is_complete:
                yield True
            return (yield from self._stage_places(sent.buffer.ref, one_after_the_other(message.places)))
        finally:
            del self._sent[message.ticket]
            sent.buffer.close()

    def _stage_places(self, ref: BufferRef | DeviceRef, places: tuple[Place, ...]) -> Work:
        buffer = self._store.open_buffer(ref)
        try:
            pieces = (StagePiece(p.index, buffer.part(p.offset, p.size), p.start, p.is_last, False) for p in places)
            for copies in self._store.stage_pieces(pieces):
                yield from _done(None if copies is None else copies[1])
        finally:
            buffer.close()
        return tuple(self._store.take_sum(place.index) for place in places if place.is_last)

    def _stage_file(self, message: StageFileOn) -> Work:
        found = next((data for name, data in self._tensors if name == message.name), None)
        if found is None:
            raise CheckpointError(f"{message.name} is not in the folder any more", field=message.name)
        yield from _done(self._store.stage(message.index, found))
        return (self._store.take_sum(message.index),)

    def _stage_foreign(self, message: StageForeignOn) -> Work:
        found = next(data for name, data in self._payloads[message.key].tensors if name == message.name)
        yield from _done(self._store.stage(message.index, found))
        return (self._store.take_sum(message.index),)

    def _stage_arrivals(self, message: StageArrivalsOn) -> Work:
        """Those that are there at a time: this rank may have less memory for them than rank 0."""
        arrivals, left = self._calls[message.call], message.indices
        while left:
            found = arrivals.take(len(left))
            if not found:
                yield True
                continue
            pieces = [StagePiece(index, data, None, True, False) for index, (_, data) in zip(left, found, strict=False)]
            for copies in self._store.stage_arrived(pieces):
                while copies is not None and not copies[1].advance(SLICE_SECONDS):
                    time.sleep(COPY_LOOK_S)  # the group's thread has the interpreter meanwhile
                    yield False
            arrivals.free()
            left = left[len(found) :]
        return tuple(self._store.take_sum(index) for index in message.indices)

    def _digest(self, owner: int | None) -> Work:
        found: list[str] = []
        for each in self._store.digest_in_slices(owner) if owner in (None, self._rank) else ():
            found += each or ()
            yield False
        return tuple(found)

    def _read(self, message: ReadOn) -> Work:
        if not self._shares_memory:
            found = memoryview(bytearray(message.size))
            for _ in copy_own(self._store, self._rank, message.name, message.start, found, message.owner):
                yield False
            return bytes(found)
        with SharedBuffer.open(message.into[self._rank - 1], writable=True) as buffer:
            into = buffer.view[: message.size]
            for _ in copy_own(self._store, self._rank, message.name, message.start, into, message.owner):
                yield False
        return ()

    def _commit(self) -> Work:
        ticket = self._store.commit()
        while not ticket.is_done():
            yield True
        self._tensors = iter(())
        return ()

    def _let_go(self) -> Work:
        while self._store.let_go(SLICE_SECONDS):
            yield False
        return ()

    def _abort(self) -> None:
        self._tensors = iter(())
        try:
            self._store.abort()
        except UpdateConflictError:
            return  # it is over here: committed, or never begun

    def _occupy(self, message: KeepOn | ReleaseOn | ResumeOn) -> Work:
        match message:
            case KeepOn():
                slices = self._executor.keep_copy() if "weights" not in self._released else iter(())
            case ReleaseOn():
                slices = self._executor.release(message.tags, keeps_copy=False)
                self._released |= set(message.tags)
            case ResumeOn():
                slices = self._executor.resume(message.tags, message.restore)
        for _ in slices:
            yield False
        if isinstance(message, ResumeOn):
            self._released -= set(message.tags)
        return ()

    def _join(self, message: JoinOn) -> Work:
        terms = msgspec.structs.replace(message.terms, rank=message.terms.rank + self._rank)
        group = self._groups[message.key] = self._executor.join_group(terms, message.seconds)
        while not group.is_joined:
            if group.problem is not None:
                raise group.problem.info().to_exception()  # without what its traceback would keep
            yield True
        return ()

    def _group(self, key: int) -> WeightGroup:
        return self._groups[key]


def _done(copy: StageCopy | None) -> Generator[bool, None, None]:
    """A copy in slices to its end."""
    while copy is not None and not copy.advance(SLICE_SECONDS):
        yield False


def _tensors_of(folder: Path, root: Path | None) -> Iterator[tuple[str, Any]]:
    """Read as they are asked for, in the order of the files, which is every rank's."""
    yield from Checkpoint(folder, root=root).tensors()


def copy_own(
    store: WeightStore, rank: int, name: str, start: int, into: memoryview, owner: int | None
) -> Iterator[None]:
    """As `WeightStore.copy_in_slices` on this rank, with a parameter of another `owner` as zeros."""
    if owner in (None, rank):
        return store.copy_in_slices(name, start, into, None if owner is None else 0)
    into[:] = bytes(len(into))
    return iter(())
