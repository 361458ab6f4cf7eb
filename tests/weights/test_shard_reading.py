"""Of a tensor that ranks share, each reads no more than it holds: of rows and of columns."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.types.weights import TensorInfo
from headrace.weights import Box, ParamSpec, Piece, WeightMap, WeightRule
from headrace.weights.boxes import runs_of
from headrace.weights.checkpoint import Checkpoint
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

    def copy(self, part: slice, destination: torch.Tensor, runs: Sequence[slice] | None = None) -> None:
        destination.fill_(1.0)
        for run in runs or [slice(0, part.stop - part.start)]:
            self.num_read += run.stop - run.start
            destination[run].copy_(WHOLE.view(-1)[part][run])


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
@pytest.mark.parametrize("axis", [0, 1])
def test_a_rank_reads_what_it_holds(axis: int, way: str) -> None:
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
        assert source.num_read == WHOLE.numel() // NUM_RANKS
        expected = WHOLE.chunk(NUM_RANKS, axis)[rank]
        assert torch.equal(store.live["w"], expected)
    assert way == "load" or add_digests(*sums) == digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_of_a_file_no_more_is_read(axis: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Counted by the system, whichever calls are made."""
    save_file({"w": WHOLE.to(dtype)}, tmp_path / "model.safetensors")
    num_bytes = WHOLE.numel() * dtype.itemsize
    for rank in range(NUM_RANKS):
        store, tensors = store_of(rank, axis), Checkpoint(tmp_path).tensors()
        before = num_bytes_read()
        store.load(tensors)
        assert num_bytes // NUM_RANKS <= num_bytes_read() - before < num_bytes // NUM_RANKS + (1 << 14)
        assert torch.equal(store.live["w"], WHOLE.to(dtype).float().chunk(NUM_RANKS, axis)[rank])


def num_bytes_read(pid: int | str = "self") -> int:
    """By a process, from whatever it has open, since it began."""
    (line,) = (each for each in Path(f"/proc/{pid}/io").read_text().splitlines() if each.startswith("rchar"))
    return int(line.split()[1])


def test_a_sha256_takes_all_of_a_tensor() -> None:
    store, source = store_of(1, 1), CountingSource()
    sha256 = hashlib.sha256(WHOLE.numpy().tobytes()).hexdigest()
    store.begin([TensorInfo("w", (ROWS, WIDTH), "float32", sha256)], "shadow", False)
    assert store.stage(0, source).advance(1e9)
    assert source.num_read == WHOLE.numel()


def test_runs_are_what_a_box_selects() -> None:
    chance = random.Random(3)
    for _ in range(300):
        shape = tuple(chance.randint(1, 5) for _ in range(chance.randint(1, 4)))
        start = tuple(chance.randrange(size) for size in shape)
        box = Box(start, tuple(chance.randint(1, size - at) for size, at in zip(shape, start, strict=True)))
        runs = list(runs_of(shape, box))
        flat = torch.arange(torch.Size(shape).numel())
        assert torch.equal(torch.cat([flat[run] for run in runs]), flat.view(shape)[box.slices].flatten())
        assert all(one.stop < other.start for one, other in pairwise(runs)), "none could be one with the next"
