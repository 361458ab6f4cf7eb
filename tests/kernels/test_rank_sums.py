"""Sums over ranks, of which each half runs in turn: what one has to wait for is there then."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from headrace.kernels.reference import rms_norm
from headrace.kernels.triton.rank_sums import BLOCK, RankMemory, SumNorm, sum_over_ranks


class Ranks:
    """The memory of several, all in this process; sums go by words or with flags."""

    def __init__(self, num_ranks: int, num_programs: int, inbox_bytes: int, num_launches: int, way: str) -> None:
        numbers = range(num_ranks)
        self.inboxes = [torch.full((2 * num_ranks * inbox_bytes,), 0x7F, dtype=torch.uint8) for _ in numbers]
        self.flags = [torch.full((num_ranks, num_programs), num_launches, dtype=torch.int32) for _ in numbers]
        inboxes, flags = (torch.tensor([each.data_ptr() for each in of_all]) for of_all in (self.inboxes, self.flags))
        launches = torch.full((num_programs,), num_launches, dtype=torch.int32)
        self.stop = torch.zeros(1, dtype=torch.int32)
        raised = flags if way == "flags" else None
        self.memories = [RankMemory(inboxes, raised, launches.clone(), self.stop, inbox_bytes) for _ in numbers]

    def sum(
        self, values: list[Tensor], outs: list[Tensor], bias: Tensor | None, norms: list[SumNorm], *, adds: bool
    ) -> None:
        for pushes in (True, False):
            for rank, (memory, value, out) in enumerate(zip(self.memories, values, outs, strict=True)):
                norm = norms[rank] if norms else None
                sum_over_ranks(memory, rank, value, out, bias, norm, adds=adds, pushes=pushes, takes=not pushes)


def reference(values: list[Tensor], out: Tensor, bias: Tensor | None, *, adds: bool) -> Tensor:
    total = torch.zeros(values[0].shape, dtype=torch.float32)
    for value in values:
        total += value
    found = total.to(out.dtype)
    if adds:
        found = out + found
    return found if bias is None else found + bias


@pytest.mark.parametrize(("dtype", "num_launches"), [(torch.float16, 0), (torch.float32, 2**31 - 2)])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("way", ["words", "flags"])
def test_every_rank_has_the_sum(num_ranks: int, dtype: torch.dtype, num_launches: int, way: str) -> None:
    """Of one launch after the other, of any sizes, beyond the greatest number of launches too; and its norm, of all
    rows if of any."""
    choose, width = random.Random(num_ranks), 192
    ranks = Ranks(num_ranks, 3 if way == "flags" else 24, 4 * 3 * BLOCK * 2, num_launches, way)
    for number in range(6):
        num_rows = choose.choice([1, 5, BLOCK // width, 2 * BLOCK // width + 1, 3 * BLOCK // width])
        generator = torch.Generator().manual_seed(number)
        values = [torch.randn(num_rows, width, generator=generator).to(dtype) for _ in range(num_ranks)]
        residual = torch.randn(num_rows, width, generator=generator).to(dtype)
        bias = torch.randn(width, generator=generator).to(dtype) if number % 2 else None
        adds = bool(number % 3)
        expected = reference(values, residual, bias, adds=adds)
        outs = [residual.clone() for _ in range(num_ranks)] if adds or bias is not None else values
        weight = torch.rand(width, generator=generator).to(dtype)
        assert ranks.memories[0].norms(num_rows) or way == "words"
        has_norm = number % 3 != 0 and ranks.memories[0].norms(num_rows)
        norms = [SumNorm(weight, 1e-5, torch.full_like(residual, torch.nan)) for _ in outs] if has_norm else []
        ranks.sum(values, outs, bias, norms, adds=adds)
        assert all(torch.equal(out, expected) for out in outs)
        for norm in norms:
            found = rms_norm(expected, weight, 1e-5)
            torch.testing.assert_close(norm.out_TX, found, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["words", "flags"])
def test_who_is_told_to_stop_waits_for_nothing(way: str) -> None:
    ranks = Ranks(2, 2, 4 * BLOCK, 0, way)
    ranks.stop.fill_(1)
    values = torch.ones(1, BLOCK // 4)
    sum_over_ranks(ranks.memories[0], 0, values, values.clone(), adds=False, pushes=False)  # which nobody has pushed
    assert ranks.memories[0].num_launches.tolist() == [1, 1]
