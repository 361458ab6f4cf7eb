"""One function per command. Owns what each command means to a replica; a command is applied between two steps.

A function raises a `HeadraceError` to refuse a command: `apply_command` answers the call with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from headrace.core.faults import FAULTS
from headrace.core.replica import Replica
from headrace.types.errors import HeadraceError, InternalError, RequestError, ShutdownError, UpdateConflictError
from headrace.types.messages import (
    Abort,
    AbortUpdate,
    BeginUpdate,
    Command,
    CommitUpdate,
    CoreStatus,
    Digest,
    Finished,
    FlushCache,
    GetStatus,
    GetWeight,
    Pause,
    Resume,
    SetVersion,
    Shutdown,
    Stage,
    Submit,
    UpdateFromDisk,
    WeightBytes,
    WeightsChecker,
)
from headrace.types.request import Delta
from headrace.types.weights import TensorInfo

logger = logging.getLogger(__name__)

_SCRAMBLE_SALT = 0x5EED_0FF5_5EED_0FF5
_MIN_DISK_TIMEOUT = 1.0


def apply_command(replica: Replica, command: Command, now: float) -> None:
    """Apply one command, at `now` seconds of the loop's clock. Every call is answered once, now or when it is done."""
    if isinstance(command, Submit):
        submit(replica, command, now)
    elif isinstance(command, Abort):
        replica.outbox.add(replica.scheduler.abort(command.handles, command.message))
    elif isinstance(command, Finished):
        replica.scheduler.discard(command.handles)
    else:
        try:
            _CALLS[type(command)](replica, command, now)
        except HeadraceError as error:
            replica.outbox.refuse(command.call_id, error.info())
        except FAULTS as fault:
            replica.executor.examine(fault)
            name = type(command).__name__
            logger.exception("%s failed", name)
            failure = InternalError(f"{name} failed: {type(fault).__name__}: {fault}")
            replica.outbox.refuse(command.call_id, failure.info())


def submit(replica: Replica, command: Submit, now: float) -> None:
    """Queue requests; what cannot be served is answered at once."""
    refusal = replica.update.refusal()
    for request in command.requests:
        try:
            if refusal is not None:
                raise refusal
            replica.scheduler.add(request, now)
        except HeadraceError as error:
            replica.outbox.add([Delta.failed(request.handle, error.info())])
        except FAULTS as fault:
            logger.exception("request %s was not taken", request.request_id)
            failure = InternalError(f"the request was not taken: {type(fault).__name__}: {fault}")
            replica.outbox.add([Delta.failed(request.handle, failure.info())])


def pause(replica: Replica, command: Pause, now: float) -> None:
    """Stop stepping; `PauseControl` answers when the mode's promise holds."""
    replica.pause.pause(command.call_id, command.mode, now)


def resume(replica: Replica, command: Resume, now: float) -> None:
    """Go on stepping, unless live weights are half written."""
    replica.update.check_resume()
    replica.pause.resume()
    replica.outbox.reply(command.call_id)


def begin_update(replica: Replica, command: BeginUpdate, now: float) -> None:
    """Open a session."""
    replica.outbox.reply(command.call_id, replica.update.begin(command, now))


def stage(replica: Replica, command: Stage, now: float) -> None:
    """Queue a bucket; answered when it is copied."""
    replica.update.stage(command, now)


def commit_update(replica: Replica, command: CommitUpdate, now: float) -> None:
    """Ask for the commit; answered when it is done."""
    replica.update.commit(command, now)


def abort_update(replica: Replica, command: AbortUpdate, now: float) -> None:
    """Drop the session."""
    replica.update.abort(command.session_id)
    replica.outbox.reply(command.call_id)


def update_from_disk(replica: Replica, command: UpdateFromDisk, now: float) -> None:
    """A whole update from a folder; answered when it is live."""
    timeout_s = max(_MIN_DISK_TIMEOUT, replica.resolved.engine.control_timeout)
    replica.update.from_disk(command, timeout_s, now)


