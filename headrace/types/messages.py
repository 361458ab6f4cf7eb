"""Messages between a front and a core: a closed tagged union each way, decoded only to these types.

Front to core: `Command`s. `Submit`, `Abort` and `Finished` have no reply of their own; every other command carries a
`call_id` and is answered by exactly one `Reply`. Core to front: `Deltas`, `Reply`, `CoreReady`, `CoreFailed`.
"""

from __future__ import annotations

import msgspec

from headrace.types.errors import ErrorInfo
from headrace.types.request import Delta, Request
from headrace.types.weights import BufferEntry, BufferRef, InFlight, PauseMode, TensorInfo, UpdateMode


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """New requests. A request the core refuses is answered by a terminal `Delta` of type "error"."""

    requests: tuple[Request, ...]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End requests now; each is answered at once by a terminal `Delta` with its partial tokens. None: all requests.

    Unknown handles are ignored: they have had their terminal answer.
    """

    handles: tuple[int, ...] | None
    message: str = "Aborted"


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="finished"):
    """The front ended these requests itself (a stop string): free them; no `Delta` is wanted any more."""

    handles: tuple[int, ...]


class Pause(msgspec.Struct, frozen=True, array_like=True, tag="pause"):
    """Stop stepping. Answered once the mode's promise holds (no step in flight; for drain and abort: nothing runs)."""

    call_id: int
    mode: PauseMode


class Resume(msgspec.Struct, frozen=True, array_like=True, tag="resume"):
    """Go on stepping. Refused with `UpdateConflictError` while an implicit update session is incomplete."""

    call_id: int


class BeginUpdate(msgspec.Struct, frozen=True, array_like=True, tag="begin_update"):
    """Open a weight session; the whole manifest is checked before anything is touched. Reply: `UpdateBegun`.

    The session is aborted by the core `timeout_s` after its last command.
    """

    call_id: int
    version: str
    manifest: tuple[TensorInfo, ...]
    mode: UpdateMode = "auto"
    in_flight: InFlight = "drain"
    partial: bool = False
    timeout_s: float = 600.0


class UpdateBegun(msgspec.Struct, frozen=True):
    """`mode` is what "auto" became."""

    session_id: int
    mode: str


class Stage(msgspec.Struct, frozen=True, array_like=True, tag="stage"):
    """Whole tensors of the session, in one shared buffer. The reply means: copied, the buffer may be reused."""

    call_id: int
    session_id: int
    buffer: BufferRef
    entries: tuple[BufferEntry, ...]


class CommitUpdate(msgspec.Struct, frozen=True, array_like=True, tag="commit_update"):
    """Make the staged weights live between two steps. Reply: `UpdateReport`."""

    call_id: int
    session_id: int


class AbortUpdate(msgspec.Struct, frozen=True, array_like=True, tag="abort_update"):
    """Drop a session. In shadow mode the old weights were never touched; in place after a write: poisoned."""

    call_id: int
    session_id: int


class UpdateFromDisk(msgspec.Struct, frozen=True, array_like=True, tag="update_from_disk"):
    """A whole update read by the core itself from a checkpoint folder. Reply: `UpdateReport`."""

    call_id: int
    path: str
    version: str
    mode: UpdateMode = "auto"
    in_flight: InFlight = "drain"


class SetVersion(msgspec.Struct, frozen=True, array_like=True, tag="set_version"):
    """Relabel the live weights without changing them. Bumps no epoch; aborts nothing."""

    call_id: int
    version: str


class GetWeight(msgspec.Struct, frozen=True, array_like=True, tag="get_weight"):
    """Read one live tensor back by Hugging Face name. Reply: `WeightBytes`."""

    call_id: int
    name: str


class WeightBytes(msgspec.Struct, frozen=True):
    """A tensor in Hugging Face shape and layout, engine dtype."""

    info: TensorInfo
    data: bytes


class Digest(msgspec.Struct, frozen=True, array_like=True, tag="digest"):
    """Hash live parameter memory. Reply: dict[str, str], HF name to lowercase hex SHA-256."""

    call_id: int


class WeightsChecker(msgspec.Struct, frozen=True, array_like=True, tag="weights_checker"):
    """SGLang's checker: "snapshot" keeps digests, "reset_tensors" overwrites live weights (then NEEDS_WEIGHTS),
    "compare" compares live digests with the snapshot. Reply: dict[str, str] (digests, or the names that differ)."""

    call_id: int
    action: str


class FlushCache(msgspec.Struct, frozen=True, array_like=True, tag="flush_cache"):
    """Free unreferenced cached pages and unpublish the rest. Reply: int, the pages freed. Aborts nothing."""

    call_id: int


class GetStatus(msgspec.Struct, frozen=True, array_like=True, tag="get_status"):
    """Reply: `CoreStatus`."""

    call_id: int


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """Abort what runs, answer it, and end the core. Reply: null, the last message."""

    call_id: int


Command = (
    Submit
    | Abort
    | Finished
    | Pause
    | Resume
    | BeginUpdate
    | Stage
    | CommitUpdate
    | AbortUpdate
    | UpdateFromDisk
    | SetVersion
    | GetWeight
    | Digest
    | WeightsChecker
    | FlushCache
    | GetStatus
    | Shutdown
)


class CoreStatus(msgspec.Struct, frozen=True):
    """The core's own account of itself. `metrics` are the counters and gauges listed in docs/architecture.md."""

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


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    """What one step, or one command, brought to the requests it touched."""

    deltas: tuple[Delta, ...]


class Reply(msgspec.Struct, frozen=True, array_like=True, tag="reply"):
    """The one answer to a command. `payload` is the msgpack of the type that the command's docstring names."""

    call_id: int
    payload: bytes = b""
    error: ErrorInfo | None = None


class CoreReady(msgspec.Struct, frozen=True, array_like=True, tag="core_ready"):
    """The core holds weights and steps, or failed to start (`error`). Sent once, first.

    `explanations` are (setting, value, why) of everything that was "auto".
    """

    max_total_num_tokens: int = 0
    page_size: int = 0
    num_layers: int = 0
    explanations: tuple[tuple[str, str, str], ...] = ()
    error: ErrorInfo | None = None


class CoreFailed(msgspec.Struct, frozen=True, array_like=True, tag="core_failed"):
    """The core ends, and why. Sent last, if at all: a core that is killed says nothing."""

    error: ErrorInfo


Output = Deltas | Reply | CoreReady | CoreFailed
