"""Trainer ranks as processes of their own over gloo: each runs functions of `rank_scenarios` and writes its answers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.arch.source import ROOT, child_environment

SECONDS = 200


def run_ranks(num_ranks: int, scratch: Path, scenarios: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, list[Any]]:
    """What every rank answered, by scenario: each is a function and its arguments; None from one that a scenario has
    ended. Fails with what a rank wrote to its standard error."""
    order = json.dumps({"num_ranks": num_ranks, "scratch": str(scratch), "scenarios": scenarios})
    environment = child_environment(OMP_NUM_THREADS="1")
    logs = [(scratch / f"errors{rank}").open("w+") for rank in range(num_ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rl.rank_processes", order, str(rank)], cwd=ROOT, env=environment, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)
        failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
        assert not failed, "\n".join(f"rank {rank}: {(scratch / f'errors{rank}').read_text()}" for rank in failed)
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    files = [scratch / f"answers{rank}.json" for rank in range(num_ranks)]
    answers = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return {name: [each.get(name) for each in answers] for name in scenarios}


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
    answers = {}
    for name, (function, arguments) in order["scenarios"].items():
        answers[name] = getattr(rank_scenarios, function)(**arguments)
    (scratch / f"answers{rank}.json").write_text(json.dumps(answers))
    with contextlib.suppress(RuntimeError):  # a scenario may have ended a rank
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
