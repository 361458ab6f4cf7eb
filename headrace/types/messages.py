"""Messages between a front and a core: a closed tagged union each way, decoded only to these types.

Front to core: `Command`s. `Submit`, `Abort` and `Finished` have no reply of their own; every other command carries a
`call_id` and is answered by exactly one `Reply`. Core to front: `Deltas`, `Reply`, `CoreReady`, `CoreFailed`.

A call carries its `deadline` in seconds of CLOCK_MONOTONIC, which all processes of a host share. What a core has not
done by then it never does: it refuses a call that it comes to too late, and undoes one that still waits, both with
`DeadlineError`. `GiveUp` does the same at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Final, cast

import msgspec

from headrace.types.errors import ErrorInfo
from headrace.types.foreign import Payload
from headrace.types.memory import MemoryTag, OnRelease, Restore
from headrace.types.profile import ProfileTerms
from headrace.types.request import Delta, Request, Sibling
from headrace.types.weights import (
    SEPARATE,
    BufferEntry,
    BufferRef,
    DeviceRef,
    InFlight,
    PauseMode,
    Rendezvous,
    TensorInfo,
    UpdateMode,
)

NO_DEADLINE: Final = math.inf


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """New requests. A request the core refuses is answered by a terminal `Delta` of type "error".

    Requests that share their parameters (samples of a prompt, prompts of a call) travel as one and its siblings: a long
    prompt, logit bias or list of stop ids is sent and held once. `siblings[i]` follow `requests[i]`.
    """

    requests: tuple[Request, ...]
    siblings: tuple[tuple[Sibling, ...], ...] = ()

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Submit:
        """The message that brings these requests, in their order."""
        firsts, siblings = list[Request](), list[list[Sibling]]()
        last: Request | None = None
        for request in requests:
            sibling = None if last is None else Sibling.between(last, request)
            if sibling is None:
                firsts.append(request)
                siblings.append([])
            else:
                siblings[-1].append(sibling)
            last = request
        return cls(tuple(firsts), tuple(map(tuple, siblings)))

    def all_requests(self) -> Iterator[Request]:
        for request, siblings in zip_longest(self.requests, self.siblings[: len(self.requests)], fillvalue=()):
            last = cast(Request, request)
            yield last
            for sibling in siblings:
                last = sibling.after(last)
                yield last


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End requests now; each is answered at once by a terminal `Delta` with its partial tokens.

    Unknown handles are ignored: they have had their terminal answer. So are those of other fronts.
    """

    handles: tuple[int, ...]
    message: str = "Aborted"


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="finished"):
    """The front ended these requests of its own (a stop string): free them; no `Delta` is wanted any more."""

    handles: tuple[int, ...]


class _Answered(msgspec.Struct, frozen=True, array_like=True):
    """A command that is answered."""

    call_id: int


class _Call(_Answered, frozen=True, kw_only=True):
    """One with a deadline. With `wants_status` the answer comes with the core's status."""

    deadline: float = NO_DEADLINE
    wants_status: bool = False


class Pause(_Call, frozen=True, tag="pause"):
    """Stop stepping. Answered once the mode's promise holds (no step in flight; for drain and abort: nothing runs)."""

    mode: PauseMode


class Resume(_Call, frozen=True, tag="resume"):
    """Go on stepping. Refused with `UpdateConflictError` while an open-ended update session is incomplete."""


class GiveUp(_Answered, frozen=True, tag="give_up"):
    """Nobody waits for call `target` any more: it is not begun, or undone where it waits, and answered then.

    Of what was done already, two are undone because nobody would know of them: a pause (the one before it is in force
    again) and an update session that `target` opened. Reply: null, after the answer of `target`.
    """

    target: int


class BeginUpdate(_Call, frozen=True, tag="begin_update"):
    """Open a weight session; the whole manifest is checked before anything is touched. Reply: `UpdateBegun`.

    One that `is_open` is open-ended: its manifest may be empty, and `ExtendUpdate` brings the rest. The session is
    aborted by the core `timeout_s` after its last command.
    """

    version: str
    manifest: tuple[TensorInfo, ...]
    mode: UpdateMode = "auto"
    in_flight: InFlight = "drain"
    partial: bool = False
    timeout_s: float = 600.0
    is_open: bool = False


class ExtendUpdate(_Call, frozen=True, tag="extend_update"):
    """Name more tensors of an open-ended session; they are checked beside those before them, and none is taken where
    one is wrong. Reply: `UpdateExtended`."""

    session_id: int
    manifest: tuple[TensorInfo, ...]


