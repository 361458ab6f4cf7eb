"""The memory of one device by tag: what weights and KV pools are taken from, given back and taken again.

Owns the blocks of each tag, which keep their addresses, whether the weights' has a twin, and the host's copy of
released weights. Captured graphs are torch's memory: they are dropped, and captured again. Must not know what is in
blocks, states or requests (`headrace.core.releasing`).
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

Shape = tuple[tuple[int, ...], torch.dtype]
Lay = Callable[[Tensor], list[Tensor]]


class Block(Protocol):
    """Memory that may go and come, at one address; see `HostBlock`. After `resume` it is zero."""

    bytes: Tensor

    def release(self) -> None: ...

    def resume(self) -> None: ...


class CapturedGraphs(Protocol):
    """Whoever has captured graphs; see `StepRunner`."""

    def drop_graphs(self) -> None: ...

    def capture_again(self) -> Iterator[None]: ...


class BlockTwin:
    """The twin of a block for whoever has tensors in the block, which `lay` finds in its bytes; see
    `headrace.weights.shadow.Twin`. It is kept from one update to the next, as taking and releasing it takes longer than
    a step."""

    def __init__(self, block: DeviceBlock, lay: Lay, device: torch.device) -> None:
        self._block, self._lay, self._device = block, lay, device
        self._is_taken = False
        self._torch_bytes = 0  # that torch has had, for steps too, before it gave any back

    def take(self, spare_bytes: int | None) -> list[Tensor] | None:
        """The same tensors in the twin, of whatever values, until it is `put`. None where there is no twin, and no room
        for one with so many bytes to spare, or with None as it is not to be made."""
        try:
            if not self._block.has_twin and (spare_bytes is None or not self._has_room(spare_bytes)):
                return None
            found = self._lay(self._block.twin())
        except torch.OutOfMemoryError as error:  # others take memory too
            logger.warning("no room beside the weights after all: %s", error)
            return None
        self._is_taken = True
        return found

    def _has_room(self, spare_bytes: int) -> bool:
        """What torch keeps, or will take again, is the steps'."""
        free: int = torch.cuda.mem_get_info(self._device)[0]
        given_back = max(0, self._torch_bytes - torch.cuda.memory_reserved(self._device))
        return free >= self._block.bytes.nbytes + spare_bytes + given_back

    def exchange(self) -> None:
        """As `DeviceBlock.exchange`, when the device has done what this thread has enqueued."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._block.exchange()

    def put(self) -> None:
        """No update has it any more."""
        self._is_taken = False

    def let_go(self) -> None:
        """Give its memory back, unless an update has it; torch may be about to do the same."""
        self._torch_bytes = max(self._torch_bytes, torch.cuda.memory_reserved(self._device))
        if not self._is_taken:
            self._block.drop_twin()


class Occupation:
    """The blocks of one device. Without `is_saver` a CUDA device has one, for weights; other tensors torch makes, for
    good. Where it `shares_process` with a caller it makes weights too: what is free between two updates is his then as
    soon as his torch runs short, and the driver's would not be.

    `reload` brings the weights that the start loaded, in slices; whoever loads them sets it. So does with `graphs`
    whoever captures some.
    """

    def __init__(self, device: torch.device, *, is_saver: bool, shares_process: bool = False) -> None:
        self.reload: Callable[[], Iterator[None]] = lambda: iter(())
        self.graphs: CapturedGraphs | None = None
        self._device = device
        self._is_saver = is_saver
        self._shares_process = shares_process
        self._twins: list[BlockTwin] = []
        self._blocks: dict[MemoryTag, list[Block]] = {tag: [] for tag in MEMORY_TAGS}
        self._copy: list[Tensor] = []

    def allocate(self, tag: MemoryTag, shapes: Sequence[Shape]) -> list[Tensor]:
        """Zeros of these shapes and dtypes, in one block. Raises `OSError`, `OverflowError` or `torch.OutOfMemoryError`
        where memory does not hold it."""
        if self._is_cuda and not self._is_saver:
            return [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in shapes]
        block, lay = self._take(tag, shapes)
        return lay(block.bytes)

    def parameters(self, shapes: Sequence[Shape]) -> tuple[list[Tensor], BlockTwin | None]:
        """As `allocate`, of weights, with their twin on a device."""
        if self._is_cuda and self._shares_process and not self._is_saver:
            return self.allocate("weights", shapes), None
        block, lay = self._take("weights", shapes)
        twin = BlockTwin(block, lay, self._device) if isinstance(block, DeviceBlock) else None
        self._twins += [twin] if twin is not None else []
        return lay(block.bytes), twin

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
        self.let_twins_go()
        self._twins = []
        self._blocks = {tag: [] for tag in self._blocks}
        self._copy = []
        self.graphs = None

    def let_twins_go(self) -> None:
        """Give back what is kept for the next update."""
        for twin in self._twins:
            twin.let_go()

    def _taken(self, tags: Collection[MemoryTag]) -> Iterator[None]:
        """Blocks are taken at once, then graphs are captured in slices: that runs nothing, so it needs no values."""
        try:
            self.let_twins_go()
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
        self.let_twins_go()
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

    def _take(self, tag: MemoryTag, shapes: Sequence[Shape]) -> tuple[Block, Lay]:
        """A block for tensors of these shapes, each aligned, and where in its bytes they are."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)

        def lay(data: Tensor) -> list[Tensor]:
            parts = zip(shapes, starts, sizes, strict=False)
            return [data[at : at + size].view(dtype).view(shape) for (shape, dtype), at, size in parts]

        block = self._block(starts[-1])
        self._blocks[tag].append(block)
        return block, lay

    def _block(self, num_bytes: int) -> Block:
        return DeviceBlock(num_bytes, self._device) if self._is_cuda else HostBlock(num_bytes)

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"
