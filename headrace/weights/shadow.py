"""Memory beside the live parameters, where an update waits for its commit. Owns whether there is room for it, and the
part of their twin, where they have one, in an update. Must not know what is staged.

A complete update goes to the twin: as much memory as all parameters lie in, which its commit exchanges with theirs.
Memory of its own is for one that brings a part of them, which its commit copies: to exchange all, the rest would have
to be copied first. It is also for where a twin finds no room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from headrace.config.machine import available_memory
from headrace.types.errors import WeightUpdateError
from headrace.weights.weight_map import WeightRule

logger = logging.getLogger(__name__)

SHADOW_HEADROOM_BYTES = 256 << 20
"""Memory that must stay free beside the shadow, for activations and the producer."""

Memories = dict[str, list[torch.Tensor]]
"""By tensor, memory for each of its pieces, of the shape of the piece's target."""


class Twin(Protocol):
    """As much memory as all parameters lie in, at other addresses; see `headrace.runner.occupation.BlockTwin`."""

    def take(self, spare_bytes: int | None) -> list[torch.Tensor] | None: ...

    def exchange(self) -> None: ...

    def put(self) -> None: ...


class ShadowMemory:
    """What is beside `live`, which are all parameters: their `twin` has as many, in that order. `left` is how many
    bytes may be taken of other memory."""

    def __init__(self, live: Mapping[str, torch.Tensor], twin: Twin | None, left: Callable[[], int]) -> None:
        self._live, self._twin, self._left = live, twin, left
        self._beside: dict[str, torch.Tensor] = {}  # the twin's parameters, while an update has them
        self._is_complete = False

    def open(self, *, partial: bool) -> Mapping[str, torch.Tensor]:
        """An update begins. The parameters of the twin, if it goes there: any does if there is one, but only one that
        is complete has it made."""
        found = self._twin.take(None if partial else SHADOW_HEADROOM_BYTES) if self._twin is not None else None
        self._beside = dict(zip(self._live, found, strict=True)) if found else {}
        self._is_complete = not partial
        return self._beside

    def close(self) -> None:
        """The update is over. A twin stays for the next one."""
        if self._twin is not None and self._beside:
            self._twin.put()
        self._beside = {}

    def end(self) -> None:
        """There will be no more updates."""
        self.close()
        self._twin = None

    def exchange(self) -> bool:
        """Make what the twin holds live, all of which is there. False: what was staged is to be copied, if any was."""
        if self._twin is None or not (self._beside and self._is_complete):
            return False
        self._twin.exchange()
        return True

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many of the parameters' bytes fit beside them."""
        return bool(self._beside) or num_bytes + SHADOW_HEADROOM_BYTES <= self._left()

    def memories(
        self, rules: Sequence[WeightRule], live: Callable[[str], Sequence[torch.Tensor]], *, is_needed: bool
    ) -> Memories | None:
        """Memory for these tensors, of which a name's `live` memory has the shapes. None, or if it `is_needed`
        `WeightUpdateError`, where there is no room."""
        if self._beside:
            return {
                rule.hf_name: [self._beside[each.param][each.target.slices] for each in rule.pieces] for rule in rules
            }
        shapes = {rule.hf_name: live(rule.hf_name) for rule in rules}
        num_bytes = sum(memory.nbytes for memories in shapes.values() for memory in memories)
        found = memory_beside(shapes) if self.has_room(num_bytes) else None
        if found is None and is_needed:
            raise self.no_room(num_bytes)
        return found

    def no_room(self, num_bytes: int) -> WeightUpdateError:
        """Why a shadow is refused."""
        message = f"shadow needs {num_bytes} bytes and headroom, {self._left()} are available; use inplace"
        return WeightUpdateError(message, field="mode")


def memory_beside(live: Mapping[str, Sequence[torch.Tensor]]) -> Memories | None:
    """Memory for as much as each of these holds; None where there is no room for it after all."""
    try:
        return {
            name: [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in memories]
            for name, memories in live.items()
        }
    except torch.OutOfMemoryError:  # what the allocator keeps for graphs looks free, and is in pieces
        logger.warning("the weights of %d tensors found no room beside the live ones", len(live))
    torch.cuda.empty_cache()  # of what was had before that
    return None


def memory_left(device: torch.device) -> Callable[[], int]:
    """How many bytes may be taken on a device: also what the allocator keeps but nobody uses."""
    if device.type == "cpu":
        return available_memory

    def left() -> int:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused

    return left
