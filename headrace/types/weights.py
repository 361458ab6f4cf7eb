"""Weight updates as values: manifests, modes, states. No tensors."""

from __future__ import annotations

from typing import Literal

import msgspec

UpdateMode = Literal["auto", "shadow", "inplace"]
InFlight = Literal["keep", "recompute", "abort", "drain"]
PauseMode = InFlight
WeightState = Literal["ready", "updating", "poisoned", "needs_weights"]


class TensorInfo(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a manifest: its Hugging Face name, shape, and dtype as in "float32" / "bfloat16" (no "torch.").

    `digest` is the lowercase hex SHA-256 of the tensor's bytes in the engine's dtype, or "" when it is not known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str = ""


class BufferEntry(msgspec.Struct, frozen=True, array_like=True):
    """A tensor inside a bucket, or a piece of it: its place in the session's manifest and its byte offset.

    The piece is `num_bytes` of the tensor from its byte `start` on; None: all from there. `replaces` says that the
    tensor may have been staged by a call that did not succeed: what that call brought is forgotten.
    """

    index: int
    offset: int
    start: int = 0
    num_bytes: int | None = None
    replaces: bool = False


class BufferRef(msgspec.Struct, frozen=True, array_like=True):
    """A shared-memory buffer another process of this engine may map: a path it can open, and its size in bytes."""

    path: str
    size: int


class UpdateReport(msgspec.Struct, frozen=True):
    """What an update did. `pause_ms` is how long no step could run because of it."""

    version: str
    epoch: int
    num_tensors: int
    num_bytes: int
    mode: str
    pause_ms: float
    num_aborted: int = 0
