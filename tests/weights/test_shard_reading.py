"""Of a tensor that ranks share, each reads no more than the blocks that it holds something of."""

from __future__ import annotations

import pytest
import torch

from headrace.types.weights import TensorInfo
from headrace.weights import Box, ParamSpec, Piece, WeightMap, WeightRule
from headrace.weights.position_sum import PositionKeys, add_digests, position_digest
from headrace.weights.staging import BLOCK_BYTES
from headrace.weights.store import WeightStore

NUM_RANKS = 2
ROWS = 8
WIDTH = BLOCK_BYTES // 4  # a row is a block
WHOLE = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)


class CountingSource:
    """The whole tensor, and how much of it was asked for."""

    def __init__(self) -> None:
        self.info = TensorInfo("w", (ROWS, WIDTH), "float32")
        self.num_elements = WHOLE.numel()
        self.num_read = 0

    def copy(self, part: slice, destination: torch.Tensor) -> None:
        self.num_read += part.stop - part.start
        destination.copy_(WHOLE.view(-1)[part])


def store_of(rank: int, axis: int) -> WeightStore:
    """A rank's half of the rows, or of the columns."""
    size = [ROWS, WIDTH]
    size[axis] //= NUM_RANKS
    begin = [0, 0]
    begin[axis] = rank * size[axis]
    shape = (size[0], size[1])
    piece = Piece("w", source=Box((begin[0], begin[1]), shape), target=Box((0, 0), shape))
    table = WeightMap([ParamSpec("w", shape)], [WeightRule("w", (ROWS, WIDTH), (piece,))], is_shard=True)
    return WeightStore(table, torch.float32, torch.device("cpu"), memory=lambda: 1 << 40)


@pytest.mark.parametrize("way", ["load", "shadow", "inplace"])
@pytest.mark.parametrize(("axis", "num_read"), [(0, ROWS // 2), (1, ROWS)])
def test_a_rank_reads_the_blocks_that_it_holds(axis: int, num_read: int, way: str) -> None:
    digest = position_digest(WHOLE.view(-1), PositionKeys(torch.device("cpu")))
    sums = []
    for rank in range(NUM_RANKS):
        store, source = store_of(rank, axis), CountingSource()
        if way == "load":
            store.load([("w", source)])
        else:
            store.begin([TensorInfo("w", (ROWS, WIDTH), "float32", digest)], way, False)  # type: ignore[arg-type]
            assert store.stage(0, source).advance(1e9)
            sums.append(store.take_sum(0))
            store.commit()
        assert source.num_read == num_read * WIDTH
        expected = WHOLE.chunk(NUM_RANKS, axis)[rank]
        assert torch.equal(store.live["w"], expected)
    assert way == "load" or add_digests(*sums) == digest