class Stage(_Call, frozen=True, tag="stage"):
    """Tensors of the session, or pieces of them, in one shared buffer. The reply means that the buffer may be reused:
    all is copied, or nothing reads it any more. The pieces of a tensor come in order; one at 0 begins it again."""

    session_id: int
    buffer: BufferRef | DeviceRef
    entries: tuple[BufferEntry, ...]


class StagePayload(_Call, frozen=True, tag="stage_payload"):
    """Tensors of the session in memory that another engine's client shares; `indices` are their places in the session's
    manifest, in the order of `Payload.manifest`, and `replaced` those that may have been staged before. The reply means
    that nothing reads the memory any more, whatever came of it."""

    session_id: int
    payload: Payload
    indices: tuple[int, ...]
    replaced: tuple[int, ...] = ()


class CommitUpdate(_Call, frozen=True, tag="commit_update"):
    """Make the staged weights live between two steps, under the session's label unless `version` is another. An
    open-ended session has to be complete, unless it is partial. Reply: `UpdateReport`."""

    session_id: int
    version: str = ""


class AbortUpdate(_Call, frozen=True, tag="abort_update"):
    """Drop a session; None: whichever is open, if one is.

    In shadow mode the old weights were never touched; in place after a write: poisoned.
    """

    session_id: int | None


class JoinGroup(_Call, frozen=True, tag="join_group"):
    """Become rank `rank` of a `torch.distributed` group of `world_size` that a trainer, its rank 0, makes at `address`,
    in the way of `rendezvous`. Reply: null, once all are there. A group that cannot be used any more gives its name to
    the new one. With a `unique_id` it is a communicator of NCCL's that has it, and is looked for at no address."""

    name: str
    address: str
    port: int
    rank: int
    world_size: int
    backend: str
    rendezvous: Rendezvous = "sglang"
    unique_id: bytes = b""


class LeaveGroup(_Call, frozen=True, tag="leave_group"):
    """Leave a group, or stop joining it. What was to be received of it fails."""

    name: str


class GroupTensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor that is broadcast, as its sender describes it, and its place in the session's manifest; -1: it is
    received and forgotten. `replaces` as in `BufferEntry`."""

    info: TensorInfo
    index: int
    replaces: bool = False


class Receive(_Call, frozen=True, tag="receive"):
    """Stage tensors that rank 0 of a group broadcasts in this order, packed as `packing` says. Reply: null, once all
    are staged. Of one that fails, what is still to come is received and forgotten until its deadline, since it is sent
    all the same; what did not come until then leaves the group unusable."""

    session_id: int
    group: str
    tensors: tuple[GroupTensor, ...]
    packing: int = SEPARATE


class Discard(_Call, frozen=True, tag="discard"):
    """As `Receive`, of what nobody takes. Reply: null, at once. `tensors` is None where nobody can tell how much is
    sent: the group cannot be used any more. `seconds`: how long it may take to come."""

    group: str
    tensors: tuple[TensorInfo, ...] | None
    packing: int
    seconds: float


class UpdateFromDisk(_Call, frozen=True, tag="update_from_disk"):
    """A whole update read by the core itself from a checkpoint folder. Reply: `UpdateReport`.

    Nothing outside the folder `root` is read, whatever links lead there; "": links are followed.
    """

    path: str
    version: str
    mode: UpdateMode = "auto"
    in_flight: InFlight = "drain"
    root: str = ""


class SetVersion(_Call, frozen=True, tag="set_version"):
    """Relabel the live weights, those of `epoch` if it is given, without changing them. Bumps no epoch; aborts
    nothing."""

    version: str
    epoch: int | None = None


class GetWeight(_Call, frozen=True, tag="get_weight"):
    """Copy bytes of one live tensor into the caller's buffer, from byte `start` on, until the buffer is full or the
    first `max_rows` rows are read; with a `rank`, of that rank's parameter of this name, as it lies. Reply:
    `WeightPart`."""

    name: str
    buffer: BufferRef
    start: int = 0
    max_rows: int | None = None
    rank: int | None = None


class WeightPart(msgspec.Struct, frozen=True):
    """What was read: `num_bytes` at the head of the buffer, of a tensor in Hugging Face layout and engine dtype.

    Parts with one `stamp` are of the same weights. `total` is the size of all that was asked for.
    """

    info: TensorInfo
    num_bytes: int
    stamp: int
    total: int


class Digest(_Call, frozen=True, tag="digest"):
    """Digest live parameter memory, all of it while it holds one version. Reply: dict[str, str], HF name to the 32 hex
    digits of `headrace.weights.position_sum`; `by_rank`: a list of such, of all that each rank holds."""

    by_rank: bool = False


class DescribeWeights(_Call, frozen=True, tag="describe_weights"):
    """Say what is live, and digest it, all of one version. Reply: `WeightsDescription`."""


class WeightsChecker(_Call, frozen=True, tag="weights_checker"):
    """SGLang's checker: "snapshot" keeps digests, "reset_tensors" overwrites live weights (then NEEDS_WEIGHTS),
    "compare" compares live digests with the snapshot. Reply: dict[str, str] (digests, or the names that differ)."""

    action: str


class ReleaseMemory(_Call, frozen=True, tag="release_memory"):
    """Give memory back to the system; no tags are all. Answered when it is free; what was released before stays so.
    `UpdateConflictError` while an update is open. Reply: null."""

    tags: tuple[MemoryTag, ...] = ()
    in_flight: OnRelease = "abort"


class ResumeMemory(_Call, frozen=True, tag="resume_memory"):
    """Take released memory again, at the addresses it had; no tags are all. `restore` says where weights come from.
    Where there is no room, or they cannot be restored, all of it stays released. Reply: null."""

    tags: tuple[MemoryTag, ...] = ()
    restore: Restore = "auto"


class SlowDown(_Call, frozen=True, tag="slow_down"):
    """Wait so long before each step; 0: no more. Reply: null."""

    seconds: float


class FreezeGc(_Call, frozen=True, tag="freeze_gc"):
    """Collect garbage, and what is left never again. Reply: null."""


class Profile(_Call, frozen=True, tag="profile"):
    """Trace what the core computes, or, without terms, end that. Reply: str, the file."""

    terms: ProfileTerms | None


class FlushCache(_Call, frozen=True, tag="flush_cache"):
    """Free unreferenced cached pages and unpublish the rest. Reply: int, the pages freed. Aborts nothing."""


class GetStatus(_Answered, frozen=True, tag="get_status"):
    """Reply: `CoreStatus`."""


class Shutdown(_Answered, frozen=True, tag="shutdown"):
    """Abort what runs, answer it, and end the core. Reply: null, the last message."""


Command = (
    Submit
    | Abort
    | Finished
    | Pause
    | Resume
    | GiveUp
    | BeginUpdate
    | ExtendUpdate
    | Stage
    | StagePayload
    | CommitUpdate
    | AbortUpdate
    | JoinGroup
    | LeaveGroup
    | Receive
    | Discard
    | UpdateFromDisk
    | SetVersion
    | GetWeight
    | Digest
    | DescribeWeights
    | WeightsChecker
    | ReleaseMemory
    | ResumeMemory
    | SlowDown
    | FreezeGc
    | Profile
    | FlushCache
    | GetStatus
    | Shutdown
)


class CoreStatus(msgspec.Struct, frozen=True):
    """The core's own account of itself. `metrics` are the counters and gauges listed in docs/behaviour.md.

    `version` is the label of the live weights: "", which nobody can give, while no whole weights are live.
    `last_version` is then that of the last whole ones. `updating_in_place` says that the open update will hold all
    requests while it writes. `released` are the tags of memory that was given back.
    """

    state: str
    version: str
    epoch: int
    paused: str
    updating: bool
    num_running: int
    num_waiting: int
    num_used_tokens: int
    max_total_num_tokens: int
    metrics: dict[str, float]
    last_version: str = ""
    updating_in_place: bool = False
    released: tuple[MemoryTag, ...] = ()


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    """What one step, or one command, brought to the requests it touched."""

    deltas: tuple[Delta, ...]


class Reply(msgspec.Struct, frozen=True, array_like=True, tag="reply"):
    """The one answer to a command. `payload` is the msgpack of the type that the command's docstring names, `status`
    that of a `CoreStatus` at that moment, where it was asked for."""

    call_id: int
    payload: bytes = b""
    error: ErrorInfo | None = None
    status: bytes = b""


class CoreReady(msgspec.Struct, frozen=True, array_like=True, tag="core_ready"):
    """The core holds weights and steps, or failed to start (`error`). Sent once, first.

    `explanations` are (setting, value, why) of everything that was "auto". `front` is the number of the front that is
    told so, for its handles. `devices` are the UUIDs of those whose memory tensors are staged from where they lie.
    """

    max_total_num_tokens: int = 0
    page_size: int = 0
    num_layers: int = 0
    explanations: tuple[tuple[str, str, str], ...] = ()
    error: ErrorInfo | None = None
    front: int = 0
    devices: tuple[str, ...] = ()


class CoreFailed(msgspec.Struct, frozen=True, array_like=True, tag="core_failed"):
    """The core ends, and why. Sent last, if at all: a core that is killed says nothing."""

    error: ErrorInfo


Output = Deltas | Reply | CoreReady | CoreFailed
