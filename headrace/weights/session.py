"""The weight transaction as a state machine: which weights are live, and what may be done to them next.

Owns a replica's weight state, version label, epoch, and the one open session with its deadline, and drives the memory
that they are of. Must not know tensors, the scheduler or the clock: callers pass `now` (monotonic seconds).

    READY ---begin--> UPDATING ---commit--> READY (epoch + 1)
      UPDATING ---abort or expiry, nothing written in place--> the state before begin
      UPDATING ---abort or expiry, after a write in place----> POISONED
    READY | POISONED ---lose--> NEEDS_WEIGHTS
    POISONED | NEEDS_WEIGHTS ---begin, complete manifests only--> UPDATING
    any without a session ---release--> RELEASED ---restore--> the state before it, or NEEDS_WEIGHTS
    UPDATING ---extend, of an open-ended session only--> UPDATING

A session has its whole manifest from the beginning, or is open-ended: then it is extended part by part, each checked
when it comes, and to be committed it has to have every tensor of the model, unless it is partial.

It is the only one: the memory of a replica (`headrace.weights.store`, on each of its ranks) does what it is told here
and knows no states. An error leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from headrace.types.errors import (
    DeadlineError,
    HeadraceError,
    NeedsWeightsError,
    PoisonedError,
    UpdateConflictError,
    WeightUpdateError,
    encodable,
)
from headrace.types.request import DEFAULT_VERSION
from headrace.types.weights import (
    MAX_TENSORS,
    MAX_VERSION_LENGTH,
    BufferEntry,
    BufferRef,
    DeviceRef,
    InFlight,
    TensorInfo,
    UpdateMode,
    UpdateReport,
    WeightState,
)
from headrace.weights.memory import Copies, ResolvedMode, StageBuffer, StageCopy, StagePiece, Ticket, WeightMemory
from headrace.weights.weight_map import why_headless

_MAX_NAMES_IN_MESSAGE = 8


class StagedSet:
    """Which tensors of a manifest have been staged, each exactly once since it was last forgotten."""

    def __init__(self, manifest: Sequence[TensorInfo]) -> None:
        self.manifest: list[TensorInfo] = []
        self.num_staged = 0
        self._is_staged = bytearray()
        self.extend(manifest)

    def extend(self, manifest: Sequence[TensorInfo]) -> None:
        """These are to be staged as well."""
        self.manifest += manifest
        self._is_staged += bytes(len(manifest))

    def check(self, index: int, *, replaces: bool = False) -> TensorInfo:
        """The entry at `index`. `WeightUpdateError` if there is none, or it was staged before and is not replaced."""
        if not 0 <= index < len(self.manifest):
            raise WeightUpdateError(
                f"tensor index {index} is not in the manifest of {len(self.manifest)}", field="index"
            )
        info = self.manifest[index]
        if self._is_staged[index] and not replaces:
            raise WeightUpdateError(f"{info.name} was staged twice", field=info.name)
        return info

    def mark(self, indices: Iterable[int]) -> None:
        """The tensors at `indices` are whole and checked. Raises as `check`."""
        is_staged, size = self._is_staged, len(self._is_staged)
        for index in indices:
            if not 0 <= index < size or is_staged[index]:
                self.check(index)
            is_staged[index] = 1
            self.num_staged += 1

    def forget(self, index: int) -> None:
        """The tensor at `index` has to come again, whether it has come or not."""
        self.num_staged -= self._is_staged[index]
        self._is_staged[index] = 0

    def missing(self) -> list[str]:
        """Names not staged yet, in manifest order."""
        return [info.name for info, staged in zip(self.manifest, self._is_staged, strict=True) if not staged]


class OpenUpdate:
    """One open update, as the core has it. `has_written` is True once live memory may have changed: in place, and in a
    commit; `committing` is that of one under way.

    Of one that `is_open_ended`, `num_missing` tensors of the model have not been named yet; it has to have all unless
    it is `partial`.
    """

    def __init__(
        self,
        session_id: int,
        version: str,
        manifest: Sequence[TensorInfo],
        mode: ResolvedMode,
        *,
        in_flight: InFlight,
        timeout_s: float,
        now: float,
        partial: bool = False,
        is_open_ended: bool = False,
        num_missing: int = 0,
    ) -> None:
        self.session_id = session_id
        self.version = version
        self.mode = mode
        self.in_flight: InFlight = in_flight
        self.timeout_s = timeout_s
        self.deadline = now + timeout_s
        self.is_partial = partial
        self.is_open_ended = is_open_ended
        self.num_missing = num_missing
        self.has_written = False
        self.committing: Ticket | None = None
        self.staged = StagedSet(manifest)

    @property
    def is_complete(self) -> bool:
        """Nothing is to come that it has named, or has to name."""
        has_named_all = self.is_partial or not self.num_missing
        return has_named_all and self.staged.num_staged == len(self.staged.manifest)

    def report(self, epoch: int, pause_ms: float, num_aborted: int) -> UpdateReport:
        """What is said of it once its weights are live."""
        manifest = self.staged.manifest
        num_bytes = sum(info.num_bytes for info in manifest)
        return UpdateReport(self.version, epoch, len(manifest), num_bytes, self.mode, pause_ms, num_aborted)

    def touch(self, now: float) -> None:
        """A command arrived: the deadline counts from it."""
        self.deadline = now + self.timeout_s

    def expired(self) -> DeadlineError:
        """Why it ends when nobody has touched it until its deadline."""
        message = f"session {self.session_id} was aborted {self.timeout_s:g} s after its last command"
        return DeadlineError(message, field="session_id")


class WeightMachine:
    """State, version and epoch of one replica's weights, and the session that may change them.

    state     "ready" | "updating" | "poisoned" | "needs_weights" | "released"
    version   label of the live weights; of the last whole ones while they are poisoned or lost
    epoch     bumped at every commit, even if the label repeats: what order and cache keys use
    session   the open session, or None
    """

    def __init__(
        self,
        memory: WeightMemory,
        version: str = DEFAULT_VERSION,
        *,
        epoch: int = 0,
        has_weights: bool = True,
        num_sessions: int = 0,
    ) -> None:
        check_version(version)
        self._memory = memory
        self.version = version
        self.epoch = epoch
        self.session: OpenUpdate | None = None
        self._resting: WeightState = "ready" if has_weights else "needs_weights"
        self._before_release: WeightState = self._resting
        self._num_sessions = num_sessions
        self._last_end: tuple[int, HeadraceError] | None = None

    @property
    def state(self) -> WeightState:
        return "updating" if self.session else self._resting

    @property
    def can_generate(self) -> bool:
        """True while live memory is one whole version: READY, or UPDATING from READY, nothing written in place."""
        return self._resting == "ready" and not (self.session and self.session.has_written)

    @property
    def live_version(self) -> str:
        """`version` while weights of that label are live, else "", which no label is."""
        return self.version if self.can_generate else ""

    def refusal(self, *, of_request: bool = False) -> HeadraceError | None:
        """What every request is answered with until a complete update lands; None while weights are whole, or will be
        when an update of whole ones is over, for which requests wait. They (`of_request`) wait for released memory too,
        but what asks for weights is answered with this."""
        if self._resting == "ready":
            return None
        if self._resting == "released":
            if of_request and not self.session:
                return None
            return NeedsWeightsError("the weights' memory is released; resume_memory_occupation(['weights']) first")
        message = "the engine holds no current weights; it generates after a complete update"
        if self.session:
            message = f"weights are {self._resting} until the update to {self.session.version!r} is complete"
        elif self._resting == "poisoned":
            message = "an update in place failed half-way; the engine generates again after a complete update"
        return PoisonedError(message) if self._resting == "poisoned" else NeedsWeightsError(message)

    def begin(
        self,
        version: str,
        manifest: Sequence[TensorInfo],
        mode: UpdateMode,
        *,
        now: float,
        timeout_s: float,
        in_flight: InFlight = "drain",
        partial: bool = False,
        is_open_ended: bool = False,
    ) -> OpenUpdate:
        """Open a session for a manifest that is right as a whole, or, if it `is_open_ended`, as far as it goes. Session
        ids are never reused.

        Raises `UpdateConflictError` if a session is open; `WeightUpdateError` for arguments that are wrong, a partial
        update of weights that are not whole, and what the memory refuses.
        """
        check_version(version)
        self.check_no_session()
        if partial and self._resting != "ready":
            raise WeightUpdateError(f"weights are {self._resting}: only a complete update is accepted", field="partial")
        if not timeout_s > 0:
            raise WeightUpdateError(f"timeout_s must be positive, got {timeout_s}", field="timeout_s")
        num_missing = 0
        if not is_open_ended:
            resolved = self._memory.begin(manifest, mode, partial)
        else:
            resolved = self._memory.begin_open(mode, partial)
            try:
                num_missing = self._memory.extend(manifest)
            except BaseException:  # whatever it is, no update is open then
                self._memory.abort()
                raise
        self._num_sessions += 1
        self.session = OpenUpdate(
            self._num_sessions,
            version,
            manifest,
            resolved,
            in_flight=in_flight,
            timeout_s=timeout_s,
            now=now,
            partial=partial,
            is_open_ended=is_open_ended,
            num_missing=num_missing,
        )
        return self.session

    def extend(self, session_id: int, manifest: Sequence[TensorInfo], now: float) -> int:
        """More tensors of an open-ended session; returns the index of the first. The deadline moves.

        `WeightUpdateError` for a session that is not, and for what the memory refuses: nothing has changed then.
        """
        session = self.require(session_id)
        session.touch(now)
        first = len(session.staged.manifest)
        if not session.is_open_ended:
            message = f"session {session_id} takes the tensors of its manifest only"
            raise WeightUpdateError(message, field="manifest")
        if first + len(manifest) > MAX_TENSORS:
            raise WeightUpdateError(f"an update has at most {MAX_TENSORS} tensors", field="manifest")
        session.num_missing = self._memory.extend(manifest)
        session.staged.extend(manifest)
        return first

    def missing(self) -> list[str]:
        """What the open session has still to be given before it is committed: named and not staged, or not named."""
        if self.session is None:
            return []
        lacks = self.session.num_missing and not self.session.is_partial
        return self.session.staged.missing() + (self._memory.missing() if lacks else [])

    def check_complete(self) -> None:
        """`WeightUpdateError` naming what the open session lacks."""
        session = self.session
        if session is None or (session.is_complete and not (session.is_open_ended and not session.staged.num_staged)):
            return
        names = self.missing() or ["an update of no tensors"]
        raise WeightUpdateError(f"not staged: {shortened(names)}{why_headless(names)}", field=names[0])

    def require(self, session_id: int) -> OpenUpdate:
        """The open session, if that is its id. Of the last one that ended, an error that says how; else
        `UpdateConflictError` saying which is open."""
        if self._last_end is not None and self._last_end[0] == session_id:
            end = self._last_end[1]
            raise type(end)(end.message, field=end.field)
        if self.session is None:
            raise UpdateConflictError(f"session {session_id} is not open; none is", field="session_id")
        if self.session.session_id != session_id:
            raise UpdateConflictError(
                f"session {session_id} is not open; session {self.session.session_id} is", field="session_id"
            )
        return self.session

    def check_stage(self, session_id: int, index: int, now: float, *, replaces: bool = False) -> TensorInfo:
        """The manifest entry about to be staged; the deadline moves. `WeightUpdateError` for a bad or doubled index."""
        session = self.require(session_id)
        session.touch(now)
        return session.staged.check(index, replaces=replaces)

    def stage(
        self, session_id: int, index: int, data: Any, start: int | None = None, *, replaces: bool = False
    ) -> StageCopy:
        """The copy of a tensor, or of its next piece (`start` is its first byte). `replaces` first forgets what was
        staged of it, and the tensor that it is tied to. Raises as `check_stage`, and what the memory refuses."""
        self._make_way(session_id, index, replaces)
        return self._memory.stage(index, data, start)

    def stage_pieces(self, session_id: int, pieces: Iterable[StagePiece]) -> Copies:
        """The copies of pieces, in their order, one by one or many together as the memory likes. Raises as `stage`."""

        def make_way() -> Iterator[StagePiece]:
            for piece in pieces:
                self._make_way(session_id, piece.index, piece.replaces)
                yield piece

        return self._memory.stage_pieces(make_way())

    def stage_arrived(self, session_id: int, tensors: Sequence[StagePiece]) -> Copies:
        """As `stage_pieces`, of whole tensors that a group has brought: each in the host's memory, or a tensor."""
        for each in tensors:
            self._make_way(session_id, each.index, each.replaces)
        return self._memory.stage_arrived(tensors)

    def moves(
        self, session_id: int, entries: Sequence[BufferEntry], ref: BufferRef | DeviceRef, *, are_right: bool
    ) -> Callable[[StageBuffer], Copies] | None:
        """The copies of what a command brings, as `stage_pieces`, once its buffer is open: where nothing has been
        staged, and all that it brings are whole tensors that the memory has only to move. Unless the entries
        `are_right`, that has to be known of an earlier command with the same; then they are."""
        session = self.require(session_id)
        if session.staged.num_staged or session.is_open_ended:
            return None
        return self._memory.moves(entries, ref, are_right=are_right)

    def open_buffer(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        """What a stage command's bytes are in. Raises `RequestError` or `UnavailableError` if it is not to be had."""
        return self._memory.open_buffer(ref)

    def _make_way(self, session_id: int, index: int, replaces: bool) -> None:
        """Forget what was staged of a tensor that is replaced; `WeightUpdateError` if one that is not was staged."""
        session = self.require(session_id)
        for each in self._memory.forget(index) if replaces else ():
            session.staged.forget(each)
        session.staged.check(index)

    def note_write(self, session_id: int) -> None:
        """A copy has written: in place, live memory is no longer whole from here on."""
        session = self.require(session_id)
        session.has_written = session.has_written or session.mode == "inplace"

    def mark_staged(self, session_id: int, indices: Iterable[int], now: float) -> None:
        """The tensors at `indices` are whole. Raises as `check_stage`."""
        session = self.require(session_id)
        session.touch(now)
        session.staged.mark(indices)

    def commit(self, session_id: int) -> bool:
        """Make the staged weights live: READY, new version, new epoch. False while the memory is at it: ask again.

        `WeightUpdateError` naming what is missing, and the session stays open then. It does as well where the memory
        fails half-way: abort it.
        """
        session = self.require(session_id)
        if session.committing is None:
            self.check_complete()
            session.has_written = True  # a copy that fails half-way leaves a mix
            session.committing = self._memory.commit()
        if not session.committing.is_done():
            return False
        self.version, self.epoch = session.version, self.epoch + 1
        self._resting, self.session = "ready", None
        committed = UpdateConflictError(f"session {session_id} was committed", field="session_id")
        self._last_end = session_id, committed
        return True

    def abort(self, session_id: int, reason: HeadraceError | None = None) -> OpenUpdate:
        """Drop the session: back to the state before it, or POISONED if it had written in place. `reason` is what who
        names the session later gets."""
        session = self.require(session_id)
        self._memory.abort()
        self._resting = "poisoned" if session.has_written else self._resting
        self.session = None
        aborted = UpdateConflictError(f"session {session_id} was aborted", field="session_id")
        self._last_end = session_id, reason or aborted
        return session

    def relabel(self, version: str) -> None:
        """Change the label of the live weights only: same epoch, no state change."""
        check_version(version)
        self.version = version

    def lose(self) -> None:
        """Live memory holds no weights any more (released, overwritten). `UpdateConflictError` in an open session."""
        self.check_no_session()
        self._resting = "needs_weights"

    def release(self) -> None:
        """The memory of live weights is given back. `UpdateConflictError` in an open session."""
        self.check_no_session()
        self._before_release, self._resting = self._resting, "released"

    def restore(self, *, has_values: bool) -> None:
        """That memory is there again, with what it held or with nothing. The version and epoch are the same."""
        assert self._resting == "released"
        self._resting = self._before_release if has_values else "needs_weights"

    def check_no_session(self) -> None:
        """`UpdateConflictError` while one is open, and while none can be: live weights have no memory."""
        if self._resting == "released":
            message = "the weights' memory is released: resume_memory_occupation(['weights']) first"
            raise UpdateConflictError(message, field="tags")
        if self.session:
            message = f"session {self.session.session_id} is open; commit or abort it first"
            if self.session.is_open_ended:
                message = (
                    f"session {self.session.session_id} takes tensors as they come and is not complete "
                    f"(not staged: {shortened(self.missing())}); send the rest, or end it by abort_update"
                )
            raise UpdateConflictError(message, field="session_id")


def shortened(names: Sequence[str]) -> str:
    """Names in a message, the first few of many."""
    rest = len(names) - _MAX_NAMES_IN_MESSAGE
    return ", ".join(names[:_MAX_NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")


def check_version(version: str) -> None:
    """`WeightUpdateError` unless the label is a string of 1 to 1024 characters that every reply can hold."""
    if not isinstance(version, str) or not 0 < len(version) <= MAX_VERSION_LENGTH or version != encodable(version):
        message = f"version must be a string of 1 to {MAX_VERSION_LENGTH} Unicode characters"
        raise WeightUpdateError(message, field="version")
