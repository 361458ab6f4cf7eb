"""The weights of all ranks as one. Owns what an update or a read asks of each, and puts together what they answer; what
a rank does with its own share is its `WeightStore`'s.

On one host no tensor travels: what is staged is in memory or files that every rank opens by itself, and an answer is a
digest at most. To ranks that cannot, its bytes are sent (`headrace.core.rank_bytes`). Work goes on everywhere at once,
and is done when it is done on every rank. Nothing is waited for but where nothing is copied: to begin, and to extend.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from typing import Any

import msgspec
import numpy as np
import torch

from headrace.config import ResolvedConfig
from headrace.core.rank_bytes import Feed, sent_pieces, sent_whole, whole_bytes
from headrace.core.rank_group import WAIT_SECONDS, Asked, OtherRanks
from headrace.core.rank_messages import (
    AbortOn,
    BeginOn,
    BeginOpenOn,
    CommitOn,
    DevicesOn,
    DigestOn,
    ExtendOn,
    ForgetOn,
    LetGoOn,
    MissingOn,
    OpenForeignOn,
    Place,
    ReadOn,
    ScrambleOn,
    StageArrivalsOn,
    StageBufferOn,
    StageFileOn,
    StageForeignOn,
)
from headrace.core.rank_sources import (
    Arrived,
    BufferPart,
    FileTensorOn,
    ForeignTensorOn,
    RankBuffer,
    RankForeign,
    give_up,
)
from headrace.core.rank_works import copy_own
from headrace.ipc import SharedBuffer
from headrace.models import weight_map
from headrace.types.errors import (
    HeadraceError,
    NotFoundError,
    UnavailableError,
    UpdateConflictError,
    WeightUpdateError,
)
from headrace.types.foreign import FIELD, Payload
from headrace.types.weights import BufferEntry, BufferRef, DeviceRef, TensorInfo, UpdateMode
from headrace.weights.memory import Copies, ResolvedMode, SharedTensors, StageBuffer, StageCopy, StagePiece, Ticket
from headrace.weights.position_sum import DIGEST_LENGTH, add_digests
from headrace.weights.shard import Shard
from headrace.weights.store import WeightStore

MAX_PIECES = 512
"""Pieces that are asked for at once: a message of some ten kilobytes."""

READ_BYTES = 1 << 20
"""Bytes of a tensor that are put together at once."""


class OwnCopy:
    """A copy of this rank's share, while others copy theirs: of those nobody knows what they have written."""

    def __init__(self, own: StageCopy) -> None:
        self.has_written = True
        self.advance = own.advance


class RankCopy:
    """A copy of this rank's share, if there is one, and then of all others', after which the tensors of `indices` are
    whole. `feed` is what some of them are sent for it."""

    def __init__(
        self, weights: RankWeights, own: StageCopy | None, asked: Asked, indices: Sequence[int], feed: Feed | None
    ) -> None:
        self.has_written = True
        self._weights, self._own, self._asked, self._indices, self._feed = weights, own, asked, indices, feed

    def advance(self, budget_s: float) -> bool:
        if self._feed is not None:
            if self._feed.advance():
                self._feed = None
            return False
        if self._own is not None and not self._own.advance(budget_s):
            return False
        self._own = None
        if not self._asked.is_done():
            time.sleep(WAIT_SECONDS)
            return False
        self._weights.check_sums(self._indices, self._asked.values)
        return True


class _RankCommit:
    def __init__(self, own: Ticket, asked: Asked) -> None:
        self._own, self._asked = own, asked

    def is_done(self) -> bool:
        is_done_elsewhere = self._asked.is_done()
        return self._own.is_done() and is_done_elsewhere


