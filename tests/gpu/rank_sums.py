"""One of two ranks whose devices sum by each other's memory: `python -m tests.gpu.rank_sums STORY RANK PORT SECRET`."""

from __future__ import annotations

import random
import sys
import time

import torch
from torch import Tensor

from headrace.kernels.triton.row_operations import rms_norm
from headrace.parallel.communicator import GroupCommunicator
from headrace.parallel.rendezvous import Rendezvous

WIDTHS = (64, 1024, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Pair:
    """This rank's ways to the other: by memory, and NCCL's alone."""

    def __init__(self, rank: int, rendezvous: Rendezvous) -> None:
        self.rank = rank
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.plain, self.ours = (
            GroupCommunicator(rendezvous.group(rank, 2, name, device="cuda"), 60.0) for name in ("plain", "ours")
        )
        self.plain.all_reduce_(torch.zeros(1, device=self.device))
        self.ours.connect(self.device)
        assert self.ours._peers is not None

    def close(self) -> None:
        torch.cuda.synchronize()
        self.plain.close()
        self.ours.close()


def values_of(rank: int, number: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(number * 2 + rank)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def same_bits(pair: Pair) -> None:
    """Of sums of any sizes, one after the other, with either rank late, and from graphs that are replayed."""
    choose = random.Random(5)  # the same on both
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(400):
        shape, dtype = (choose.choice((1, 2, 7, 64, 100, 257, 512)), choose.choice(WIDTHS)), choose.choice(DTYPES)
        has_bias, in_order, late = choose.random() < 0.3, choose.random() < 0.3, choose.randrange(8)
        values, residual = values_of(pair.rank, number, shape, dtype), values_of(2, number, shape, dtype)
        bias = values_of(3, number, (1, shape[1]), dtype)[0] if has_bias else None
        expected, weight = residual.clone(), values_of(4, number, (1, shape[1]), dtype)[0]
        pair.plain.reduce_add_(expected, values.clone(), bias, in_order=in_order)
        if late == pair.rank:
            torch.cuda._sleep(2_000_000)
        assert pair.ours._peers is not None and pair.ours._peers.sums.takes(values, residual)
        normed = pair.ours.reduce_add_(residual, values, bias, (weight, 1e-6), in_order=in_order)
        wrong += (residual != expected).sum()
        assert normed is not None or shape[0] > 32, "a row of a program that has a tier's words"
        if normed is not None:
            wrong += far_from_norm(normed, expected, weight)
        if in_order:
            assert normed is not None
            by_itself = torch.empty_like(expected)
            rms_norm(expected, weight, 1e-6, by_itself)
            wrong += (normed != by_itself).sum()
        total = values.clone()
        pair.plain.all_reduce_(total)
        pair.ours.all_reduce_(values)
        wrong += (values != total).sum()
    static = values_of(pair.rank, 1, (64, 1024), torch.bfloat16)
    total = torch.zeros_like(static)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(7):
            pair.ours.reduce_add_(total, static, None)
    torch.cuda.synchronize()
    for number in range(200):
        static.copy_(values_of(pair.rank, number, (64, 1024), torch.bfloat16))
        total.zero_()
        expected = torch.zeros_like(total)
        both = [values_of(rank, number, (64, 1024), torch.bfloat16) for rank in range(2)]
        for _ in range(7):
            expected += both[0] + both[1]
        graph.replay()
        wrong += (total != expected).sum()
    print(int(wrong))


def far_from_norm(normed: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """How many elements differ by more than their rounding, of the norm in float64."""
    exact = values.double()
    exact *= (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    exact *= weight.double()
    bound = 2 * torch.finfo(values.dtype).eps
    return ((normed.double() - exact).abs() > bound * exact.abs() + 1e-6).sum()


def no_answer(pair: Pair) -> None:
    """Rank 1 makes no call: what waits for it on the device ends when it is told to."""
    if pair.rank == 0:
        values = torch.ones(64, 1024, device="cuda")
        pair.ours.reduce_add_(values.clone(), values, None)
        done = torch.cuda.current_stream().record_event()
        time.sleep(1.0)
        was_done = done.query()
        pair.ours.abort()
        done.synchronize()
        print(int(was_done))
    else:
        time.sleep(3.0)
        print(0)


if __name__ == "__main__":
    story, rank, port, secret = sys.argv[1:]
    pair = Pair(int(rank), Rendezvous.reach(int(port), secret))
    {"same_bits": same_bits, "no_answer": no_answer}[story](pair)
    pair.close()
