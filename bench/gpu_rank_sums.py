"""Sums over the ranks of one host, as a decoder layer has them: all-reduce, residual add and RMS norm of [n, width].

    python bench/gpu_rank_sums.py --ranks 2 --rows 1,64,256,1024 --width 4096

Microseconds of one of many in a captured graph, the slowest rank's: ours, by memory of each other, and NCCL's with the
same add and norm beside it; and how far ours is from a float64 sum. Needs as many devices as ranks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.triton.row_operations import rms_norm
from headrace.parallel.communicator import GroupCommunicator
from headrace.parallel.rendezvous import Rendezvous

REPEATS, REPLAYS = 40, 20
_EPS = 1e-6


def rank_figures(rank: int, num_ranks: int, rendezvous: Rendezvous, rows: list[int], width: int) -> list[Any]:
    """For each number of rows: rows, microseconds of ours and of NCCL's, and the error of ours."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    plain, ours = (
        GroupCommunicator(rendezvous.group(rank, num_ranks, name, device="cuda"), 60.0) for name in ("plain", "ours")
    )
    ours.connect(device)
    assert ours._peers is not None, "the devices do not reach each other's memory"
    norm = torch.rand(width, device=device, dtype=torch.bfloat16)
    found = []
    for num_rows in rows:
        values = [_random(num_rows, width, each).to(device) for each in range(num_ranks)]
        residual = _random(num_rows, width, num_ranks).to(device)
        total = residual.clone()
        ours.reduce_add_(total, values[rank].clone(), None)
        exact = residual.double() + torch.stack(values).double().sum(0)
        error = float((total.double() - exact).norm() / exact.norm())
        times = [_microseconds(each, values[rank], residual, norm) for each in (ours, plain)]
        slowest = torch.tensor(times, device=device)
        plain.all_reduce_(slowest, "max")
        found.append([num_rows, *(round(each, 2) for each in slowest.tolist()), error])
    torch.cuda.synchronize()
    for each in (plain, ours):
        each.close()
    return found


def _random(num_rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def _microseconds(communicator: GroupCommunicator, values: Tensor, residual: Tensor, norm: Tensor) -> float:
    """Of one sum, with what follows it, in a graph of many."""
    total, partial, normed = residual.clone(), values.clone(), torch.empty_like(values)

    def layer() -> None:
        if communicator.reduce_add_(total, partial, None, (norm, _EPS)) is None:
            rms_norm(total, norm, _EPS, normed, pdl=True)

    return _graph_time(layer) / REPEATS


def _graph_time(layer: Callable[[], None]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(REPEATS):
                layer()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[REPLAYS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="1,4,16,64,128,256,512,1024")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = [int(each) for each in arguments.rows.split(",")]
    if arguments.child is not None:
        rank, port, secret = arguments.child
        rank_figures(int(rank), arguments.ranks, Rendezvous.reach(int(port), secret), rows, arguments.width)
        return
    rendezvous = Rendezvous.host()
    place = [str(rendezvous.port), rendezvous.secret]
    command = [sys.executable, *sys.argv, "--child"]
    children = [subprocess.Popen([*command, str(rank), *place]) for rank in range(1, arguments.ranks)]
    try:
        found = rank_figures(0, arguments.ranks, rendezvous, rows, arguments.width)
    finally:
        for child in children:
            child.wait(60)
    print("rows  ours us  NCCL us  error")
    for num_rows, ours, nccl, error in found:
        print(f"{num_rows:5d} {ours:8.2f} {nccl:8.2f}  {error:.1e}")
    print(json.dumps({"ranks": arguments.ranks, "width": arguments.width, "figures": found}))


if __name__ == "__main__":
    main()
