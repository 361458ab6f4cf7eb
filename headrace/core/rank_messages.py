"""What rank 0 tells the other ranks beside plans, and what they answer: closed unions, decoded only to these types.

All of it travels in one order with the plans, and every rank does the same for it. What has a `ticket` is answered by
exactly one `RankAnswer` of each rank, when it is done or has failed; the rest is not answered.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from headrace.types.errors import ErrorInfo
from headrace.types.foreign import Payload
from headrace.types.memory import MemoryTag, Restore
from headrace.types.messages import JoinGroup
from headrace.types.weights import BufferRef, DeviceRef, TensorInfo, UpdateMode

SETTINGS, START, PLAN, TELL, RESULT = range(5)
"""Kinds of frames to a rank: the `ResolvedConfig` that holds for it, its `RankStart`, the words of a plan, a
`RankCommand`. What it sends are `RankAnswer`s, and where the last of several stages samples, results
(`headrace.core.rank_results`)."""

REACHED: Final = -1
"""The ticket of a rank's first answer: it has found the rendezvous."""

READY: Final = 0
"""That of its second: it can execute plans, or why it cannot."""


class RankStart(msgspec.Struct, frozen=True, array_like=True):
    """All that a rank has to know beside its settings. `secret` is the prefix of whatever ranks tell each
    other in the store at `port`, which is reached on loopback; `host` is the address by which other ranks reach it."""

    rank: int
    num_ranks: int
    port: int
    secret: str
    guards_parent: bool
    """Rank 0 is a core's process, and no caller's, and is ended when it is stopped."""

    host: str
    shares_memory: bool
    """What rank 0 has in shared memory can be opened here; else its bytes are sent, and so are answers."""


class RankAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What came of a ticket on one rank. `values` are those that the message names."""

    ticket: int
    error: ErrorInfo | None = None
    values: tuple[str, ...] = ()
    data: bytes = b""


class _Told(msgspec.Struct, frozen=True, array_like=True):
    """A message that is not answered."""


class _Asked(msgspec.Struct, frozen=True, array_like=True):
    """A message that is."""

    ticket: int


class SampleStep(_Told, frozen=True, tag="sample"):
    """Sample plan `number` of those sent, which waits for it. `rows` and `masks` are those of a patch, as bytes; there
    is none where they are empty."""

    number: int
    rows: bytes
    masks: bytes


class VoidStep(_Asked, frozen=True, tag="void"):
    """Plan `number` of those sent failed on rank 0: whatever came of it here counts for nothing."""

    number: int


class DevicesOn(_Asked, frozen=True, tag="devices"):
    """Values: as `Weights.device_ids`."""


class BeginOn(_Asked, frozen=True, tag="begin"):
    """As `WeightMemory.begin`."""

    manifest: tuple[TensorInfo, ...]
    mode: UpdateMode
    partial: bool


class BeginOpenOn(_Asked, frozen=True, tag="begin_open"):
    """As `WeightMemory.begin_open`."""

    mode: UpdateMode
    partial: bool


class ExtendOn(_Asked, frozen=True, tag="extend"):
    """As `WeightMemory.extend`. Value: how many tensors are missing, of those that this rank holds anything of."""

    manifest: tuple[TensorInfo, ...]


class MissingOn(_Asked, frozen=True, tag="missing"):
    """As `WeightMemory.missing`. Values: the names, of those that this rank holds anything of."""


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor, or the piece of it from byte `start` on, in a buffer."""

    index: int
    offset: int
    size: int
    start: int | None
    is_last: bool


class StageBufferOn(_Asked, frozen=True, tag="stage_buffer"):
    """Stage pieces that are in shared memory or a device's; without a path in bytes that are sent (`FillOn`), one piece
    after the other. Values: a sum for each that is the last of its tensor, or ""."""

    buffer: BufferRef | DeviceRef
    places: tuple[Place, ...]


class FillOn(_Told, frozen=True, tag="fill"):
    """Bytes of what `target` asks to stage, from `start` on, in order."""

    target: int
    start: int
    data: bytes


class StageFileOn(_Asked, frozen=True, tag="stage_file"):
    """Stage a tensor of the open folder. Value: a sum, or ""."""

    index: int
    name: str


class StageArrivalsOn(_Asked, frozen=True, tag="stage_arrivals"):
    """Stage the next tensors that a group brings to a call, in this order. Values: a sum, or "", of each."""

    call: int
    indices: tuple[int, ...]


