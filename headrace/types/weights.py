"""Weight updates as values: manifests, modes, states. No tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from headrace.types.errors import encodable

UpdateMode = Literal["auto", "shadow", "inplace"]
InFlight = Literal["keep", "recompute", "abort", "drain"]
PauseMode = InFlight
Rendezvous = Literal["sglang", "vllm"]
"""How the ranks of a trainer's group find each other in its store: as in SGLang and its trainers, or as in vLLM."""

WeightState = Literal["ready", "updating", "poisoned", "needs_weights", "released"]


ELEMENT_BYTES = {
    **{"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1},
}
"""The size of an element, of every dtype that a weight file may name."""


class TensorInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor of a manifest: its Hugging Face name, shape, and dtype as in "float32" / "bfloat16" (no "torch.").

    `digest` is of the tensor's bytes in the engine's dtype, in lowercase hex: their SHA-256 (64 digits), or what
    `Engine.digest` says of it (32), or "" when it is not known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, which is of a known dtype."""
        return _num_bytes(self.shape, self.dtype)

    @property
    def is_integer(self) -> bool:
        """True where every byte of an element may be part of a value: no floating or complex dtype."""
        return self.dtype.startswith(("int", "uint", "bool"))


@functools.lru_cache(1 << 12)
def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * ELEMENT_BYTES[dtype]


class WeightBytes(msgspec.Struct, frozen=True):
    """A tensor in Hugging Face shape and layout, engine dtype; of its first rows only, if no more were asked for."""

    info: TensorInfo
    data: memoryview


MAX_TENSORS = 1 << 18
"""Tensors of one update or weight file; the largest models have a tenth of it."""

MAX_DIMENSIONS = 8
MAX_TENSOR_NAME = 1024
MAX_VERSION_LENGTH = 1024


def name_problem(name: str) -> str:
    """Why no tensor has this name, in words that do without it; "" where one may."""
    if len(name) > MAX_TENSOR_NAME:
        return f"a tensor has a name of over {MAX_TENSOR_NAME} characters"
    return "" if name.isascii() or name == encodable(name) else f"a tensor's name is not Unicode text: {ascii(name)}"


def shape_problem(shape: Sequence[Any]) -> str:
    """Why no tensor has this shape, as in "has 100000 dimensions"; "" where one may. Look before multiplying."""
    if len(shape) > MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions, at most {MAX_DIMENSIONS} may be"
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 63:
            return "has a size that is not an integer from 0 to 2^63 - 1"
    return ""


class BufferEntry(msgspec.Struct, frozen=True, array_like=True):
    """A tensor inside an upload buffer, or a piece of it: its place in the session's manifest and its byte offset.

    The piece is `num_bytes` of the tensor from its byte `start` on; None: all from there. `replaces` says that the
    tensor may have been staged by a call that did not succeed: what that call brought is forgotten.
    """

    index: int
    offset: int
    start: int = 0
    num_bytes: int | None = None
    replaces: bool = False


class BufferRef(msgspec.Struct, frozen=True, array_like=True, tag="host"):
    """A shared-memory buffer another process of this engine may map: a path it can open, and its size in bytes."""

    path: str
    size: int


class DeviceArea(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a device that another process of this machine may map: `size` of them, `offset` into the allocation that
    the driver's `handle` names. For memory of the very process `handle` is empty, and `offset` is its address."""

    handle: bytes
    offset: int
    size: int


class DeviceRef(msgspec.Struct, frozen=True, array_like=True, tag="device"):
    """Memory of devices: areas that count as one after the other, though they lie anywhere."""

    areas: tuple[DeviceArea, ...]

    @property
    def size(self) -> int:
        """Bytes there are."""
        return sum(area.size for area in self.areas)


DEFAULT_GROUP: Final = "weight_update_group"
"""The name of a trainer's group where none is given."""
TRANSFER_GROUP: Final = "vllm_weight_transfer"
"""Of the one that vLLM's calls make."""
SEPARATE: Final = -1
TOGETHER: Final = 1 << 62
"""Packings of tensors that are broadcast: they go in one until their bytes are more than so many."""


class UpdateReport(msgspec.Struct, frozen=True):
    """What an update did. `pause_ms` is how long no step could run because of it."""

    version: str
    epoch: int
    num_tensors: int
    num_bytes: int
    mode: str
    pause_ms: float
    num_aborted: int = 0


class SaveReport(msgspec.Struct, frozen=True):
    """What a save wrote at `path`, a folder or a URL: the weights of `version`, of which `num_bytes` are tensors.
    `num_reused` of its files are those that an interrupted save had left."""

    path: str
    version: str
    epoch: int
    num_tensors: int
    num_bytes: int
    num_files: int
    num_reused: int = 0


class UpdateBegun(msgspec.Struct, frozen=True):
    """`mode` is what "auto" became."""

    session_id: int
    mode: str


class UpdateExtended(msgspec.Struct, frozen=True):
    """`first_index` is the place of the first of them in the session's manifest. `num_missing` tensors of the model
    have not been named yet."""

    first_index: int
    num_missing: int


class WeightsDescription(msgspec.Struct, frozen=True):
    """The tensors of the model, each with its digest, and by rank the parameters that hold them. `stamp` as in
    `WeightPart`."""

    version: str
    epoch: int
    stamp: int
    tensors: tuple[TensorInfo, ...]
    parameters: tuple[tuple[TensorInfo, ...], ...]
