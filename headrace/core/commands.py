"""One function per command. Owns what each command means to a replica; a command is applied between two steps.

A function raises a `HeadraceError` to refuse a command: `apply_command` answers the call with it. A call whose deadline
has passed, or whose caller has given it up, is not begun.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection
from typing import Any

from headrace.core.faults import FAULTS, failure
from headrace.core.replica import Replica
from headrace.core.staging import StageJob, job_from_buffer, job_from_group, job_from_payload
from headrace.core.update_phase import UpdatePhase
from headrace.ipc import Phase
from headrace.types.errors import (
    DeadlineError,
    HeadraceError,
    InternalError,
    RequestError,
    ShutdownError,
    UpdateConflictError,
)
from headrace.types.handles import front_of, own_handles
from headrace.types.messages import (
    NO_DEADLINE,
    Abort,
    AbortUpdate,
    BeginUpdate,
    Command,
    CommitUpdate,
    CoreStatus,
    DescribeWeights,
    Digest,
    Discard,
    ExtendUpdate,
    Finished,
    FlushCache,
    FreezeGc,
    GetStatus,
    GetWeight,
    GiveUp,
    JoinGroup,
    LeaveGroup,
    Pause,
    Profile,
    Receive,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    SetVersion,
    Shutdown,
    SlowDown,
    Stage,
    StagePayload,
    Submit,
    UpdateFromDisk,
    WeightsChecker,
)
from headrace.types.request import Delta
from headrace.weights.session import WeightMachine

logger = logging.getLogger(__name__)

_SCRAMBLE_SALT = 0x5EED_0FF5_5EED_0FF5


def apply_command(
    replica: Replica, command: Command, front: int, clock: Callable[[], float], given_up: Collection[int] = ()
) -> None:
    """Apply one command of a front, which reaches no request of another. Every call is answered once, now or when it is
    done; those of the ids `given_up` are refused.

    `clock` is the loop's, and that of the deadlines.
    """
    if isinstance(command, Submit):
        submit(replica, command, front, clock())
    elif isinstance(command, Abort):
        replica.outbox.add(replica.scheduler.abort(own_handles(command.handles, front), command.message))
    elif isinstance(command, Finished):
        replica.scheduler.discard(own_handles(command.handles, front))
    else:
        replica.pulse.claim(command.call_id)  # before a look at the clock: the front looks in the opposite order
        now = clock()
        if not isinstance(command, (GiveUp, GetStatus, Shutdown)) and command.wants_status:
            replica.outbox.add_status(command.call_id, lambda: status(replica, clock()))
        try:
            _check_wanted(command, now, given_up)
            _CALLS[type(command)](replica, command, now)
        except HeadraceError as error:
            if isinstance(command, Receive):
                replica.groups.skip(command, clock())  # it is sent all the same
            replica.outbox.refuse(command.call_id, error.info())
        except FAULTS as fault:
            replica.executor.examine(fault)
            replica.outbox.refuse(command.call_id, failure(type(command).__name__, fault).info())


def _check_wanted(command: Command, now: float, given_up: Collection[int]) -> None:
    """`DeadlineError` if nobody waits for the command any more."""
    name = type(command).__name__
    if now >= getattr(command, "deadline", NO_DEADLINE):
        raise DeadlineError(f"{name} came too late to the core and was not begun")
    if getattr(command, "call_id", 0) in given_up:
        raise DeadlineError(f"{name} was given up before it was begun")


def submit(replica: Replica, command: Submit, front: int, now: float) -> None:
    """Queue requests; what cannot be served is answered at once. While weights are released all wait for them."""
    refusal = replica.update.machine.refusal(of_request=True)
    for request in command.all_requests():
        if front_of(request.handle) != front:  # an answer would reach whoever has that handle
            logger.error("front %d sent a request under handle %d, which is not its own", front, request.handle)
            continue
        try:
            if refusal is not None:
                raise refusal
            replica.scheduler.add(request, now)
        except HeadraceError as error:
            replica.outbox.add([Delta.failed(request.handle, error.info())])
        except FAULTS as fault:
            logger.exception("request %s was not taken", request.request_id)
            refused = InternalError(f"the request was not taken: {type(fault).__name__}: {fault}")
            replica.outbox.add([Delta.failed(request.handle, refused.info())])


def pause(replica: Replica, command: Pause, now: float) -> None:
    """Stop stepping; `PauseControl` answers when the mode's promise holds."""
    if command.mode == "drain":
        replica.update.check_drain()
    replica.pause.pause(command.call_id, command.mode, command.deadline)