class RankWeights:
    """Live weights of which each rank has a share; see `headrace.core.executor.Weights`."""

    def __init__(self, store: WeightStore, others: OtherRanks, resolved: ResolvedConfig) -> None:
        self._store, self._others, self._resolved = store, others, resolved
        self._manifest: list[TensorInfo] = []
        self._scratch: list[SharedBuffer] = []
        self._num_payloads = 0
        self._sent: Asked | None = None  # what others may wait for the bytes of
        self._has_mapped = False  # memory of devices, which others may have left
        self._letting_go: Asked | None = None
        self._refusal: HeadraceError | None = None

    @property
    def device(self) -> torch.device:
        """That of this rank."""
        return self._store.device

    @property
    def device_ids(self) -> tuple[str, ...]:
        """Devices whose memory all ranks read where it is, this rank's own first: none where a rank is on another host,
        or in a caller's process, in which memory is named by its address."""
        own = self._store.device_ids
        if not own or self._others.has_far or self._others.shares_process:
            return ()
        return tuple(filter(set(own).intersection(*self._others.ask(DevicesOn).wait()).__contains__, own))

    def close(self) -> None:
        """Give back what is shared with the others."""
        for buffer in self._scratch:
            buffer.close()
        self._scratch.clear()

    # The transaction.

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode:
        """As `WeightStore.begin`; "auto" is "inplace" where any rank has no room for a shadow."""
        resolved = self._store.begin(manifest, mode, partial)
        if not self._have_begun(self._others.ask(BeginOn, tuple(manifest), resolved, partial), mode, resolved):
            return self.begin(manifest, "inplace", partial)
        self._manifest = list(manifest)
        return resolved

    def begin_open(self, mode: UpdateMode, partial: bool) -> ResolvedMode:
        """As `begin`, of `WeightStore.begin_open`."""
        resolved = self._store.begin_open(mode, partial)
        if not self._have_begun(self._others.ask(BeginOpenOn, resolved, partial), mode, resolved):
            return self.begin_open("inplace", partial)
        self._manifest = []
        return resolved

    def _have_begun(self, asked: Asked, mode: UpdateMode, resolved: ResolvedMode) -> bool:
        """Whether all ranks have begun an update; if not, none has, and it is another mode's turn. Raises what else
        keeps one from it."""
        self._refusal = None
        try:
            asked.wait()
        except HeadraceError as error:
            self.abort()
            if not isinstance(error, WeightUpdateError) or mode != "auto" or resolved == "inplace":
                raise
            return False
        return True

    def extend(self, manifest: Sequence[TensorInfo]) -> int:
        """As `WeightStore.extend`. Where another rank has no room for what this one takes, the update can only
        be aborted."""
        self._check_open()
        num_missing = self._store.extend(manifest)
        try:
            found = self._others.ask(ExtendOn, tuple(manifest)).wait()
        except HeadraceError as refusal:
            self._refusal = refusal
            raise
        self._manifest += manifest
        num_ranks = self._resolved.engine.tp_size  # of a stage, and all of those hold of the same tensors
        return num_missing + sum(int(values[0]) for values in found[num_ranks - 1 :: num_ranks])

    def _check_open(self) -> None:
        """Raise what makes the open update one that can only be aborted, if it is."""
        if self._refusal is not None:
            raise type(self._refusal)(f"{self._refusal.message}; abort the update", field=self._refusal.field)

    def missing(self) -> list[str]:
        found = self._others.ask(MissingOn).wait() if self._resolved.engine.pp_size > 1 else []
        return list(dict.fromkeys([*self._store.missing(), *(name for names in found for name in names)]))

    def stage(self, index: int, data: Any, start: int | None = None) -> StageCopy:
        """As `WeightStore.stage`, of what every rank can open."""
        self._check_open()
        parts = self._parts_to_send(index, data)
        match data:
            case FileTensorOn():
                asked = self._sent = self._others.ask(StageFileOn, index, data.name, far=self._far(index))
            case ForeignTensorOn():
                arguments = index, data.memory.key, data.name
                asked = data.memory.asked = self._others.ask(StageForeignOn, *arguments, far=self._far(index))
            case _:
                raise WeightUpdateError("these values are in memory of one rank only", field=self._manifest[index].name)
        feed = Feed(self._others, asked, parts) if parts else None
        return RankCopy(self, self._store.stage(index, data.data, start), asked, (index,), feed)

    def _parts_to_send(self, index: int, data: Any) -> list[memoryview]:
        is_sent = self._others.has_far and isinstance(data, FileTensorOn | ForeignTensorOn)
        return [whole_bytes(data.data, self._manifest[index])] if is_sent else []

    def _far(self, index: int) -> Callable[[int], StageBufferOn]:
        return partial(sent_whole, index, self._manifest[index].num_bytes)

    def stage_pieces(self, pieces: Iterator[StagePiece]) -> Copies:
        """As `WeightStore.stage_pieces`: many are asked for in one message, and whole when all of them are."""
        while batch := list(islice(pieces, MAX_PIECES)):
            parts: list[BufferPart] = [piece.data for piece in batch]
            buffer = parts[0].buffer
            places = tuple(
                Place(piece.index, part.offset, part.size, piece.start, piece.is_last)
                for piece, part in zip(batch, parts, strict=True)
            )
            far = partial(sent_pieces, places)
            asked = buffer.asked = self._others.ask(StageBufferOn, buffer.ref, places, far=far)
            own = (msgspec.structs.replace(piece, data=part.here()) for piece, part in zip(batch, parts, strict=True))
            for copies in self._store.stage_pieces(own):
                yield None if copies is None else ((), OwnCopy(copies[1]))
            whole = [piece.index for piece in batch if piece.is_last]
            feed = Feed(self._others, asked, buffer.parts_to_send(places)) if self._others.has_far else None
            yield whole, RankCopy(self, None, asked, whole, feed)

    def stage_arrived(self, tensors: Sequence[StagePiece]) -> Copies:
        """As `WeightStore.stage_arrived`: the others take as many of theirs, in the same order."""
        self._check_open()
        arrived: list[Arrived] = [each.data for each in tensors]
        indices = tuple(each.index for each in tensors)
        asked = self._others.ask(StageArrivalsOn, arrived[0].call, indices)
        for each in arrived:
            each.asked = asked
        own = [msgspec.structs.replace(each, data=each.data.data) for each in tensors]
        for copies in self._store.stage_arrived(own):
            yield None if copies is None else ((), OwnCopy(copies[1]))
        yield indices, RankCopy(self, None, asked, indices, None)

    def moves(self, entries: Sequence[BufferEntry], ref: BufferRef | DeviceRef, *, are_right: bool) -> None:
        """Each rank looks at each piece: of most it holds a part."""
        return None

    def check_sums(self, indices: Sequence[int], others: Sequence[tuple[str, ...]]) -> None:
        """Hold what all ranks have of whole tensors against the manifest. `WeightUpdateError` naming what differs."""
        for index, *parts in zip(indices, *others, strict=True):
            own, info = self._store.take_sum(index), self._manifest[index]
            if len(info.digest) == DIGEST_LENGTH and (found := add_digests(own, *parts)) != info.digest:
                message = f"{info.name} arrived with digest {found}, the manifest says {info.digest}"
                raise WeightUpdateError(message, field=info.name)

    def open_buffer(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        if isinstance(ref, DeviceRef):
            if self._others.has_far:
                raise UnavailableError("a rank on another host does not map memory of a device", field="buffer")
            self._has_mapped = True
        return RankBuffer(ref, self._store.open_buffer(ref), self._others)

    def open_payload(self, payload: Payload) -> SharedTensors:
        if (payload.of_ranks or payload.has_cuda_memory) and (
            self._others.has_far or self._resolved.engine.pp_size > 1
        ):
            where = "several hosts" if self._others.has_far else "several stages (pp_size)"
            message = f"memory of CUDA devices is not read by an engine of {where}: send tensors of the CPU"
            raise WeightUpdateError(message, field=FIELD)
        own = self._store.open_payload(payload)
        self._num_payloads += 1
        opened = RankForeign(self._num_payloads, own, self._others)
        try:
            far = partial(OpenForeignOn, key=self._num_payloads, payload=Payload())
            opened.asked = self._others.ask(OpenForeignOn, self._num_payloads, payload, far=far)
            opened.asked.wait()
        except BaseException:
            opened.close()
            raise
        return opened

    def forget(self, index: int) -> list[int]:
        self._others.tell(ForgetOn(index))
        return self._store.forget(index)

    def commit(self) -> Ticket:
        self._check_open()
        asked = self._others.ask(CommitOn)
        return _RankCommit(self._store.commit(), asked)

    def abort(self) -> None:
        """Also of what some rank has not committed, where others have."""
        give_up(self._others, self._sent)
        self._others.tell(AbortOn())
        with suppress(UpdateConflictError):
            self._store.abort()

    def let_go(self, budget_s: float) -> bool:
        """As `WeightStore.let_go`, on all ranks."""
        if self._has_mapped:
            self._has_mapped = False
            self._letting_go = self._others.ask(LetGoOn)
        is_left = self._store.let_go(budget_s)
        if self._letting_go is not None and self._letting_go.is_done():
            self._letting_go = None
        return is_left or self._letting_go is not None

    # Reading live memory.

    def digest_in_slices(self, rank: int | None = None) -> Iterator[tuple[str, str] | None]:
        """As `WeightStore.digest_in_slices`: the parts of all ranks, added up, at the end; or what `rank` holds."""
        if rank == 0:
            yield from self._store.digest_in_slices(rank)
            return
        asked, own = self._others.ask(DigestOn, rank), list[tuple[str, str]]()
        try:
            for found in self._store.digest_in_slices() if rank is None else ():
                own += [found] if found else []
                yield None
            yield from _until_done(asked)
        except BaseException:
            give_up(self._others, asked)
            raise
        if rank is not None:
            names_and_digests = iter(asked.values[rank - 1])
            yield from zip(names_and_digests, names_and_digests, strict=True)
            return
        for (name, digest), *parts in zip(own, *(each[1::2] for each in asked.values), strict=True):
            yield name, add_digests(digest, *parts)

    def parameters(self) -> tuple[tuple[TensorInfo, ...], ...]:
        return tuple(tuple(stage.values()) for stage in self._parameters for _ in range(self._resolved.engine.tp_size))

    def info(self, name: str, rank: int | None = None) -> TensorInfo:
        if rank is None:
            return self._store.info(name)
        found = self._parameters[rank // self._resolved.engine.tp_size].get(name)
        if found is None:
            raise NotFoundError(f"{name} is not a parameter of rank {rank}", field="name")
        return found

    @cached_property
    def _parameters(self) -> list[dict[str, TensorInfo]]:
        """Of each stage, by name: all of its ranks have as much of each."""
        engine, dtype = self._resolved.engine, self._resolved.dtype
        found = [{info.name: info for info in self._store.parameters()[0]}]
        for stage in range(1, engine.pp_size):
            shard = Shard(0, engine.tp_size, stage, engine.pp_size)
            params = weight_map(self._resolved.model, shard).params.values()
            found.append({each.name: TensorInfo(each.name, each.shape, each.dtype or dtype) for each in params})
        return found

    def copy_in_slices(self, name: str, start: int, into: memoryview, rank: int | None = None) -> Iterator[None]:
        """As `WeightStore.copy_in_slices`. What a rank does not hold it gives as zeros, and what several hold is the
        same: so bits are put together."""
        for at in range(0, len(into), READ_BYTES):
            part = into[at : at + READ_BYTES]
            scratch = self._scratch_buffers()
            refs = tuple(buffer.ref for buffer in scratch)
            asked = self._others.ask(ReadOn, name, start + at, len(part), refs, rank)
            try:
                yield from copy_own(self._store, 0, name, start + at, part, rank)
                yield from _until_done(asked)
            except BaseException:
                give_up(self._others, asked)
                raise
            whole = np.frombuffer(part, np.uint8)
            for buffer in scratch:
                np.bitwise_or(whole, np.frombuffer(buffer.view, np.uint8, len(part)), out=whole)
            for data in asked.data:
                np.bitwise_or(whole, np.frombuffer(data, np.uint8), out=whole)
            yield

    def scramble(self, seed: int) -> None:
        asked = self._others.ask(ScrambleOn, seed)
        self._store.scramble(seed)
        asked.wait()

    def _scratch_buffers(self) -> list[SharedBuffer]:
        while len(self._scratch) < len(self._others.numbers):
            self._scratch.append(SharedBuffer.create(READ_BYTES))
        return self._scratch


def _until_done(asked: Asked) -> Iterator[None]:
    while not asked.is_done():
        time.sleep(WAIT_SECONDS)
        yield
