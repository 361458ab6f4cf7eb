"""What a core has acknowledged, kept in the front for the day on which another core takes its place.

Owns the facts that outlive a core: whether its weights are still those of its checkpoint, their label and epoch,
whether it was paused, and what memory it had given back. What was asked for and not acknowledged counts against the
checkpoint, never for a new label.
"""

from __future__ import annotations

import msgspec

from headrace.config import Takeover
from headrace.types.memory import MEMORY_TAGS, MemoryTag
from headrace.types.messages import (
    Command,
    CommitUpdate,
    GiveUp,
    Pause,
    ReleaseMemory,
    Reply,
    Resume,
    ResumeMemory,
    SetVersion,
    UpdateFromDisk,
    WeightsChecker,
)
from headrace.types.weights import PauseMode, UpdateReport

_OfMemory = ReleaseMemory | ResumeMemory
_Change = CommitUpdate | UpdateFromDisk | SetVersion | WeightsChecker | _OfMemory | Pause | Resume | GiveUp
_OfWeights = CommitUpdate | UpdateFromDisk | SetVersion | WeightsChecker


class Landed(msgspec.Struct, frozen=True):
    """A whole update that is live, of that session, or with None of a folder."""

    session_id: int | None
    report: UpdateReport


class Ledger:
    """Fed with every command that is sent and every reply that comes, in order."""

    def __init__(self, version: str) -> None:
        self._pauses: dict[int, PauseMode] = {}  # by call, as the core keeps them
        self.released: set[MemoryTag] = set()
        self._version = version
        self._epoch = 0
        self._is_current = True
        self.landed: Landed | None = None
        """The last one, whether or not anybody waited for it."""
        self._open: dict[int, _Change] = {}

    @property
    def paused(self) -> PauseMode | None:
        return next(reversed(self._pauses.values()), None)

    def sent(self, command: Command) -> None:
        only_looks = isinstance(command, WeightsChecker) and command.action != "reset_tensors"
        if isinstance(command, _Change) and not only_looks:
            self._open[command.call_id] = command

    def answered(self, reply: Reply) -> None:
        """A command was done, or refused: then it has changed nothing."""
        command = self._open.pop(reply.call_id, None)
        if command is None or reply.error is not None:
            return
        if isinstance(command, Pause):
            self._pauses[command.call_id] = command.mode
        elif isinstance(command, Resume):
            self._pauses.clear()
        elif isinstance(command, ReleaseMemory):
            self.released.update(command.tags or MEMORY_TAGS)
        elif isinstance(command, ResumeMemory):
            self.released.difference_update(command.tags or MEMORY_TAGS)
        elif isinstance(command, GiveUp):
            self._pauses.pop(command.target, None)
        else:
            self._is_current = False
            if isinstance(command, SetVersion):
                self._version = command.version
            elif not isinstance(command, WeightsChecker):
                report = msgspec.msgpack.decode(reply.payload, type=UpdateReport)
                self._version, self._epoch = report.version, report.epoch
                self.landed = Landed(command.session_id if isinstance(command, CommitUpdate) else None, report)

    def bury(self) -> Takeover:
        """The core has died; what the next one is told. A commit without an answer may have been seen by requests."""
        num_unanswered = sum(isinstance(command, _OfWeights) for command in self._open.values())
        self._open.clear()
        if self._pauses:
            self._pauses = {0: next(reversed(self._pauses.values()))}
        self._is_current = self._is_current and not num_unanswered
        self._epoch += 1 + num_unanswered
        return Takeover(self._version, self._epoch, self._is_current)