def resume(replica: Replica, command: Resume, now: float) -> None:
    """Go on stepping, unless live weights are half written."""
    replica.update.check_resume()
    replica.pause.resume()
    replica.outbox.reply(command.call_id)


def give_up(replica: Replica, command: GiveUp, now: float) -> None:
    """Leave nothing of a call, if it waits, has paused or has opened a session."""
    error = DeadlineError("the caller gave this up")
    replica.pause.give_up(command.target, error)
    replica.update.give_up(command.target, error)
    replica.reading.give_up(command.target, error)
    replica.memory.give_up(command.target, error)
    replica.groups.give_up(command.target, error)
    replica.outbox.reply(command.call_id)


def begin_update(replica: Replica, command: BeginUpdate, now: float) -> None:
    """Open a session."""
    replica.outbox.reply(command.call_id, replica.update.begin(command, now))


def extend_update(replica: Replica, command: ExtendUpdate, now: float) -> None:
    """Name more tensors of an open-ended session."""
    replica.outbox.reply(command.call_id, replica.update.extend(command, now))


def stage(replica: Replica, command: Stage, now: float) -> None:
    """Queue an upload; answered when it is copied."""
    replica.update.stage(command.session_id, lambda machine: job_from_buffer(machine, command, now))


def stage_payload(replica: Replica, command: StagePayload, now: float) -> None:
    """Queue what another engine's client shares; answered when it is copied."""

    def job(machine: WeightMachine) -> StageJob:
        return job_from_payload(machine, command, replica.executor.weights.open_payload(command.payload), now)

    replica.update.stage(command.session_id, job)


def commit_update(replica: Replica, command: CommitUpdate, now: float) -> None:
    """Ask for the commit; answered when it is done."""
    replica.update.commit(command, now)


def abort_update(replica: Replica, command: AbortUpdate, now: float) -> None:
    """Drop the session."""
    replica.update.abort(command.session_id)
    replica.outbox.reply(command.call_id)


def join_group(replica: Replica, command: JoinGroup, now: float) -> None:
    """Become part of a trainer's group; answered when all its ranks are there."""
    replica.groups.join(command, now)


def leave_group(replica: Replica, command: LeaveGroup, now: float) -> None:
    """Leave a group."""
    replica.groups.leave(command.name)
    replica.outbox.reply(command.call_id)


def receive(replica: Replica, command: Receive, now: float) -> None:
    """Stage what arrives at a group; answered when it is copied."""
    group = replica.groups.require(command.group)
    replica.update.stage(command.session_id, lambda machine: job_from_group(machine, command, group, now))


def discard(replica: Replica, command: Discard, now: float) -> None:
    """Receive what nobody takes."""
    replica.groups.discard(command)
    replica.outbox.reply(command.call_id)


def update_from_disk(replica: Replica, command: UpdateFromDisk, now: float) -> None:
    """A whole update from a folder; answered when it is live."""
    replica.update.from_disk(command, now)


def set_version(replica: Replica, command: SetVersion, now: float) -> None:
    """Relabel the live weights."""
    replica.update.check_whole()
    if command.epoch not in (None, replica.update.machine.epoch):
        raise UpdateConflictError("the weights that were to have this label are live no more", field="version")
    replica.update.machine.relabel(command.version)
    replica.scheduler.relabel(command.version)
    replica.outbox.reply(command.call_id)


def get_weight(replica: Replica, command: GetWeight, now: float) -> None:
    """Read a part of one live tensor back; answered when it is in the caller's buffer."""
    replica.reading.copy(command)


def digest(replica: Replica, command: Digest, now: float) -> None:
    """Digest live memory; answered when all of it was read."""
    if command.by_rank:
        replica.reading.digest_ranks(command.call_id, command.deadline)
    else:
        replica.reading.digest(command.call_id, command.deadline, dict)


def describe_weights(replica: Replica, command: DescribeWeights, now: float) -> None:
    """Digest live memory and say what it holds; answered when all of it was read."""
    replica.reading.describe(command.call_id, command.deadline)


def weights_checker(replica: Replica, command: WeightsChecker, now: float) -> None:
    """SGLang's three-step check that an update writes every tensor."""
    if command.action not in _CHECKER_ACTIONS:
        known = ", ".join(_CHECKER_ACTIONS)
        raise RequestError(f"action must be one of {known}, got {command.action!r}", field="action")
    _CHECKER_ACTIONS[command.action](replica, command)


def _snapshot(replica: Replica, command: WeightsChecker) -> None:
    replica.reading.snapshot(command.call_id, command.deadline)


def _reset_tensors(replica: Replica, command: WeightsChecker) -> None:
    replica.update.lose_weights(replica.resolved.engine.seed ^ _SCRAMBLE_SALT)
    replica.outbox.reply(command.call_id, {})


