"""Trainer ranks as processes of their own over gloo: each runs one of `rank_scenarios` and writes its answer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.arch.source import ROOT

SECONDS = 120


def run_ranks(scenario: str, num_ranks: int, scratch: Path, **arguments: Any) -> list[Any]:
    """What every rank returned. Fails with what one wrote to its standard error."""
    scratch.mkdir(parents=True, exist_ok=True)
    order = json.dumps({"scenario": scenario, "num_ranks": num_ranks, "scratch": str(scratch), "arguments": arguments})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rl.rank_processes", order, str(rank)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        failed = []
        for rank, process in enumerate(processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=SECONDS)
            if process.returncode != 0:
                failed.append(f"rank {rank}: {errors}")
        assert not failed, "\n".join(failed)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [json.loads((scratch / f"answer{rank}.json").read_text()) for rank in range(num_ranks)]


def main(order: dict[str, Any], rank: int) -> None:
    """One rank."""
    import torch

    from tests.rl import rank_scenarios

    scratch = Path(order["scratch"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{scratch / 'store'}",
        rank=rank,
        world_size=order["num_ranks"],
        timeout=timedelta(seconds=SECONDS / 2),
    )
    scenario: Callable[..., Any] = getattr(rank_scenarios, order["scenario"])
    answer = scenario(**order["arguments"])
    (scratch / f"answer{rank}.json").write_text(json.dumps(answer))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
