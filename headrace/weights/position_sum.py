"""The digest of live weights: a 128-bit sum of a tensor's elements, keyed by position, computed where the memory is.

The bytes of a tensor in Hugging Face layout, row-major and little-endian, in the dtype of its parameter, are read as
signed 16-bit integers u[0], u[1], ... (a float32 is two of them). With the keys below, modulo 2^64, for lanes 0 and 1:

    sum[lane] = sum over j of u[j] * key[lane][0][j % 4096] * key[lane][1][j // 4096 % 4096]
                                   * key[lane][2][j // 4096^2 % 4096] * key[lane][3][j // 4096^3 % 4096]

The digest is both sums as 16 lowercase hex digits each, lane 0 first. `key` is the SHAKE-256 stream of the ASCII bytes
"headrace position sum", as little-endian 64-bit words in the order [2][4][4096], the lowest bit of each set.

So it adds up: over blocks, boxes and ranks, in any order, where what is not held counts as zero (`add_digests`). All
keys are odd: one changed element always changes both sums. It finds errors, not forgers; files have SHA-256.

Test vector, of [1.0, -2.0, 0.5]: 81eb2f2cad54fb80eccf67489b10e680 in bfloat16, b069bebb4168aa8055e42c509d49b980 in
float32.

Owns the algorithm. Must not know names, regions or updates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

DIGEST_LENGTH = 32

_WIDTH = 4096
_LANES, _DIGITS = 2, 4
_LIMB_BITS = 24
_NUM_LIMBS = 3
_CHUNK_UNITS = 1 << 17
"""What a CPU adds at once, as 64-bit numbers in its cache. It divides 4096 rows."""


class PositionKeys:
    """The keys, on one device: `words` as int64 [digit, 4096, lane].

    A CPU sums rows of 4096 units by `limbs`, which are key 0 as [unit, lane and limb], three limbs of 24 bits each, and
    `scales` what the limbs count for. The sums are multiplied by `of_rows`.
    """

    def __init__(self, device: torch.device) -> None:
        stream = hashlib.shake_256(b"headrace position sum").digest(_LANES * _DIGITS * _WIDTH * 8)
        words = np.frombuffer(stream, dtype="<u8").reshape(_LANES, _DIGITS, _WIDTH) | np.uint64(1)
        shifts = np.arange(_NUM_LIMBS, dtype=np.uint64) * np.uint64(_LIMB_BITS)
        limbs = (words[:, 0].T[:, :, None] >> shifts) & np.uint64((1 << _LIMB_BITS) - 1)
        self.device = device
        self.limbs = torch.from_numpy(limbs.reshape(_WIDTH, -1).astype(np.float64))
        self.scales = torch.from_numpy((np.uint64(1) << shifts).view(np.int64))
        self.words = torch.from_numpy(words.view(np.int64).transpose(1, 2, 0).copy()).to(device)
        self.of_first_rows = self.of_rows(0)

    def of_rows(self, group: int) -> torch.Tensor:
        """What each of 4096 rows of 4096 units is multiplied by, as [row, lane]; `group` counts such squares."""
        return self.words[1] * self.words[2, group % _WIDTH] * self.words[3, group // _WIDTH]


class PositionSum:
    """The sum over elements of one tensor, as far as they were added."""

    def __init__(self, keys: PositionKeys) -> None:
        self._keys = keys
        self._group, self._of_rows = 0, keys.of_first_rows
        self._lanes = [0] * _LANES

    def add(self, block: torch.Tensor, start: int, times: int = 1) -> None:
        """Elements `start` on, flat and contiguous, so many times. Waits for a device."""
        if block.device.type != "cpu":
            from headrace.kernels.triton.weight_pieces import move_rows, row_of

            self.add_lanes(move_rows([row_of(block, None, start)], self._keys.words)[0].tolist(), times)
            return
        units = block.view(torch.int16)
        first = start * (block.element_size() // 2)
        at, end = first, first + len(units)
        while at < end:
            stop = min(end, at + _CHUNK_UNITS - at % _CHUNK_UNITS)
            self._add(units if stop - at == len(units) else units[at - first : stop - first], at, times)
            at = stop

    def add_lanes(self, lanes: Sequence[int], times: int = 1) -> None:
        """What a device has made of some elements, so many times."""
        self._lanes = [mine + times * more for mine, more in zip(self._lanes, lanes, strict=False)]

    def hexdigest(self) -> str:
        """The digest of what was added."""
        return _shown(self._lanes)

    def _add(self, units: torch.Tensor, first: int, times: int) -> None:
        row, offset = divmod(first, _WIDTH)
        end = offset + len(units)
        num_rows = -(-end // _WIDTH)
        width = end if num_rows == 1 else _WIDTH
        padding = (offset, num_rows * width - end)
        rows = (torch.nn.functional.pad(units, padding) if any(padding) else units).view(num_rows, width)
        sums = self._by_product(rows)
        group, row = divmod(row, _WIDTH)
        if group != self._group:
            self._group, self._of_rows = group, self._keys.of_rows(group)
        sums *= self._of_rows[row : row + num_rows]
        self.add_lanes(sums.sum(0).tolist(), times)

    def _by_product(self, rows: torch.Tensor) -> torch.Tensor:
        """The sums of each row as [row, lane], in one matrix product: of the keys in limbs of 24 bits all sums stay
        below 2^51, where float64 is exact in any order."""
        limbs = (rows.to(torch.float64) @ self._keys.limbs[: rows.shape[1]]).to(torch.int64)
        return (limbs.view(-1, _LANES, _NUM_LIMBS) * self._keys.scales).sum(2)


def position_digest(flat: torch.Tensor, keys: PositionKeys) -> str:
    """The digest of a whole tensor, flat and contiguous."""
    total = PositionSum(keys)
    total.add(flat, 0)
    return total.hexdigest()


def digest_of(lanes: Sequence[int]) -> str:
    """The digest that two sums are."""
    return _shown(lanes[:_LANES])


def add_digests(*digests: str) -> str:
    """The digest of a tensor of which ranks hold parts, from theirs."""
    lanes = [[int(digest[at : at + 16], 16) for digest in digests] for at in (0, 16)]
    return _shown([sum(lane) for lane in lanes])


def _shown(lanes: Sequence[int]) -> str:
    return "".join(f"{lane % (1 << 64):016x}" for lane in lanes)
