"""Moving one tensor of an update into its place, in slices, with its checks.

Owns `StageWork` and what it takes from any tensor: dtype names, which tensors can be read at all, block-wise copies,
digests, the search for NaN and infinity. Must not know sessions, versions or which memory is live: it is handed a
destination.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from headrace.types.errors import WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights.weight_map import num_elements

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BLOCK_BYTES = 1 << 18
"""Bytes copied between two looks at the clock: small enough to stay well under a millisecond, checks included."""

Bytes = npt.NDArray[np.uint8]


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a torch dtype, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor in row-major order: on CPU a view of its memory, elsewhere a copy."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def row_blocks(shape: tuple[int, ...], element_size: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices of axis 0 that cover it in order, each of about `block_bytes`."""
    row_bytes = num_elements(shape[1:]) * element_size
    num_rows = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, shape[0], num_rows):
        yield slice(start, min(start + num_rows, shape[0]))


def digest_of(tensor: torch.Tensor) -> str:
    """Lowercase hex SHA-256 of a tensor's bytes in row-major order, whatever the device."""
    hasher = hashlib.sha256()
    for rows in row_blocks(tuple(tensor.shape), tensor.element_size()):
        hasher.update(bytes_of(tensor[rows]).data)
    return hasher.hexdigest()


def unreadable(tensor: torch.Tensor) -> str:
    """Why the elements of a tensor cannot be copied as they are, as in "is a sparse_coo tensor"; "" where they can."""
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}, which stands for memory elsewhere"
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.layout is not torch.strided:
        return f"is a {str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.is_quantized:
        return "is a quantized tensor"
    if tensor.is_meta:
        return "is on the meta device: it has no values"
    if tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        num_needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        num_bytes = tensor.untyped_storage().nbytes()
        if num_bytes < num_needed:
            return f"needs {num_needed} bytes of its storage, which holds {num_bytes}: its memory was freed"
    return ""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. One pass: no sum over either is finite, and only where a sum
    overflows is every element looked at."""
    is_short = tensor.dtype == torch.float16  # 65,504 is soon passed
    total = float(tensor.sum(dtype=torch.float32) if is_short else tensor.sum())
    return math.isfinite(total) or bool(tensor.isfinite().all())


class Source(Protocol):
    """Where the elements of one tensor come from."""

    info: TensorInfo

    def copy_rows(self, rows: slice, destination: torch.Tensor) -> None:
        """Write these rows, converted, into `destination`."""
        ...


TensorData = torch.Tensor | Source
"""A tensor of this process, or one that is read when it is copied."""


class BytesSource:
    """A tensor as raw bytes in the manifest's dtype and shape, read-only or not, aligned or not."""

    def __init__(self, info: TensorInfo, data: memoryview) -> None:
        self.info = info
        self._dtype = TORCH_DTYPES[info.dtype]
        self._tail = info.shape[1:]
        self._row_bytes = num_elements(self._tail) * self._dtype.itemsize
        expected = info.shape[0] * self._row_bytes
        if data.nbytes != expected:
            raise WeightUpdateError(f"{info.name} has {data.nbytes} bytes, expected {expected}", field=info.name)
        self._bytes: Bytes = np.frombuffer(data, dtype=np.uint8)

    def copy_rows(self, rows: slice, destination: torch.Tensor) -> None:
        """Write these rows, converted, into `destination`."""
        found = self._bytes[rows.start * self._row_bytes : rows.stop * self._row_bytes]
        if destination.device.type == "cpu" and destination.dtype == self._dtype:
            assert destination.is_contiguous(), "a region is whole rows of a parameter"
            bytes_of(destination)[:] = found
            return
        # A copy owns its memory: torch neither warns about read-only buffers nor sees unaligned ones.
        block = torch.from_numpy(found.copy()).view(self._dtype)
        destination.copy_(block.view(rows.stop - rows.start, *self._tail))


class TensorSource:
    """A tensor of this process, on any device, contiguous or not."""

    def __init__(self, info: TensorInfo, data: torch.Tensor) -> None:
        problem = unreadable(data)
        if problem:
            raise WeightUpdateError(f"{info.name} {problem}", field=info.name)
        self.info = info
        self._tensor = data.detach()

    def copy_rows(self, rows: slice, destination: torch.Tensor) -> None:
        """Write these rows, converted, into `destination`."""
        destination.copy_(self._tensor[rows])


def info_of(name: str, data: TensorData) -> TensorInfo:
    """What a tensor is, without its values."""
    return TensorInfo(name, tuple(data.shape), dtype_name(data.dtype)) if isinstance(data, torch.Tensor) else data.info


def source_of(info: TensorInfo, data: memoryview | TensorData) -> Source:
    """Wrap what a caller stages; `WeightUpdateError` naming the tensor if it is not what the manifest says."""
    if isinstance(data, memoryview):
        return BytesSource(info, data)
    found = info_of(info.name, data)
    if (tuple(found.shape), found.dtype) != (tuple(info.shape), info.dtype):
        is_and_says = f"is {found.dtype} {list(found.shape)}, the manifest says {info.dtype} {list(info.shape)}"
        raise WeightUpdateError(f"{info.name} {is_and_says}", field=info.name)
    return TensorSource(info, data) if isinstance(data, torch.Tensor) else data


class StageWork:
    """The copy of one tensor, done in slices. Holds the caller's buffer until it is done, failed or dropped.

    `destination` is memory of the tensor's shape in the engine's dtype, live memory if `is_live`. `before_write` is
    called ahead of every block and raises if the update is no longer open; `check`, if there is one, is shown what was
    written, on a CPU block by block, elsewhere once. If `hashes` is true, the bytes written are digested on the way;
    `on_done` receives the hex digest ("" if not asked for). Both may raise `WeightUpdateError`, and then the tensor
    does not count as staged.
    """

    def __init__(
        self,
        source: Source,
        destination: torch.Tensor,
        *,
        is_live: bool,
        before_write: Callable[[], None],
        on_done: Callable[[str], None],
        hashes: bool,
        check: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.is_live = is_live
        self._source: Source | None = source
        self._destination = destination
        self._blocks = row_blocks(tuple(destination.shape), destination.element_size())
        self._before_write = before_write
        self._on_done = on_done
        self._check = check
        self._hasher = hashlib.sha256() if hashes else None
        self.is_done = False

    def advance(self, deadline_s: float) -> bool:
        """Copy until done or until about `deadline_s` seconds have passed, at least one block; True when done.

        Raises `WeightUpdateError` for a digest or a tied tensor that does not match, or what the check refuses,
        `CheckpointError` for a file that changed, `UpdateConflictError` if the update was aborted or committed
        meanwhile. Done, it has released the buffer.
        """
        if self.is_done:
            return True
        stop_at = time.perf_counter() + deadline_s
        for rows in self._blocks:
            self._copy(rows)
            if time.perf_counter() >= stop_at:
                break
        else:
            self._finish()
        return self.is_done

    def _copy(self, rows: slice) -> None:
        assert self._source is not None, "a failed stage is not advanced again"
        self._before_write()
        block = self._destination[rows]
        self._source.copy_rows(rows, block)
        if self._check and block.device.type == "cpu":  # while the block is in the cache
            self._check(block)
        if self._hasher:
            self._hasher.update(bytes_of(block).data)

    def _finish(self) -> None:
        self._source = None
        self._before_write()
        if self._check and self._destination.device.type != "cpu":
            self._check(self._destination)
        self._on_done(self._hasher.hexdigest() if self._hasher else "")
        self.is_done = True
