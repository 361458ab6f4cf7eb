"""Copies of staged tensors, taken a slice at a time between steps. Owns one Stage command's progress and its buffer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.types.errors import CheckpointError, WeightUpdateError
from headrace.types.messages import NO_DEADLINE, Stage
from headrace.weights.memory import Copies, StageBuffer, StageCopy, StagePiece
from headrace.weights.session import WeightMachine


class StageJob:
    """Tensors on their way into a session. `call_id` is the call to answer then; None: the core reads a folder.

    `copies` are the indices of the tensors that a copy completes, none for a piece before its last one, and the copy;
    `buffer` is what they are taken from.
    """

    def __init__(
        self,
        machine: WeightMachine,
        session_id: int,
        copies: Copies,
        call_id: int | None,
        deadline: float = NO_DEADLINE,
        buffer: StageBuffer | None = None,
    ) -> None:
        self.call_id = call_id
        self.deadline = deadline
        self._machine = machine
        self._session_id = session_id
        self._copies = copies
        self._current: tuple[Sequence[int], StageCopy] | None = None
        self._buffer = buffer

    def advance(self, budget_s: float, now: float) -> bool:
        """Copy for about `budget_s` seconds, at least one block. True when all of it is staged.

        Raises a `HeadraceError` when a tensor is not what the manifest says; the job is over then.
        """
        stop_at = time.perf_counter() + budget_s
        while True:
            if self._current is None:
                self._current = next(self._copies, None)
                if self._current is None:
                    return True
            indices, copy = self._current
            try:
                is_done = copy.advance(max(0.0, stop_at - time.perf_counter()))
            finally:
                if copy.has_written:
                    self._machine.note_write(self._session_id)
            if is_done:
                self._machine.require(self._session_id).touch(now)
                for index in indices:
                    self._machine.mark_staged(self._session_id, index, now)
                self._current = None
            if not is_done or time.perf_counter() >= stop_at:
                return False

    def close(self) -> None:
        """Let go of the buffer. Idempotent."""
        self._current = None
        self._copies = iter(())
        if self._buffer is not None:
            self._buffer.close()


def job_from_buffer(machine: WeightMachine, command: Stage, now: float) -> StageJob:
    """A job over one shared buffer. Every entry is checked before the first byte moves.

    Raises `UpdateConflictError`, `WeightUpdateError` or `RequestError` naming what is wrong; nothing is held then.
    """
    staged = machine.require(command.session_id).staged
    sizes: list[int] = []
    for entry in command.entries:
        info = machine.check_stage(command.session_id, entry.index, now, replaces=entry.replaces)
        total = info.num_bytes
        size = total - entry.start if entry.num_bytes is None else entry.num_bytes
        if not (entry.start >= 0 and 0 <= size <= total - entry.start):
            raise WeightUpdateError(f"{info.name}: the piece at {entry.start} is not inside it", field=info.name)
        if not 0 <= entry.offset <= command.buffer.size - size:
            raise WeightUpdateError(f"{info.name} at offset {entry.offset} is not inside its buffer", field=info.name)
        sizes.append(size)
    if len({(entry.index, entry.start) for entry in command.entries}) != len(command.entries):
        raise WeightUpdateError("a tensor is named twice in one stage call", field="entries")
    buffer = machine.open_buffer(command.buffer)

    def pieces() -> Iterator[StagePiece]:
        for entry, size in zip(command.entries, sizes, strict=True):
            total = staged.manifest[entry.index].num_bytes
            start, is_last = None if size == total else entry.start, entry.start + size == total
            data, replaces = buffer.part(entry.offset, size), entry.replaces and not entry.start
            yield StagePiece(entry.index, data, start, is_last, replaces)

    copies = machine.stage_pieces(command.session_id, pieces())
    return StageJob(machine, command.session_id, copies, command.call_id, command.deadline, buffer)


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
