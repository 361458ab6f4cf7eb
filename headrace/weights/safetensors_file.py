"""One safetensors file: its header, checked as a whole, and its tensors, read in pieces when they are copied.

Owns the format. Must not know folders, parameters or sessions.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Sequence

import msgspec
import torch

from headrace.config.json_bounds import MODEL_FILE, excess
from headrace.types.errors import CheckpointError
from headrace.types.weights import ELEMENT_BYTES, MAX_TENSOR_NAME, TensorInfo, shape_problem
from headrace.weights.files import OpenFile
from headrace.weights.saved import DTYPES
from headrace.weights.staging import TORCH_DTYPES, bytes_of

_MAX_HEADER_BYTES = 32 << 20  # some 3 MB for 20,000 tensors
_LENGTH = struct.Struct("<Q")

ENTRIES_PER_SLICE = 256
"""Tensors of a header that are checked at once, about a millisecond's worth."""


class _Entry(msgspec.Struct, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER, _ENTRY = msgspec.json.Decoder(dict[str, msgspec.Raw]), msgspec.json.Decoder(_Entry)


class FileTensor:
    """A tensor of an open file: nothing of it is read before it is copied. A `headrace.weights.staging.Source`."""

    def __init__(self, file: OpenFile, info: TensorInfo, offset: int) -> None:
        self.info = info
        self._file = file
        self._offset = offset

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.info.shape)

    def copy(self, part: slice, destination: torch.Tensor, runs: Sequence[slice] | None = None) -> None:
        """Write these elements, converted, into `destination`, which is flat; with `runs`, only they are read, and the
        others are zero. `CheckpointError` if the file has changed meanwhile."""
        dtype = TORCH_DTYPES[self.info.dtype]
        if destination.device.type == "cpu" and destination.dtype == dtype:
            self._read(part, destination, runs)
            return
        is_pinned = destination.device.type == "cuda"  # from there a copy to the device takes next to no time
        block = torch.empty(part.stop - part.start, dtype=dtype, device="cpu", pin_memory=is_pinned)
        self._read(part, block, runs)
        destination.copy_(block)

    def _read(self, part: slice, block: torch.Tensor, runs: Sequence[slice] | None) -> None:
        size, view = block.element_size(), bytes_of(block).data
        start = self._offset + part.start * size
        if runs is None:
            self._file.read_into(view, start)
            return
        block.zero_()
        self._file.read_ahead(start, len(view))
        for run in runs:
            self._file.read_into(view[run.start * size : run.stop * size], start + run.start * size)


def read_header(file: OpenFile) -> Generator[None, None, dict[str, tuple[TensorInfo, int]]]:
    """The tensors of a file, in the order of their data, each with its byte in the file: told at the end, after resting
    now and then. `CheckpointError` unless header and size fit as a whole."""
    try:
        size = file.state().size
        (length,) = _LENGTH.unpack(file.read(0, min(size, _LENGTH.size)))
        data_start = _LENGTH.size + length
        if length > _MAX_HEADER_BYTES or data_start > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = file.read(_LENGTH.size, length)
        too_much = excess(header, MODEL_FILE)
        if too_much is not None:
            raise ValueError(f"its header has {too_much} or more")
        found = _HEADER.decode(header)
        found.pop("__metadata__", None)
        entries: dict[str, _Entry] = {}
        for name, raw in found.items():
            entries[name] = _ENTRY.decode(raw)
            if len(entries) % ENTRIES_PER_SLICE == 0:
                yield
        return (yield from _laid_out(entries, data_start, size))
    except (ValueError, struct.error, RecursionError, msgspec.MsgspecError) as error:
        message = f"{file.path} is not a whole safetensors file: {error}"
        raise CheckpointError(message, field=file.path.name) from None


def _laid_out(
    entries: dict[str, _Entry], data_start: int, size: int
) -> Generator[None, None, dict[str, tuple[TensorInfo, int]]]:
    """Every byte of the data belongs to one tensor, whose shape and dtype it fits. Raises `ValueError`."""
    tensors: dict[str, tuple[TensorInfo, int]] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if len(name) > MAX_TENSOR_NAME:
            raise ValueError(f"a tensor's name has {len(name)} characters")
        problem = shape_problem(entry.shape)
        if problem:
            raise ValueError(f"{name} {problem}")
        first, last = entry.data_offsets
        info = TensorInfo(name, entry.shape, DTYPES.get(entry.dtype, entry.dtype))
        if first != end or not first <= last <= size:
            raise ValueError(f"{name} begins at byte {first}, the tensor before it ends at {end}")
        if info.dtype in ELEMENT_BYTES and info.num_bytes != last - first:
            raise ValueError(f"{name} of shape {list(entry.shape)} has {last - first} bytes")
        tensors[name] = info, data_start + first
        end = last
        if len(tensors) % ENTRIES_PER_SLICE == 0:
            yield
    if data_start + end != size:
        raise ValueError(f"its tensors end at byte {data_start + end}, the file has {size}")
    return tensors
