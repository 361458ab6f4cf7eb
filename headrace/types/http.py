"""What a client of ours and a server tell each other over HTTP, as values. Owns their names and bounds; no I/O.

Requests of generation are JSON, as on every other route, and bounded as such. Everything else is MessagePack: its
floats are exact and may be infinite, and it is decoded to these types only.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.types.errors import ErrorInfo
from headrace.types.generation import Generation
from headrace.types.weights import BufferEntry, InFlight, TensorInfo, UpdateMode

PREFIX = "/headrace"
"""Of the routes that speak as `Engine` does."""

MESSAGE_TYPE = "application/msgpack"
BYTES_TYPE = "application/octet-stream"
TENSOR_HEADER = "x-headrace-tensor"
"""The `TensorInfo` of a body that is a tensor's bytes, as JSON of ASCII."""

BEGIN_TOKEN_BYTES = 16
"""By which a client undoes an ask to begin whose answer it never got."""

LENGTH_BYTES = 4
"""Before each part of a stream, the head of a stage body, and what a server and its owner say: its length,
little-endian."""

TOKEN_BYTES = 32
"""At the end of a lent buffer: what only a process that shares the server's memory can have put there."""

MAX_HEAD_BYTES = 8 << 20
"""Of a stage body's head, which lists its pieces."""


def framed(raw: bytes) -> bytes:
    """Behind its length."""
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


class GenerateAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`Engine.generate`, `score` (`scores`) or `stream` (`stream`), with their arguments as they were given."""

    prompts: Any = None
    input_ids: Any = None
    sampling_params: Any = None
    options: dict[str, Any] = {}
    stream: bool = False
    scores: bool = False


class ChatAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`Engine.chat`, with its arguments as they were given."""

    messages: Any
    sampling_params: Any = None
    tools: Any = None
    chat_template_kwargs: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = False
    parallel_tool_calls: Any = True
    options: dict[str, Any] = {}


class StreamPart(msgspec.Struct, frozen=True, array_like=True):
    """A part of a streamed answer. One that breaks off before `is_last` was cut: the server is gone."""

    pieces: list[Generation] = []
    error: ErrorInfo | None = None
    is_last: bool = False


class BeginAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`Engine.begin_update`. `token` is the client's own, by which an ask whose answer it never got is undone."""

    version: str | int
    manifest: tuple[TensorInfo, ...] | None
    mode: UpdateMode = "auto"
    in_flight: InFlight = "drain"
    partial: bool = False
    timeout: float
    token: bytes = b""


class SessionBegun(msgspec.Struct, frozen=True):
    """`token` is what a lent buffer has to end with. One stage body has at most `max_body_bytes`, its head included.
    `dtype` is the engine's, and `num_ranks` how many it has; `client` is the far end of the connection that this came
    on."""

    session_id: int
    mode: str
    token: bytes
    max_body_bytes: int
    dtype: str = ""
    num_ranks: int = 1
    client: tuple[str, int] = ("", 0)


class ExtendAsk(msgspec.Struct, frozen=True):
    """More tensors of a session that was begun without a manifest. Reply: the index of the first."""

    session_id: int
    manifest: tuple[TensorInfo, ...]


class JoinAsk(msgspec.Struct, frozen=True, kw_only=True):
    """The tensors of one `Engine.update_weights_from_bucket`, before they are staged. Reply: `PartJoined`, or null
    where there are none. All that one client brings has one `sender`."""

    manifest: tuple[TensorInfo, ...]
    version: str | None
    mode: UpdateMode
    in_flight: InFlight
    timeout: float
    token: bytes = b""
    sender: str = ""


class PartJoined(msgspec.Struct, frozen=True):
    """The session that they belong to, and their places in its manifest."""

    begun: SessionBegun
    indices: tuple[int, ...]


class SettleAsk(msgspec.Struct, frozen=True):
    """They were staged. Reply: an `UpdateReport` if they were the last that the model lacked, else null."""

    session_id: int
    indices: tuple[int, ...]


class TensorPiece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`num_bytes` of the tensor `index` of a manifest, from its byte `start` on. `replaces` as in `BufferEntry`."""

    index: int
    start: int
    num_bytes: int
    replaces: bool = False


class StageHead(msgspec.Struct, frozen=True):
    """What a stage body begins with: the pieces whose bytes follow, back to back."""

    session_id: int
    pieces: tuple[TensorPiece, ...]


class LendAsk(msgspec.Struct, frozen=True):
    """Shared memory of the client, which ends with the session's token. Reply: its number, for `StageLentAsk`."""

    session_id: int
    path: str
    size: int


class StageLentAsk(msgspec.Struct, frozen=True):
    """Stage pieces that lie in a lent buffer."""

    session_id: int
    buffer: int
    entries: tuple[BufferEntry, ...]


class StageGroupAsk(msgspec.Struct, frozen=True):
    """`Engine.stage_from_group`."""

    session_id: int
    names: tuple[str, ...]
    group_name: str
    load_format: str | int | None


class CommitAsk(msgspec.Struct, frozen=True):
    """`Engine.commit`."""

    session_id: int


class AbortAsk(msgspec.Struct, frozen=True):
    """`Engine.abort_update`; None: whichever is open, or with a `token` the one that this ask has begun, if it has."""

    session_id: int | None = None
    token: bytes = b""


class OwnerOrder(msgspec.Struct, frozen=True):
    """What a process that starts a server of its own asks of it: settings of the engine and of the server, by name."""

    config: dict[str, Any]


class OwnerReport(msgspec.Struct, frozen=True):
    """What came of it: the server's address, or why there is none."""

    url: str = ""
    error: ErrorInfo | None = None
