"""The memory of one device by tag: what weights and KV pools are taken from, given back and taken again.

Owns the blocks of each tag, which keep their addresses, and the host's copy of released weights. Captured graphs are
torch's memory: they are dropped, and captured again. Must not know what is in blocks, states or requests
(`headrace.core.releasing`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from headrace.runner.device_block import DeviceBlock
from headrace.runner.host_block import HostBlock
from headrace.types.errors import UnavailableError
from headrace.types.memory import MEMORY_TAGS, MemoryTag, Restore
from headrace.types.plan import RankLost

logger = logging.getLogger(__name__)

_ALIGNMENT = 512  # of each tensor in its block: torch's own on a device, more than on a CPU
_PIECE_BYTES = 256 << 20  # of a copy: what is moved between two rests


class Block(Protocol):
    """Memory that may go and come, at one address; see `HostBlock`. After `resume` it is zero."""

    bytes: Tensor

    def release(self) -> None: ...

    def resume(self) -> None: ...


class CapturedGraphs(Protocol):
    """Whoever has captured graphs; see `StepRunner`."""

    def drop_graphs(self) -> None: ...

    def capture_again(self) -> Iterator[None]: ...


class Occupation:
    """The blocks of one device. Without `is_saver` a CUDA device has none: torch makes each tensor, for good.

    `reload` brings the weights that the start loaded, in slices; whoever loads them sets it. So does with `graphs`
    whoever captures some.
    """

    def __init__(self, device: torch.device, *, is_saver: bool) -> None:
        self.reload: Callable[[], Iterator[None]] = lambda: iter(())
        self.graphs: CapturedGraphs | None = None
        self._device = device
        self._is_saver = is_saver
        self._blocks: dict[MemoryTag, list[Block]] = {tag: [] for tag in MEMORY_TAGS}
        self._copy: list[Tensor] = []

    def allocate(self, tag: MemoryTag, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """Zeros of these shapes and dtypes, in one block. Raises `OSError`, `OverflowError` or `torch.OutOfMemoryError`
        where memory does not hold it."""
        if self._is_cuda and not self._is_saver:
            return [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in shapes]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        block = self._block(starts[-1])
        self._blocks[tag].append(block)
        parts = zip(shapes, starts, sizes, strict=False)
        return [block.bytes[at : at + size].view(dtype).view(shape) for (shape, dtype), at, size in parts]

    def zeros(self, tag: MemoryTag, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `allocate`, one."""
        return self.allocate(tag, [(shape, dtype)])[0]

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        """As `Executor.release`: first the copy, then all at once."""
        if keeps_copy and "weights" in tags:
            yield from self.keep_copy()
        self._let_go(tags)

    def keep_copy(self) -> Generator[None]:
        """Copy the weights to host memory, in slices."""
        copy = []
        for part in self._parts("weights"):
            copy.append(self._host_piece(len(part)).copy_(part))
            yield
        self._copy = copy

    def drop_copy(self) -> None:
        """It is not needed any more."""
        self._copy = []

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        """As `Executor.resume`."""
        is_there = False
        try:
            yield from self._taken(tags)
            if "weights" in tags:
                yield from self._restored(restore)
            is_there = True
        finally:
            if not is_there:
                self._let_go(tags)
        if "weights" in tags:
            self.drop_copy()

    def close(self) -> None:
        """Hold no memory any more: what tensors there are keep theirs."""
        self._blocks = {tag: [] for tag in self._blocks}
        self._copy = []
        self.graphs = None

    def _taken(self, tags: Collection[MemoryTag]) -> Iterator[None]:
        """Blocks are taken at once, then graphs are captured in slices: that runs nothing, so it needs no values."""
        try:
            for tag in tags:
                for block in self._blocks[tag]:
                    block.resume()
            if "cuda_graph" in tags and self.graphs is not None:
                yield from self.graphs.capture_again()
            return
        except RankLost:
            raise
        except RuntimeError as error:  # also the driver's, of a graph
            if "out of memory" not in str(error):
                raise
            problem = str(error)
        # Raised here, as the error keeps what a capture that failed had taken.
        free = torch.cuda.mem_get_info(self._device)[0] >> 20
        wanted = sum(block.bytes.nbytes for tag in tags for block in self._blocks[tag]) >> 20
        needs = f"{wanted} MiB{' and what graphs take' if 'cuda_graph' in tags else ''}"
        message = f"{' and '.join(sorted(tags))} need {needs}, and {free} MiB of the device are free ({problem})"
        raise UnavailableError(message, field="tags")

    def _let_go(self, tags: Collection[MemoryTag]) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self._device)  # nothing may be at work on what goes
        if "cuda_graph" in tags and self.graphs is not None:
            self.graphs.drop_graphs()
        for tag in tags:
            for block in self._blocks[tag]:
                block.release()
        if self._is_cuda:
            torch.cuda.empty_cache()  # what torch keeps for its own tensors and nobody uses

    def _restored(self, restore: Restore) -> Iterator[None]:
        if restore == "copy":
            for part, piece in zip(self._parts("weights"), self._copy, strict=True):
                part.copy_(piece)
                yield
        elif restore == "disk":
            yield from self.reload()

    def _parts(self, tag: MemoryTag) -> Iterator[Tensor]:
        for block in self._blocks[tag]:
            for start in range(0, len(block.bytes), _PIECE_BYTES):
                yield block.bytes[start : start + _PIECE_BYTES]

    def _host_piece(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._is_cuda)

    def _block(self, num_bytes: int) -> Block:
        return DeviceBlock(num_bytes, self._device) if self._is_cuda else HostBlock(num_bytes)

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"
