"""What an update on a replica has come to, as values. Owns the words for it; `headrace.core.updating` decides."""

from __future__ import annotations

import enum

import msgspec

from headrace.types.weights import InFlight

COMMIT_LOOK_S = 0.0002
"""Between two looks at a commit under way, where somebody waits for its end."""

LET_GO_S = 0.0005
"""Spent at a time on what an update that is over has left: its caller asks for the status next."""


class UpdatePhase(enum.Enum):
    """What an update has come to."""

    IDLE = "there is none"
    LOOKING = "a folder is looked through, and no session is open yet"
    FILLING = "a session is open: tensors are staged beside running steps, or are waited for"
    DRAINING = "what has started runs to its end, and nothing new starts"
    HOLDING = "no step runs: tensors are staged in place, or the commit is due"
    COMMITTING = "no step runs while the copy over live weights goes on: there is no way back"


class PendingCall(msgspec.Struct, frozen=True):
    """Who waits for the weights to be live. `version` is another label than the session's."""

    call_id: int
    deadline: float
    version: str = ""


class Hold(msgspec.Struct):
    """Generation stands still for a session, which `who` names. `since` is in seconds of `time.perf_counter`."""

    policy: InFlight
    since: float
    num_aborted: int
    who: str