def set_version(replica: Replica, command: SetVersion, now: float) -> None:
    """Relabel the live weights."""
    replica.update.machine.relabel(command.version)
    replica.scheduler.relabel(command.version)
    replica.outbox.reply(command.call_id)


def get_weight(replica: Replica, command: GetWeight, now: float) -> None:
    """Read one live tensor back."""
    tensor = replica.executor.weights.read(command.name)
    from headrace.weights.staging import bytes_of, dtype_name  # torch: only where there are tensors

    info = TensorInfo(command.name, tuple(tensor.shape), dtype_name(tensor.dtype))
    replica.outbox.reply(command.call_id, WeightBytes(info, bytes_of(tensor).tobytes()))


def digest(replica: Replica, command: Digest, now: float) -> None:
    """Hash live memory."""
    replica.outbox.reply(command.call_id, replica.executor.weights.digest())


def weights_checker(replica: Replica, command: WeightsChecker, now: float) -> None:
    """SGLang's three-step check that an update writes every tensor."""
    if command.action not in _CHECKER_ACTIONS:
        known = ", ".join(_CHECKER_ACTIONS)
        raise RequestError(f"action must be one of {known}, got {command.action!r}", field="action")
    replica.outbox.reply(command.call_id, _CHECKER_ACTIONS[command.action](replica))


def _snapshot(replica: Replica) -> dict[str, str]:
    replica.snapshot = replica.executor.weights.digest()
    return replica.snapshot


def _reset_tensors(replica: Replica) -> dict[str, str]:
    replica.update.lose_weights(replica.resolved.engine.seed ^ _SCRAMBLE_SALT)
    return {}


def _compare(replica: Replica) -> dict[str, str]:
    if replica.snapshot is None:
        raise UpdateConflictError("compare needs a snapshot taken before", field="action")
    live = replica.executor.weights.digest()
    return {name: found for name, found in live.items() if replica.snapshot.get(name) != found}


def flush_cache(replica: Replica, command: FlushCache, now: float) -> None:
    """Free unreferenced cached pages and unpublish the rest."""
    replica.outbox.reply(command.call_id, replica.scheduler.flush_cache())


def get_status(replica: Replica, command: GetStatus, now: float) -> None:
    """The core's account of itself."""
    replica.outbox.reply(command.call_id, status(replica, now))


def status(replica: Replica, now: float) -> CoreStatus:
    """State, load and counters."""
    scheduler, update = replica.scheduler, replica.update
    return CoreStatus(
        state=update.machine.state,
        version=update.machine.version,
        epoch=update.machine.epoch,
        paused=replica.pause.mode or "",
        updating=update.machine.session is not None,
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_used_tokens=scheduler.num_used_tokens,
        max_total_num_tokens=scheduler.max_total_num_tokens,
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
        "uptime_s": now - replica.started_at,
    }


def shutdown(replica: Replica, command: Shutdown, now: float) -> None:
    """Answer everything and everybody; the loop ends after this turn."""
    replica.outbox.add(replica.scheduler.abort(None, "The engine is shutting down"))
    replica.pause.end(ShutdownError("the engine is shutting down"))
    replica.update.end(ShutdownError("the engine is shutting down"))
    replica.outbox.reply(command.call_id)
    replica.is_ending = True


_CHECKER_ACTIONS: dict[str, Callable[[Replica], dict[str, str]]] = {
    "snapshot": _snapshot,
    "reset_tensors": _reset_tensors,
    "compare": _compare,
}

_CALLS: dict[type, Callable[[Replica, Any, float], None]] = {
    Pause: pause,
    Resume: resume,
    BeginUpdate: begin_update,
    Stage: stage,
    CommitUpdate: commit_update,
    AbortUpdate: abort_update,
    UpdateFromDisk: update_from_disk,
    SetVersion: set_version,
    GetWeight: get_weight,
    Digest: digest,
    WeightsChecker: weights_checker,
    FlushCache: flush_cache,
    GetStatus: get_status,
    Shutdown: shutdown,
}
