"""Weight updates on one replica: when bytes may move, when generation holds still, and when weights change.

Owns the open session's jobs, its pending commit and the hold on generation. The rules of the transaction, and the
memory's part in it, are `headrace.weights.session`.

    IDLE ---begin--> FILLING                    IDLE ---from disk--> LOOKING ---manifest--> FILLING
    FILLING ---a hold is needed--> DRAINING (if that is the policy) ---nothing runs--> HOLDING ---> COMMITTING ---> IDLE
    FILLING | HOLDING ---extend, of an open-ended session--> the same
    any but COMMITTING ---abort, expiry--> IDLE

A shadow session needs a hold only to commit. An in-place session needs it from the first staged byte to its end. Before
a hold begins the requests in flight are treated as the session asks (`in_flight`). While generation is paused, or lacks
memory, the hold begins at once: nothing can drain then, so "drain" treats what was kept as "keep" does. While an
open-ended session lacks tensors a pause does not end.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path

from headrace.core.executor import Executor
from headrace.core.faults import FAULTS, failure
from headrace.core.outbox import Outbox
from headrace.core.staging import StageJob, job_from_tensors
from headrace.core.stepping import Stepper
from headrace.core.update_phase import COMMIT_LOOK_S, LET_GO_S, Hold, PendingCall, UpdatePhase
from headrace.scheduler import Scheduler
from headrace.types.errors import DeadlineError, HeadraceError, UpdateConflictError
from headrace.types.messages import NO_DEADLINE, BeginUpdate, CommitUpdate, ExtendUpdate, UpdateFromDisk
from headrace.types.weights import InFlight, TensorInfo, UpdateBegun, UpdateExtended
from headrace.weights.session import OpenUpdate, WeightMachine, check_version, shortened

logger = logging.getLogger(__name__)


class UpdateControl:
    """The weight updates of one replica; at most one session is open."""

    def __init__(
        self,
        machine: WeightMachine,
        executor: Executor,
        scheduler: Scheduler,
        stepper: Stepper,
        outbox: Outbox,
        stands_still: Callable[[], bool],
        first_stamp: int = 0,
    ) -> None:
        """`stands_still`: generation is paused, or lacks memory, so that nothing can drain. No other core has
        `first_stamp`."""
        self.machine = machine
        self.num_updates = 0
        self.last_pause_ms = 0.0
        self.num_staged_steps = 0
        self._executor = executor
        self._scheduler = scheduler
        self._stepper = stepper
        self._outbox = outbox
        self._stands_still = stands_still
        self.live_stamp = first_stamp
        self._looking: tuple[PendingCall, Generator[None]] | None = None  # through a folder, for this call
        self._opening_call = 0  # that opened the session: whoever gives it up has no session
        self._jobs: deque[StageJob] = deque()
        self._commit: PendingCall | None = None
        self._hold: Hold | None = None
        self._steps_at_first_stage: int | None = None
        self._lets_go = False  # of memory that the last session was staged from

    # What the step loop and readers of weights ask. `live_stamp` is another number after live memory was written.

    @property
    def is_quiet(self) -> bool:
        """Nothing is to be done between steps, for what is over either."""
        return self.phase is UpdatePhase.IDLE and not self._lets_go

    @property
    def phase(self) -> UpdatePhase:
        session = self.machine.session
        if session is None:
            return UpdatePhase.IDLE if self._looking is None else UpdatePhase.LOOKING
        if self._hold is not None:
            return UpdatePhase.HOLDING if session.committing is None else UpdatePhase.COMMITTING
        drains = self._needs_hold(session) and self._policy(session) == "drain"
        return UpdatePhase.DRAINING if drains else UpdatePhase.FILLING

    def check_readable(self) -> None:
        """`UpdateConflictError` while live weights are being written: nobody could say what was read. There is nothing
        to read while they are released: `NeedsWeightsError`."""
        session = self.machine.session
        if self.machine.state == "released" and (refusal := self.machine.refusal()) is not None:
            raise refusal
        if session is not None and session.mode == "inplace" and session.has_written:
            message = f"session {session.session_id} is writing live weights in place; read them when it is over"
            raise UpdateConflictError(message, field="session_id")

    def check_whole(self) -> None:
        """Also `NeedsWeightsError` or `PoisonedError` until a complete update lands: what was read then would pass for
        the weights of a label, and a label for weights, that are not there."""
        self.check_readable()
        refusal = self.machine.refusal()
        if refusal is not None:
            raise refusal

    def check_idle(self) -> None:
        """`UpdateConflictError` unless an update could begin: none has, and weights have memory."""
        self.machine.check_no_session()
        if self._looking is not None:
            raise UpdateConflictError("an update from a folder has begun; abort it first", field="session_id")

    @property
    def holder(self) -> str:
        """The session for whose sake no step may run, in words; "" where there is none."""
        return "" if self._hold is None else self._hold.who

    @property
    def is_draining(self) -> bool:
        """Started requests run to their end before the hold begins; no new one starts."""
        return self.phase is UpdatePhase.DRAINING

    # Commands. Errors leave everything as it was.

    def begin(self, command: BeginUpdate, now: float) -> UpdateBegun:
        """Open a session for a manifest that is right as a whole."""
        self.check_idle()
        session = self._open(command, command.manifest, command.timeout_s, now)
        self._opening_call = command.call_id
        return UpdateBegun(session.session_id, session.mode)

    def extend(self, command: ExtendUpdate, now: float) -> UpdateExtended:
        """More tensors for an open-ended session."""
        self._require_no_commit(command.session_id)
        first = self.machine.extend(command.session_id, command.manifest, now)
        return UpdateExtended(first, self.machine.require(command.session_id).num_missing)

    def stage(self, session_id: int, job: Callable[[WeightMachine], StageJob]) -> None:
        """Queue the copies that a command brings; it is answered when all of them are in place."""
        self._require_no_commit(session_id)
        self._queue(job(self.machine))

    def commit(self, command: CommitUpdate, now: float) -> None:
        """Ask for the commit; it is answered when the weights are live."""
        self._require_no_commit(command.session_id)
        session = self.machine.require(command.session_id)
        session.touch(now)
        if not self._jobs:
            self.machine.check_complete()
        if command.version:
            check_version(command.version)
        self._commit = PendingCall(command.call_id, command.deadline, command.version)

    def abort(self, session_id: int | None) -> None:
        """Drop the session, or with None whichever is open, and answer whatever waits for it."""
        self._finish_commit()
        session = self.machine.session if session_id is None else self.machine.require(session_id)
        if session is not None:
            self._abort(UpdateConflictError(f"session {session.session_id} was aborted"))
        self._stop_looking(UpdateConflictError("the update was aborted"))

    def give_up(self, call_id: int, error: HeadraceError) -> None:
        """Leave nothing of a call that reads a folder, stages, commits, or opened the session."""
        self._finish_commit()
        if self._looking is not None and call_id == self._looking[0].call_id:
            self._stop_looking(error)
        for job in [job for job in self._jobs if job.call_id == call_id]:
            self._drop_job(job, error)
        commit_call = None if self._commit is None else self._commit.call_id
        if self.machine.session is not None and call_id in (commit_call, self._opening_call):
            self._abort(error)

    def from_disk(self, command: UpdateFromDisk, now: float) -> None:
        """A whole session over a checkpoint folder; answered when the weights are live."""
        self.check_idle()
        self._looking = PendingCall(command.call_id, command.deadline), self._look_through(command, now)

    def check_resume(self) -> None:
        """`UpdateConflictError` while live weights are half overwritten: resuming could not mean anything yet; and
        while an open-ended session lacks tensors, whose sender takes its update for done."""
        session = self.machine.session
        if session is None or self._commit is not None:
            return
        if session.has_written or (session.is_open_ended and not session.is_complete):
            missing, writes = self.machine.missing(), " and writes in place" if session.has_written else ""
            named = f"; not staged yet: {shortened(missing)}" if missing else ""
            message = f"session {session.session_id} is open{writes}{named}; abort_update ends it"
            raise UpdateConflictError(message, field="session_id")

    def check_drain(self) -> None:
        """`UpdateConflictError` while a session holds requests and waits for its sender, who may be the one to ask."""
        if self.holder and not (self._jobs or self._commit) and self._scheduler.num_started:
            raise UpdateConflictError(f"{self.holder} holds requests in flight: commit or abort it first", field="mode")

    def lose_weights(self, seed: int) -> None:
        """Overwrite live weights with noise. Every request is answered; none is served until an update lands."""
        self.check_idle()
        self.machine.lose()
        self.live_stamp += 1
        self._stepper.settle()
        self._executor.weights.scramble(seed)
        self._fail_requests(logging.INFO)  # as it was asked for: a trainer's first weights come next

    # Between steps.

    def advance(self, budget_s: float, now: float) -> bool:
        """Look through a folder or move staged bytes for about `budget_s` seconds, or begin the hold, or commit. True
        when it did something."""
        session = self.machine.session
        if session is None:
            if self._looking is not None:
                return self._look(self._looking[1], budget_s)
            self._lets_go = self._lets_go and self._executor.weights.let_go(min(budget_s, LET_GO_S))
            return self._lets_go
        if self._commit is not None and not self._jobs and not self._is_complete(session, self._commit):
            return True
        if self._hold is None and self._needs_hold(session) and not self._begin_hold(session):
            return False
        if self._jobs:
            job = self._jobs[0]
            self._advance_job(job, budget_s, now)
            return not job.look_s
        if self._commit is not None:
            self._make_live(session, self._commit)
            return True
        return False

    def expire(self, now: float) -> None:
        """Undo what was not done by its deadline: an upload is dropped; a commit, and its session, and one that nobody
        has touched for its time, are aborted."""
        if self._looking is not None and now >= self._looking[0].deadline:
            self._stop_looking(DeadlineError("weights were not live by the deadline; the folder is not read"))
        for job in [job for job in self._jobs if now >= job.deadline]:
            self._drop_job(job, DeadlineError(f"{job.what} was not staged by the deadline; it is dropped"))
        session = self.machine.session
        if session is None or self.phase is UpdatePhase.COMMITTING:
            return
        if self._commit is not None and now >= self._commit.deadline:
            message = f"weights were not live by the deadline; session {session.session_id} is aborted"
            self._abort(DeadlineError(message))
        elif now >= session.deadline:
            logger.warning("session %d outlived its %g s", session.session_id, session.timeout_s)
            self._abort(session.expired(), has_expired=True)

    @property
    def deadline(self) -> float | None:
        """When something of the update is undone."""
        if self.machine.session is None:
            return None if self._looking is None else self._looking[0].deadline
        commit = NO_DEADLINE if self._commit is None else self._commit.deadline
        return min(self.machine.session.deadline, commit, *(job.deadline for job in self._jobs))

    @property
    def look_s(self) -> float:
        """Seconds until the next look at tensors that come from a thread of this process, or at their copies, of which
        nobody will tell; 0: there are none."""
        return min((job.look_s for job in self._jobs if job.look_s), default=0.0)

    @property
    def num_steps_while_staging(self) -> int:
        """Steps completed between the first staged byte and the commit or abort, over all sessions."""
        current = 0 if self._steps_at_first_stage is None else self._stepper.num_completed - self._steps_at_first_stage
        return self.num_staged_steps + current

    def close(self) -> None:
        """Let go of shared buffers, without touching weights: the core is ending."""
        for job in self._jobs:
            job.close()
        self._jobs.clear()

    def end(self, reason: HeadraceError) -> None:
        """Answer what waits for an update; weights stay as they are."""
        self._finish_commit()
        self._stop_looking(reason)
        waiting = [job.call_id for job in self._jobs if job.call_id is not None]
        waiting += [self._commit.call_id] if self._commit is not None else []
        self.close()
        self._commit = None
        for call_id in waiting:
            self._outbox.refuse(call_id, reason.info())

    # Inside.

    def _open(
        self, command: BeginUpdate | UpdateFromDisk, manifest: tuple[TensorInfo, ...], timeout_s: float, now: float
    ) -> OpenUpdate:
        return self.machine.begin(
            command.version,
            manifest,
            command.mode,
            now=now,
            timeout_s=timeout_s,
            in_flight=command.in_flight,
            partial=isinstance(command, BeginUpdate) and command.partial,
            is_open_ended=isinstance(command, BeginUpdate) and command.is_open,
        )

    def _require_no_commit(self, session_id: int) -> None:
        self.machine.require(session_id)
        if self._commit is not None:
            raise UpdateConflictError(f"session {session_id} is being committed", field="session_id")

    def _look_through(self, command: UpdateFromDisk, now: float) -> Generator[None]:
        """Find out what a folder holds; then open a session for it, in which all of it is staged and committed."""
        folder, root = Path(command.path), Path(command.root) if command.root else None
        manifest, tensors = yield from self._executor.checkpoint(folder, root)
        session = self._open(command, tuple(manifest), command.deadline - now, now)
        self._queue(job_from_tensors(self.machine, session.session_id, tensors, folder))
        self._commit, self._looking = PendingCall(command.call_id, command.deadline), None

    def _look(self, slices: Generator[None], budget_s: float) -> bool:
        stop_at = time.perf_counter() + budget_s
        try:
            while self._looking is not None:
                next(slices, None)
                if time.perf_counter() >= stop_at:
                    break
        except HeadraceError as error:
            self._stop_looking(error)
        except FAULTS as fault:
            self._executor.examine(fault)
            self._stop_looking(failure("reading a folder", fault))
        return True

    def _stop_looking(self, reason: HeadraceError) -> None:
        if self._looking is not None:
            (call, slices), self._looking = self._looking, None
            slices.close()
            self._outbox.refuse(call.call_id, reason.info())

    def _queue(self, job: StageJob) -> None:
        self._jobs.append(job)
        if self._steps_at_first_stage is None:
            self._steps_at_first_stage = self._stepper.num_completed

    def _needs_hold(self, session: OpenUpdate) -> bool:
        if session.mode == "inplace":
            return bool(self._jobs) or self._commit is not None
        return self._commit is not None and not self._jobs

    def _policy(self, session: OpenUpdate) -> InFlight:
        return "keep" if session.in_flight == "drain" and self._stands_still() else session.in_flight

    def _begin_hold(self, session: OpenUpdate) -> bool:
        """Stop generation as the policy says. False while requests still drain."""
        policy = self._policy(session)
        if policy == "drain" and self._scheduler.num_started:
            return False
        aborted = self._scheduler.abort(None, "Aborted by a weight update") if policy == "abort" else []
        self._outbox.add(aborted)
        self._stepper.settle()
        num_aborted, who = sum(delta.finish is not None for delta in aborted), f"session {session.session_id}"
        self._hold = Hold(policy, time.perf_counter(), num_aborted, who)
        return True

    def _is_complete(self, session: OpenUpdate, commit: PendingCall) -> bool:
        """Whether the commit may go on; if not, its call is answered and the session stays open."""
        try:
            self.machine.check_complete()
        except HeadraceError as error:
            self._commit = None
            self._outbox.refuse(commit.call_id, error.info())
            return False
        return True

    def _advance_job(self, job: StageJob, budget_s: float, now: float) -> None:
        try:
            if not job.advance(budget_s, now):
                self._jobs.rotate(-1 if job.is_waiting else 0)  # another may have something
                return
        except HeadraceError as error:
            self._fail_job(job, error)
            return
        except FAULTS as fault:
            self._executor.examine(fault)
            self._fail_job(job, failure("staging", fault))
            return
        self._jobs.popleft()
        job.close()
        if job.call_id is not None:
            self._outbox.reply(job.call_id)

    def _fail_job(self, job: StageJob, error: HeadraceError) -> None:
        if job.call_id is None:  # the core's own reading of a folder: the whole update is one call
            self._abort(error)
        else:
            self._drop_job(job, error)

    def _drop_job(self, job: StageJob, error: HeadraceError) -> None:
        """Forget an upload, whatever of it was copied; the session stays open."""
        assert job.call_id is not None
        self._jobs.remove(job)
        job.close()
        self._outbox.refuse(job.call_id, error.info())

    def _finish_commit(self) -> None:
        """What the device has begun cannot be undone, and takes no longer than a copy."""
        while (session := self.machine.session) is not None and session.committing is not None:
            assert self._commit is not None
            self._make_live(session, self._commit)
            time.sleep(COMMIT_LOOK_S)

    def _make_live(self, session: OpenUpdate, commit: PendingCall) -> None:
        """Begin the copy over live weights, or look whether it is done. Generation is held until then."""
        assert self._hold is not None
        hold = self._hold
        if session.committing is None:
            if hold.policy == "recompute":
                self._scheduler.recompute_running()
            self.live_stamp += 1
            session.version = commit.version or session.version
        try:
            if not self.machine.commit(session.session_id):
                return
        except FAULTS as fault:
            self._executor.examine(fault)
            self._abort(failure("the commit", fault))
            return
        self._scheduler.set_weights(self.machine.version, self.machine.epoch)
        self.num_updates += 1
        self.last_pause_ms = (time.perf_counter() - hold.since) * 1000.0
        self._commit = None
        self._end_session()
        self._outbox.reply(commit.call_id, session.report(self.machine.epoch, self.last_pause_ms, hold.num_aborted))
        logger.debug("weights %r live, epoch %d", session.version, self.machine.epoch)

    def _abort(self, reason: HeadraceError, *, has_expired: bool = False) -> None:
        """End the open session without a commit; waiting calls are answered with `reason`, and later ones of a session
        that `has_expired`."""
        assert self.machine.session is not None
        self.live_stamp += self.machine.session.has_written
        self.machine.abort(self.machine.session.session_id, reason if has_expired else None)
        self._end_session()
        self._fail_requests(logging.ERROR)
        self.end(reason)

    def _end_session(self) -> None:
        self._lets_go = True
        self._opening_call = 0
        self.num_staged_steps = self.num_steps_while_staging
        self._steps_at_first_stage = None
        self._hold = None

    def _fail_requests(self, level: int) -> None:
        """Answer every request if the weights cannot serve any, which is logged at `level`."""
        refusal = self.machine.refusal()
        if refusal is not None:
            self._outbox.add(self._scheduler.fail(None, refusal.info()))
            logger.log(level, "weights are %s: %s", self.machine.state, refusal.message)
