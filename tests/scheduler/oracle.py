"""What every request must get, computed alone and at once: sampling here is a pure function of seed, position, prefix.
A prefix is what KV depends on beside the weights: the caller's key and the units of all positions.

The device of these tests hands out the true token of a position only after checking that every KV cell before it holds
what the true prefix would have written, so outputs are right only if all that was attended to was right.
"""

from __future__ import annotations

import struct
import zlib

from headrace.types.request import Request, unpack_ids

VOCAB_SIZE = 5
_MASK = (1 << 61) - 1


def empty_prefix(extra_key: str) -> int:
    """Hash of a prefix of no units."""
    return 1 + zlib.crc32(extra_key.encode())


def extend(prefix_hash: int, unit: int) -> int:
    """Hash of a prefix with one more unit."""
    return (prefix_hash * 1_000_003 + unit + 1) * 0x9E3779B97F4A7C15 & _MASK


def cell_value(epoch: int, prefix_hash: int) -> int:
    """What the KV of a position holds: it depends on the weights and on all units up to it."""
    return prefix_hash * 64 + epoch


def sample(seed: int, position: int, prefix_hash: int, masked: frozenset[int]) -> int:
    """The token at `position` after a prefix, drawn from the ids that are not masked."""
    noise: int = extend(extend(prefix_hash, seed), position) >> 20
    choices: list[int] = [token for token in range(VOCAB_SIZE) if token not in masked] or [0]
    return int(choices[noise % len(choices)])


def logprob(seed: int, position: int) -> float:
    """A float32 that says whose and which position it belongs to."""
    return float(struct.unpack("f", struct.pack("f", -(seed * 1000 + position) / 7.0))[0])


class Truth:
    """The tokens of one request, prompt first, as far as anyone asks: overshoot beyond its end included.

    `units` are those of its prompt, where they are not its ids.
    """

    def __init__(self, request: Request, context_length: int, units: bytes) -> None:
        self.request = request
        self.prompt: list[int] = unpack_ids(request.prompt).tolist()
        self._units: list[int] = unpack_ids(units).tolist()
        self._tokens: list[int] = list(self.prompt)
        self._hashes: list[int] = []
        self._stops = frozenset(request.stop_token_ids)
        self.min_length = len(self.prompt) + request.min_new_tokens
        self.max_length = len(self.prompt) + min(request.max_new_tokens, context_length - len(self.prompt))

    def token(self, position: int) -> int:
        """The token at an absolute position."""
        while len(self._tokens) <= position:
            masked = self._stops if len(self._tokens) < self.min_length else frozenset[int]()
            last = len(self._tokens)
            self._tokens.append(sample(self.request.seed, last, self.prefix_hash(last - 1), masked))
        return self._tokens[position]

    def prefix_hash(self, position: int) -> int:
        """Hash of the units up to and including `position`."""
        while len(self._hashes) <= position:
            before = self._hashes[-1] if self._hashes else empty_prefix(self.request.extra_key)
            self._hashes.append(extend(before, self._unit(len(self._hashes))))
        return self._hashes[position]

    def _unit(self, position: int) -> int:
        return self._units[position] if position < len(self._units) else self.token(position)

    def output(self) -> tuple[list[int], int | None]:
        """The whole output, and the stop id that ends it (None: its length does)."""
        tokens: list[int] = []
        for position in range(len(self.prompt), self.max_length):
            token = self.token(position)
            tokens.append(token)
            if token in self._stops and position >= self.min_length:
                return tokens, token
        return tokens, None