class StageForeignOn(_Asked, frozen=True, tag="stage_foreign"):
    """Stage a tensor of an open payload. Value: a sum, or ""."""

    index: int
    key: int
    name: str


class ForgetOn(_Told, frozen=True, tag="forget"):
    """As `WeightMemory.forget`."""

    index: int


class GiveUpOn(_Told, frozen=True, tag="give_up"):
    """Work no more for a ticket, which is answered now if it was not."""

    target: int


class CommitOn(_Asked, frozen=True, tag="commit"):
    """As `WeightMemory.commit`, answered when it is done."""


class LetGoOn(_Asked, frozen=True, tag="let_go"):
    """As `Weights.let_go`, until nothing is left."""


class AbortOn(_Told, frozen=True, tag="abort"):
    """End the update if it is open here."""


class DigestOn(_Asked, frozen=True, tag="digest"):
    """Values: the name and the digest of each tensor, one after the other, in the order of the weight map, of what is
    this rank's part of the model's; with an `owner`, of all that this rank holds, and of the others nothing."""

    owner: int | None = None


class ReadOn(_Asked, frozen=True, tag="read"):
    """Write bytes of a tensor, or of a parameter of rank `owner`, into shared memory, `into[0]` on rank 1, or send
    them; what is not held here as zeros."""

    name: str
    start: int
    size: int
    into: tuple[BufferRef, ...]
    owner: int | None = None


class ScrambleOn(_Asked, frozen=True, tag="scramble"):
    """As `Weights.scramble`."""

    seed: int


class OpenFolderOn(_Told, frozen=True, tag="open_folder"):
    """The folder that tensors are read from next; nothing outside `root` is read, if there is one."""

    folder: str
    root: str


class OpenForeignOn(_Asked, frozen=True, tag="open_foreign"):
    """Open what another engine's client shares with this rank; see `Payload.of_ranks`."""

    key: int
    payload: Payload


class CloseForeignOn(_Asked, frozen=True, tag="close_foreign"):
    """It is not read any more."""

    key: int


class KeepOn(_Asked, frozen=True, tag="keep"):
    """Copy the weights to host memory, from which they may come back; not if they are released."""


class DropCopyOn(_Told, frozen=True, tag="drop_copy"):
    """It is not needed any more."""


class ReleaseOn(_Asked, frozen=True, tag="release"):
    """Give memory back."""

    tags: tuple[MemoryTag, ...]


class ResumeOn(_Asked, frozen=True, tag="resume"):
    """As `Executor.resume`."""

    tags: tuple[MemoryTag, ...]
    restore: Restore


class JoinOn(_Asked, frozen=True, tag="join"):
    """Join a trainer's group within so many seconds. `terms` are those of rank 0."""

    key: int
    terms: JoinGroup
    seconds: float


class ReceiveOn(_Told, frozen=True, tag="receive"):
    """A call of a group: what it brings, of which what comes at places `skipped` is not staged."""

    key: int
    call: int
    tensors: tuple[TensorInfo, ...]
    packing: int
    seconds: float
    skipped: tuple[int, ...]


class DropArrivalsOn(_Told, frozen=True, tag="drop_arrivals"):
    """Nothing more of a call is staged."""

    call: int


class LeaveOn(_Told, frozen=True, tag="leave"):
    """Leave a group."""

    key: int
    reason: str


RankCommand = (
    SampleStep
    | VoidStep
    | DevicesOn
    | BeginOn
    | BeginOpenOn
    | ExtendOn
    | MissingOn
    | StageBufferOn
    | FillOn
    | StageFileOn
    | StageArrivalsOn
    | StageForeignOn
    | ForgetOn
    | GiveUpOn
    | CommitOn
    | LetGoOn
    | AbortOn
    | DigestOn
    | ReadOn
    | ScrambleOn
    | OpenFolderOn
    | OpenForeignOn
    | CloseForeignOn
    | KeepOn
    | DropCopyOn
    | ReleaseOn
    | ResumeOn
    | JoinOn
    | ReceiveOn
    | DropArrivalsOn
    | LeaveOn
)

encode_message = msgspec.msgpack.Encoder().encode
command_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(RankCommand)
answer_decoder = msgspec.msgpack.Decoder(RankAnswer)
