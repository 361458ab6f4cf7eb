"""Reading tensors as they are in memory, a slice at a time: their digests, and their bytes. Owns how much is read at
once. Must not know which tensors they are, or updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from headrace.weights.position_sum import PositionKeys, PositionSum
from headrace.weights.region import Region
from headrace.weights.staging import BLOCK_BYTES, SideReader, row_blocks

Digests = Iterator[tuple[str, str] | None]
"""None after a slice, or the name and the digest of a tensor that is complete."""

DEVICE_SLICE_BYTES = 1 << 30
_DEVICE_SLICE_PARTS = 256


def bytes_in_slices(region: Region, start: int, into: memoryview, reader: SideReader) -> Iterator[None]:
    """Fill `into` with the bytes of a tensor from byte `start` on, a block at a time."""
    num_copied, size = 0, region.dtype.itemsize
    for block in reader.blocks(region, start // size, len(into) // size):
        into[num_copied : num_copied + len(block)] = block
        num_copied += len(block)
        yield


Read = Callable[[Region, slice], Iterable[tuple[torch.Tensor, int]]]
"""Some elements, and how often they are in a digest."""


def digests_in_slices(
    regions: Iterable[tuple[str, Region]], keys: PositionKeys, reader: SideReader, *, is_held: bool = False
) -> Digests:
    """The `position_sum` of each tensor: this rank's part, or as it `is_held`, which ranks that hold the same have the
    same."""
    reckon = _on_host if keys.device.type == "cpu" else _on_device
    return reckon(regions, keys, reader, _held if is_held else Region.counted)


def _held(region: Region, part: slice) -> Iterable[tuple[torch.Tensor, int]]:
    return [(region.read(part), 1)]


def _on_host(regions: Iterable[tuple[str, Region]], keys: PositionKeys, reader: SideReader, read: Read) -> Digests:
    for name, region in regions:
        total = PositionSum(keys)
        for part in row_blocks((region.num_elements,), region.dtype.itemsize, BLOCK_BYTES):
            if part.start:
                yield None
            with reader.using():
                for block, times in read(region, part):
                    total.add(block, part.start, times)
        yield name, total.hexdigest()


def _on_device(regions: Iterable[tuple[str, Region]], keys: PositionKeys, reader: SideReader, read: Read) -> Digests:
    """Many tensors at a time, and large ones in pieces: each slice is a launch, which is waited for."""
    parts: list[tuple[str, Region, slice, PositionSum]] = []
    num_bytes = 0
    for name, region in regions:
        total = PositionSum(keys)
        for part in row_blocks((region.num_elements,), region.dtype.itemsize, DEVICE_SLICE_BYTES):
            if num_bytes >= DEVICE_SLICE_BYTES or len(parts) == _DEVICE_SLICE_PARTS:
                yield from _reckon(parts, keys, reader, read)
                yield None
                parts, num_bytes = [], 0
            parts.append((name, region, part, total))
            num_bytes += (part.stop - part.start) * region.dtype.itemsize
    yield from _reckon(parts, keys, reader, read)


def _reckon(
    parts: list[tuple[str, Region, slice, PositionSum]], keys: PositionKeys, reader: SideReader, read: Read
) -> Iterator[tuple[str, str]]:
    from headrace.kernels.triton.weight_pieces import move_rows, row_of

    with reader.using():
        found = [(*each, part, total) for _, region, part, total in parts for each in read(region, part)]
        rows = [row_of(block, None, part.start) for block, _, part, _ in found]
        results = move_rows(rows, keys.words).tolist()
    for (_, times, _, total), lanes in zip(found, results, strict=True):
        total.add_lanes(lanes, times)
    for name, region, part, total in parts:
        if part.stop == region.num_elements:
            yield name, total.hexdigest()
