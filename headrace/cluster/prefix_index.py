"""What each replica was sent lately, as the beginnings of prompts. An estimate of what its prefix cache holds.

Owns how a prompt is cut into blocks, and how much is remembered. Works on the bytes of prompts as clients wrote them,
so that text, token ids and chats need no tokenizer: prompts that begin with the same bytes share a prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_BYTES = 256
MAX_BLOCKS = 4096
"""Of one prompt; what comes after the first mebibyte is not looked at."""


def blocks_of(prompt: bytes) -> tuple[int, ...]:
    """A name for each beginning of `prompt`: its first block, its first two, and so on; the last one may be cut short.
    Prompts have a name in common exactly if they begin with the same blocks, up to collisions of 64 bits."""
    name, starts = 0, range(0, min(len(prompt), MAX_BLOCKS * BLOCK_BYTES), BLOCK_BYTES)
    return tuple([name := hash((name, prompt[start : start + BLOCK_BYTES])) for start in starts])


class PrefixIndex:
    """For each replica the blocks it was sent last, at most `max_blocks` of them."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._held: dict[int, OrderedDict[int, None]] = {}

    @property
    def num_blocks(self) -> int:
        """Of all replicas."""
        return sum(map(len, self._held.values()))

    def match(self, number: int, blocks: Sequence[int]) -> int:
        """How many of the first `blocks` the replica was sent, without a gap."""
        held = self._held.get(number)
        if held is None:
            return 0
        for position, block in enumerate(blocks):
            if block not in held:
                return position
        return len(blocks)

    def insert(self, number: int, blocks: Sequence[int]) -> None:
        """A replica is sent a prompt. The oldest blocks give way, of one prompt the last ones before the first."""
        held = self._held.setdefault(number, OrderedDict())
        move_to_end = held.move_to_end
        for block in reversed(blocks):
            if block in held:
                move_to_end(block)
            else:
                held[block] = None
        while len(held) > self._max_blocks:
            held.popitem(last=False)

    def forget(self, number: int) -> None:
        """A replica holds nothing any more."""
        self._held.pop(number, None)
