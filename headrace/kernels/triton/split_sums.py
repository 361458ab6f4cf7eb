"""Sums along the inputs of a product that several programs share. Owns where their parts meet and how they are added.

Each program leaves its part in a workspace, and the last to come adds them in the order of the parts, so results never
depend on who that was.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def sum_of_parts(acc, parts_ptr, arrivals_ptr, part, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(sum, whether this program is the last of its tile and has it); leaves the tile's arrivals at 0."""
    places = parts_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(places + part * (ROWS * COLUMNS), acc)
    tl.debug_barrier()  # every thread's part is written before one thread says so
    is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
        acc = tl.load(places, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(places + other * (ROWS * COLUMNS), cache_modifier=".cg")
    return acc, is_last


class ProductWorkspace:
    """Where split sums meet, for all products of one stream: each leaves it as it found it, and starts to use it only
    once the one ahead has ended."""

    NUM_SUMS = 1 << 20
    NUM_TILES = 1 << 12

    def __init__(self, device: torch.device) -> None:
        self.parts = torch.empty(self.NUM_SUMS, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(self.NUM_TILES, dtype=torch.int32, device=device)

    @classmethod
    def holds(cls, num_tiles: int, tile_size: int, num_parts: int) -> bool:
        """Whether there is room for so many tiles of `tile_size` sums in so many parts."""
        return num_parts == 1 or (num_tiles <= cls.NUM_TILES and num_tiles * tile_size * num_parts <= cls.NUM_SUMS)
