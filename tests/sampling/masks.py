"""Masks of allowed tokens, packed as a plan's late patch has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.types.plan import SamplePatch


def allow(rows: list[int], allowed: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> SamplePatch:
    """A patch by which each of the rows may sample these ids only."""
    bits = np.zeros((len(rows), -(-vocab_size // 32) * 32), np.uint8)
    for row, ids in zip(bits, allowed, strict=True):
        row[ids] = 1
    return SamplePatch(np.array(rows, np.int32), np.packbits(bits, axis=1, bitorder="little").view(np.int32))