def _compare(replica: Replica, command: WeightsChecker) -> None:
    replica.reading.compare(command.call_id, command.deadline)


def move_memory(replica: Replica, command: ReleaseMemory | ResumeMemory, now: float) -> None:
    """Release memory or take it again; `MemoryControl` answers when the system has it, or the replica."""
    replica.memory.add(command)


def slow_down(replica: Replica, command: SlowDown, now: float) -> None:
    """Wait before each step."""
    replica.probes.slow_down(command.seconds)
    replica.outbox.reply(command.call_id)


def freeze_gc(replica: Replica, command: FreezeGc, now: float) -> None:
    """Take what there is out of the collector's sight."""
    gc.collect()
    gc.freeze()
    replica.outbox.reply(command.call_id)


def profile(replica: Replica, command: Profile, now: float) -> None:
    """Begin or end a trace of the core."""
    probes = replica.probes
    replica.outbox.reply(
        command.call_id, probes.stop_profile() if command.terms is None else probes.profile(command.terms)
    )


def flush_cache(replica: Replica, command: FlushCache, now: float) -> None:
    """Free unreferenced cached pages and unpublish the rest."""
    replica.outbox.reply(command.call_id, replica.scheduler.flush_cache())


def get_status(replica: Replica, command: GetStatus, now: float) -> None:
    """The core's account of itself."""
    replica.outbox.reply(command.call_id, status(replica, now))


def status(replica: Replica, now: float) -> CoreStatus:
    """State, load and counters."""
    scheduler, update = replica.scheduler, replica.update
    session = update.machine.session
    return CoreStatus(
        state=update.machine.state,
        version=update.machine.live_version,
        last_version=update.machine.version,
        epoch=update.machine.epoch,
        paused=replica.pause.mode or "",
        updating=update.phase is not UpdatePhase.IDLE,
        updating_in_place=session is not None and session.mode == "inplace",
        released=tuple(sorted(replica.memory.released)),
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_used_tokens=scheduler.num_used_tokens,
        max_total_num_tokens=scheduler.limits.max_total_num_tokens,
        metrics=metrics(replica, now),
    )


def metrics(replica: Replica, now: float) -> dict[str, float]:
    """The scheduler's counters, the executor's, and the core's own."""
    return {
        **replica.scheduler.metrics(),
        **replica.executor.counters(),
        "num_updates": float(replica.update.num_updates),
        "last_update_pause_ms": replica.update.last_pause_ms,
        "staged_steps": float(replica.update.num_steps_while_staging),
        "executing_s": replica.pulse.spent(Phase.EXECUTING),
        "deciding_s": replica.pulse.spent(Phase.DECIDING),
        "idle_s": replica.pulse.spent(Phase.IDLE),
        "uptime_s": now - replica.started_at,
    }


def shutdown(replica: Replica, command: Shutdown, now: float) -> None:
    """Answer everything and everybody; the loop ends after this turn."""
    replica.outbox.add(replica.scheduler.abort(None, "The engine is shutting down"))
    replica.pause.end(ShutdownError("the engine is shutting down"))
    replica.update.end(ShutdownError("the engine is shutting down"))
    replica.reading.end(ShutdownError("the engine is shutting down"))
    replica.memory.end(ShutdownError("the engine is shutting down"))
    replica.groups.end(ShutdownError("the engine is shutting down"))
    replica.outbox.reply(command.call_id)
    replica.is_ending = True


_CHECKER_ACTIONS: dict[str, Callable[[Replica, WeightsChecker], None]] = {
    "snapshot": _snapshot,
    "reset_tensors": _reset_tensors,
    "compare": _compare,
}

_CALLS: dict[type, Callable[[Replica, Any, float], None]] = {
    Pause: pause,
    Resume: resume,
    GiveUp: give_up,
    BeginUpdate: begin_update,
    ExtendUpdate: extend_update,
    Stage: stage,
    StagePayload: stage_payload,
    CommitUpdate: commit_update,
    AbortUpdate: abort_update,
    JoinGroup: join_group,
    LeaveGroup: leave_group,
    Receive: receive,
    Discard: discard,
    UpdateFromDisk: update_from_disk,
    SetVersion: set_version,
    GetWeight: get_weight,
    Digest: digest,
    DescribeWeights: describe_weights,
    WeightsChecker: weights_checker,
    ReleaseMemory: move_memory,
    ResumeMemory: move_memory,
    SlowDown: slow_down,
    FreezeGc: freeze_gc,
    Profile: profile,
    FlushCache: flush_cache,
    GetStatus: get_status,
    Shutdown: shutdown,
}
