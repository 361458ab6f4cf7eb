"""Moving one tensor of an update into its place, in slices, with its checks.

Owns `StageWork` and what it takes from any tensor: dtype names, which tensors can be read at all, block-wise copies,
the search for NaN and infinity. Must not know sessions, versions or which memory is live: it is handed a
destination.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headrace.types.errors import WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights.position_sum import PositionSum
from headrace.weights.region import Region

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BLOCK_BYTES = 1 << 18
"""Bytes copied between two looks at the clock: small enough to stay well under a millisecond, checks included."""

Bytes = npt.NDArray[np.uint8]


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a torch dtype, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor in row-major order: on CPU a view of its memory, elsewhere a copy."""
    return as_bytes(tensor.detach().cpu().contiguous()).numpy()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, uint8 [size]. A tensor of one element is that with any stride, which its bytes
    must not have."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def row_blocks(shape: tuple[int, ...], element_size: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices of axis 0 that cover it in order, each of about `block_bytes`."""
    row_bytes = math.prod(shape[1:]) * element_size
    num_rows = max(1, block_bytes // max(1, row_bytes))
    if 0 < shape[0] <= num_rows:  # as most are
        yield slice(0, shape[0])
        return
    for start in range(0, shape[0], num_rows):
        yield slice(start, min(start + num_rows, shape[0]))


def unreadable(tensor: torch.Tensor) -> str:
    """Why the elements of a tensor cannot be copied as they are, as in "is a sparse_coo tensor"; "" where they can."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return "is traced by a transform of torch.func: it has no memory of its own"
    problem = unreadable_now()
    if problem:
        return problem
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
    count = tensor.numel()
    if count:
        if not tensor.is_contiguous():
            count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        num_needed = (tensor.storage_offset() + count) * tensor.element_size()
        num_bytes = tensor.untyped_storage().nbytes()
        if num_bytes < num_needed:
            return f"needs {num_needed} bytes of its storage, which holds {num_bytes}: its memory was freed"
        if not tensor.data_ptr():
            return "has no memory of its own, as a zero tensor"
    return ""


def unreadable_now() -> str:
    """Why no tensor can be copied in this thread at the moment: what reads one would be traced or faked; else ""."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "cannot be read inside a transform of torch.func"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return "cannot be read while a FakeTensorMode is active"
    return ""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. One pass: no sum over either is finite, and only where a sum
    overflows is every element looked at."""
    is_short = tensor.dtype == torch.float16  # 65,504 is soon passed
    total = float(tensor.sum(dtype=torch.float32) if is_short else tensor.sum())
    return math.isfinite(total) or bool(tensor.isfinite().all())


def not_finite(name: str, dtype: torch.dtype) -> str:
    """Why a tensor is refused."""
    return f"{name} holds NaN or infinity in {dtype_name(dtype)} (check_finite=False lets such weights in)"


class Source(Protocol):
    """Where the elements of one tensor come from."""

    info: TensorInfo

    @property
    def num_elements(self) -> int:
        """Elements there are to copy."""

    def copy(self, part: slice, destination: torch.Tensor, runs: Sequence[slice] | None = None) -> None:
        """Write these elements, converted, into `destination`, which is flat. With `runs` of them, seen from the first,
        the others need not be what they are."""


TensorData = torch.Tensor | Source
"""A tensor of this process, or one that is read when it is copied."""


class BytesSource:
    """A tensor, or a piece of one, as raw bytes in the manifest's dtype, read-only or not, aligned or not."""

    def __init__(self, info: TensorInfo, data: memoryview, start: int | None = None) -> None:
        """`data` are all bytes of the tensor, or whole elements from byte `start` on; else `WeightUpdateError`."""
        self.info = info
        self._dtype = TORCH_DTYPES[info.dtype]
        size, total = self._dtype.itemsize, math.prod(info.shape) * self._dtype.itemsize
        if start is None and data.nbytes != total:
            raise WeightUpdateError(f"{info.name} has {data.nbytes} bytes, expected {total}", field=info.name)
        start = start or 0
        if start < 0 or start % size or data.nbytes % size or start + data.nbytes > total:
            message = f"{info.name} has {total} bytes; bytes {start} to {start + data.nbytes} are no piece of it"
            raise WeightUpdateError(message, field=info.name)
        self.num_elements = data.nbytes // size
        self._bytes: Bytes = np.frombuffer(data, dtype=np.uint8)
        self._address: int = self._bytes.__array_interface__["data"][0]

    def copy(self, part: slice, destination: torch.Tensor, runs: Sequence[slice] | None = None) -> None:
        """Write these elements, converted, into `destination`, which is flat."""
        size = self._dtype.itemsize
        if destination.is_cpu and destination.dtype == self._dtype:
            ctypes.memmove(destination.data_ptr(), self._address + part.start * size, (part.stop - part.start) * size)
            return
        found = self._bytes[part.start * size : part.stop * size]
        # A copy owns its memory: torch neither warns about read-only buffers nor sees unaligned ones.
        destination.copy_(torch.from_numpy(found.copy()).view(self._dtype))


class TensorSource:
    """A whole tensor of this process, on any device, contiguous or not."""

    def __init__(self, info: TensorInfo, data: torch.Tensor) -> None:
        problem = unreadable(data)
        if problem:
            raise WeightUpdateError(f"{info.name} {problem}", field=info.name)
        self.info = info
        self.num_elements = data.numel()
        self._tensor = data.detach().reshape(-1)

    def copy(self, part: slice, destination: torch.Tensor, runs: Sequence[slice] | None = None) -> None:
        """Write these elements, converted, into `destination`, which is flat."""
        destination.copy_(self._tensor[part])


def info_of(name: str, data: TensorData) -> TensorInfo:
    """What a tensor is, without its values."""
    return TensorInfo(name, tuple(data.shape), dtype_name(data.dtype)) if isinstance(data, torch.Tensor) else data.info


def source_of(info: TensorInfo, data: memoryview | TensorData, start: int | None = None) -> Source:
    """Wrap what a caller stages; `WeightUpdateError` naming the tensor if it is not what the manifest says."""
    if isinstance(data, memoryview):
        return BytesSource(info, data, start)
    found = info_of(info.name, data)
    if (tuple(found.shape), found.dtype) != (tuple(info.shape), info.dtype):
        is_and_says = f"is {found.dtype} {list(found.shape)}, the manifest says {info.dtype} {list(info.shape)}"
        raise WeightUpdateError(f"{info.name} {is_and_says}", field=info.name)
    return TensorSource(info, data) if isinstance(data, torch.Tensor) else data


class Arrival:
    """A tensor on its way in: where it goes, how many of its elements are there, and what is reckoned of them block by
    block: `hasher`'s SHA-256 of the bytes, and `sums`, each of what is in one region at the same place.

    `destination` is live memory if `is_live`.
    """

    def __init__(
        self, destination: Region, sums: Sequence[tuple[Region, PositionSum]], *, is_live: bool, hashes: bool
    ) -> None:
        self.destination = destination
        self.is_live = is_live
        self.num_elements = 0
        self.hasher = hashlib.sha256() if hashes else None
        self.sums = sums

    @property
    def is_whole(self) -> bool:
        """All of it is there."""
        return self.num_elements == self.destination.num_elements


class Enqueued:
    """A ticket: done when the device has done all that this thread has enqueued so far, on a CPU at once. Then `then`
    is called."""

    def __init__(self, device: torch.device, then: Callable[[], None] | None = None) -> None:
        self._then = then
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()
        else:
            self.is_done()

    def is_done(self) -> bool:
        """Whether it is; waits for nothing. Raises what the device answers instead, or `then`."""
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            return False
        then, self._event, self._then = self._then, None, None
        if then is not None:
            then()
        return True


class SideStream:
    """Where a device works beside the steps in flight, without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._begun = Enqueued(device)

    def begin(self) -> None:
        """What this thread has enqueued comes before what is done here: see `is_ready`."""
        if self._stream is not None:
            self._begun = Enqueued(self.device)

    def is_ready(self) -> bool:
        """Whether that has come."""
        return self._begun.is_done()

    def using(self) -> AbstractContextManager[None]:
        """What is computed inside is done at its end."""
        return nullcontext() if self._stream is None else self._run(self._stream)

    def enqueuing(self) -> AbstractContextManager[Any]:
        """What is computed inside is enqueued here, and not waited for."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def settle(self) -> None:
        """Wait for what was enqueued here."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def _run(self, stream: torch.cuda.Stream) -> Iterator[None]:
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()


class StageWork:
    """The copy of one tensor, or of its next piece, done in slices. Holds the caller's buffer until it is done, failed
    or dropped.

    `before_write` is called ahead of every block and raises if the update is no longer open. `check`, if there is one,
    is shown what was written, block by block; on a device once, where the destination is one memory. It and `on_done`
    may raise `WeightUpdateError`, and then what was copied does not count. `has_written` once live memory may have
    changed.
    """

    def __init__(
        self,
        source: Source,
        arrival: Arrival,
        side: SideStream,
        *,
        before_write: Callable[[], None],
        on_done: Callable[[], None],
        check: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.has_written = False
        self._source: Source | None = source
        self._arrival = arrival
        self._side = side
        self._destination = arrival.destination
        self._first, self._count = arrival.num_elements, source.num_elements
        self._blocks = row_blocks((self._count,), self._destination.dtype.itemsize)
        self._before_write = before_write
        self._on_done = on_done
        self._check = check
        self.is_done = False

    @property
    def _checks_at_end(self) -> bool:
        """On a device every look at values waits for it."""
        return self._destination.device.type != "cpu" and self._destination.flat is not None

    def advance(self, budget_s: float) -> bool:
        """Copy until done or until about `budget_s` seconds have passed, at least one block; True when done.

        Raises `WeightUpdateError` for a digest or a tied tensor that does not match, or what the check refuses,
        `CheckpointError` for a file that changed, `UpdateConflictError` if the update was aborted or committed
        meanwhile. Done, it has released the buffer.
        """
        if self.is_done or not self._side.is_ready():
            return self.is_done
        stop_at = time.perf_counter() + budget_s
        with self._side.using():
            for part in self._blocks:
                self._copy(part)
                if time.perf_counter() >= stop_at:
                    break
            else:
                self._finish()
        return self.is_done

    def _copy(self, part: slice) -> None:
        assert self._source is not None, "a failed stage is not advanced again"
        self._before_write()
        place = slice(self._first + part.start, self._first + part.stop)
        if not (self._arrival.hasher or self._destination.holds_any(place)):
            return  # another rank's
        block = self._destination.write_view(place)
        self.has_written |= self._arrival.is_live and self._destination.flat is not None  # the block is live memory
        self._source.copy(part, block, None if self._arrival.hasher else self._destination.runs(place))
        if self._check and not self._checks_at_end:  # while the block is in the cache
            self._check(block)
        if self._arrival.hasher:
            self._arrival.hasher.update(bytes_of(block).data)
        self.has_written |= self._arrival.is_live
        self._destination.write_back(place, block)
        for region, total in self._arrival.sums:
            for counted, times in region.counted(place):
                total.add(counted, place.start, times)

    def _finish(self) -> None:
        self._source = None
        self._before_write()
        if self._check and self._checks_at_end:
            self._check(self._destination.read(slice(self._first, self._first + self._count)))
        self._arrival.num_elements += self._count
        self._on_done()
        self.is_done = True


class SideReader(SideStream):
    """Reads tensors of one device, as bytes on the host or where they are: after all that was enqueued before
    `begin`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._host: torch.Tensor | None = None
        if self._stream is not None:
            self._host = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)

    def begin(self) -> None:
        """What was written before this is what is read."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def blocks(self, region: Region, first: int, count: int) -> Iterator[memoryview]:
        """The bytes of so many elements, block by block; each is good until the next is asked for."""
        for part in row_blocks((count,), region.dtype.itemsize):
            yield self._bytes(region, slice(first + part.start, first + part.stop)).data

    def _bytes(self, region: Region, part: slice) -> Bytes:
        if self._host is None:
            return bytes_of(region.read(part))
        with self.using():
            block = region.read(part)
            host = self._host[: block.nbytes]
            host.copy_(block.view(torch.uint8), non_blocking=True)
        return host.numpy()
