"""Copies of staged tensors, taken a slice at a time between steps. Owns the progress of one command that brings some,
and what they are taken from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.core.executor import WeightGroup
from headrace.types.errors import CheckpointError, HeadraceError, WeightUpdateError
from headrace.types.messages import NO_DEADLINE, Receive, Stage, StagePayload
from headrace.weights.memory import Copies, SharedTensors, StageCopy, StagePiece
from headrace.weights.session import OpenUpdate, WeightMachine

ARRIVAL_LOOK_S = 0.0003
"""Between two looks at what a group brings."""

COPY_LOOK_S = 0.00005
"""Between two looks at a copy that a device makes, while a thread needs the interpreter."""

MOST_ARRIVALS = 256
"""Tensors of a group that are staged at once: of ranks each is a few bytes of a message."""


class StageJob:
    """Tensors on their way into a session. `call_id` is the call to answer then; None: the core reads a folder.

    `copies` are the indices of the tensors that a copy completes, none for a piece before its last one, and the copy;
    `what` they are, for messages; `close` lets go of what they are taken from. `is_waiting`: the last `advance` found
    that the next tensor has not come.

    `is_fed`: a thread of this process brings them, which needs the interpreter meanwhile. Then `look_s` are the seconds
    until the next `advance` where nothing can be done but to wait; 0: something can.
    """

    def __init__(
        self,
        machine: WeightMachine,
        session_id: int,
        copies: Copies,
        call_id: int | None,
        deadline: float = NO_DEADLINE,
        close: Callable[[], None] | None = None,
        what: str = "the upload",
        *,
        is_fed: bool = False,
    ) -> None:
        self.call_id = call_id
        self.deadline = deadline
        self.what = what
        self.is_waiting = False
        self.look_s = 0.0
        self._is_fed = is_fed
        self._machine = machine
        self._session_id = session_id
        self._copies = copies
        self._current: tuple[Sequence[int], StageCopy] | None = None
        self._close = close

    def advance(self, budget_s: float, now: float) -> bool:
        """Copy for about `budget_s` seconds, at least one block. True when all of it is staged.

        Raises a `HeadraceError` when a tensor is not what the manifest says; the job is over then.
        """
        started = time.perf_counter()
        is_done = self._copy_until(started + budget_s, now)
        self.look_s = 0.0
        if self._is_fed and not is_done and time.perf_counter() < started + budget_s:
            self.look_s = ARRIVAL_LOOK_S if self.is_waiting else COPY_LOOK_S
        return is_done

    def _copy_until(self, stop_at: float, now: float) -> bool:
        self.is_waiting = False
        while True:
            if self._current is None:
                try:
                    self._current = next(self._copies)
                except StopIteration:
                    return True
            if self._current is None:
                self.is_waiting = True
                return False
            indices, copy = self._current
            try:
                is_done = copy.advance(max(0.0, stop_at - time.perf_counter()))
            finally:
                if copy.has_written:
                    self._machine.note_write(self._session_id)
            if is_done:
                self._machine.mark_staged(self._session_id, indices, now)
                self._current = None
            if not is_done or time.perf_counter() >= stop_at:
                return False

    def close(self) -> None:
        """Let go of what the copies are taken from. Idempotent."""
        self._current = None
        self._copies = iter(())
        if self._close is not None:
            self._close()


def job_from_buffer(machine: WeightMachine, command: Stage, now: float) -> StageJob:
    """A job over one shared buffer. Every entry is checked before the first byte moves.

    Raises `UpdateConflictError`, `WeightUpdateError` or `RequestError` naming what is wrong; nothing is held then.
    """
    session = machine.require(command.session_id)
    session.touch(now)
    moves = machine.moves(command.session_id, command.entries, command.buffer, are_right=False)
    places = [] if moves else _checked_places(session, command)
    moves = moves or machine.moves(command.session_id, command.entries, command.buffer, are_right=True)
    buffer = machine.open_buffer(command.buffer)

    def pieces() -> Iterator[StagePiece]:
        part = buffer.part
        for index, offset, size, start, is_last, replaces in places:
            yield StagePiece(index, part(offset, size), start, is_last, replaces)

    copies = _moved(session, command, moves(buffer)) if moves else machine.stage_pieces(command.session_id, pieces())
    return StageJob(machine, command.session_id, copies, command.call_id, command.deadline, buffer.close)


def _moved(session: OpenUpdate, command: Stage, copies: Copies) -> Copies:
    """Before the first byte moves: what commands ahead of this one have staged since it came is refused."""
    for entry in command.entries if session.staged.num_staged else ():
        session.staged.check(entry.index)
    yield from copies


def _checked_places(session: OpenUpdate, command: Stage) -> list[tuple[int, int, int, int | None, bool, bool]]:
    """Index, offset, size; start (None: it is whole), is_last, replaces: of every entry. Raises what is wrong."""
    places: list[tuple[int, int, int, int | None, bool, bool]] = []
    buffer_size = command.buffer.size
    for entry in command.entries:
        index, offset, start, size, replaces = entry.index, entry.offset, entry.start, entry.num_bytes, entry.replaces
        info = session.staged.check(index, replaces=replaces)
        total = info.num_bytes
        size = total - start if size is None else size
        if not (start >= 0 and 0 <= size <= total - start):
            raise WeightUpdateError(f"{info.name}: the piece at {start} is not inside it", field=info.name)
        if not 0 <= offset <= buffer_size - size:
            raise WeightUpdateError(f"{info.name} at offset {offset} is not inside its buffer", field=info.name)
        whole = size == total
        places.append((index, offset, size, None if whole else start, start + size == total, replaces and not start))
    if len({(entry.index, entry.start) for entry in command.entries}) != len(command.entries):
        raise WeightUpdateError("a tensor is named twice in one stage call", field="entries")
    return places


def job_from_payload(machine: WeightMachine, command: StagePayload, memory: SharedTensors, now: float) -> StageJob:
    """A job over memory that is open, and closed with it. Raises as `job_from_buffer`; it is closed then."""
    session_id, indices, replaced = command.session_id, command.indices, frozenset(command.replaced)
    try:
        for index in indices:
            machine.check_stage(session_id, index, now, replaces=index in replaced)
        if not len(memory.tensors) == len(indices) == len(set(indices)):
            raise WeightUpdateError(f"{len(memory.tensors)} tensors have {len(indices)} places", field="indices")
    except HeadraceError:
        memory.close()
        raise

    def copies() -> Copies:
        for index, (_, data) in zip(indices, tuple(memory.tensors), strict=True):
            yield (index,), machine.stage(session_id, index, data, replaces=index in replaced)

    return StageJob(machine, session_id, copies(), command.call_id, command.deadline, memory.close)


def job_from_group(machine: WeightMachine, command: Receive, group: WeightGroup, now: float) -> StageJob:
    """A job over what arrives at a group. Every entry is checked before anything is received for it.

    Raises as `job_from_buffer`; nothing is received then.
    """
    session = machine.require(command.session_id)
    taken = [each for each in command.tensors if each.index >= 0]
    for each in taken:
        info = machine.check_stage(command.session_id, each.index, now, replaces=each.replaces)
        if (info.name, info.shape, info.dtype) != (each.info.name, each.info.shape, each.info.dtype):
            announced, meant = (f"{of.name} {of.dtype} {list(of.shape)}" for of in (each.info, info))
            raise WeightUpdateError(f"{announced} is announced where the manifest has {meant}", field=each.info.name)
    if len({each.index for each in taken}) != len(taken):
        raise WeightUpdateError("a tensor is named twice in one call", field="names")
    session.touch(now)
    infos = [each.info for each in command.tensors]
    skipped = {place for place, each in enumerate(command.tensors) if each.index < 0}
    arrivals = group.receive(infos, command.packing, command.deadline - now, skipped)

    def copies() -> Copies:
        while not arrivals.is_complete:
            found = [(command.tensors[place], data) for place, data in arrivals.take(MOST_ARRIVALS)]
            if not found:
                yield None
                continue
            pieces = [StagePiece(each.index, data, None, True, each.replaces) for each, data in found]
            yield from machine.stage_arrived(command.session_id, pieces)
            arrivals.free()

    what = f"what {group.counted} brings"
    return StageJob(
        machine, command.session_id, copies(), command.call_id, command.deadline, arrivals.drop, what, is_fed=True
    )


def job_from_tensors(
    machine: WeightMachine, session_id: int, tensors: Iterator[tuple[str, Any]], folder: Path
) -> StageJob:
    """A job over (name, tensor) pairs that the core reads itself."""
    index_of = {info.name: index for index, info in enumerate(machine.require(session_id).staged.manifest)}

    def copies() -> Copies:
        for name, tensor in tensors:
            if name not in index_of:
                raise CheckpointError(f"{folder} changed while it was read: {name} is new", field=name)
            yield (index_of[name],), machine.stage(session_id, index_of[name], tensor)

    return StageJob(machine, session_id, copies(), None)
