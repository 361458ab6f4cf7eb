"""How long a full update of an engine's weights takes on one GPU, by the road and by where the tensors are.

    python bench/gpu_update.py --shape qwen3-8b --roads device,host,own --modes inplace,shadow --out update.json

    device   tensors of this process on the core's GPU, the core in a process of its own
    host     the same tensors in this process's CPU memory
    own      tensors on the GPU, the core in a thread of this process

Each figure is a whole `update_weights_from_tensor`, of which nothing is left to do when it returns: the median of
`--runs`, after one that is not counted. Afterwards a digest is compared with that of the tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from headrace import Engine
from headrace.bench.models import write_config
from headrace.models import weight_map
from headrace.weights.position_sum import PositionKeys, position_digest

Named = list[tuple[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--roads", default="device,host,own")
    parser.add_argument("--modes", default="inplace,shadow")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "shape": arguments.shape}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(Path(scratch) / arguments.shape, arguments.shape)
        for road in arguments.roads.split(","):
            results[road] = measure(folder, road, arguments.modes.split(","), arguments.runs)
            print(road, json.dumps(results[road]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def measure(folder: Path, road: str, modes: list[str], runs: int) -> dict[str, Any]:
    """Updates of an engine that has nothing else to do, by mode."""
    engine = Engine(
        folder,
        inprocess=road == "own",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_running_requests=8,
        kv_pool_tokens=1 << 15,
        cuda_graphs=False,
    )
    try:
        tensors = tensors_like(engine, "cpu" if road == "host" else "cuda")
        report: dict[str, Any] = {"gigabytes": sum(tensor.nbytes for _, tensor in tensors) / 1e9}
        for mode in modes:
            seconds, pauses = [], []
            for run in range(runs + 1):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                done = engine.update_weights_from_tensor(tensors, version=str(run), mode=mode)  # type: ignore[arg-type]
                seconds.append(time.perf_counter() - begin)
                pauses.append(done.pause_ms)
            report[mode] = {
                "first_ms": round(1e3 * seconds[0], 2),
                "median_ms": round(1e3 * statistics.median(seconds[1:]), 2),
                "best_ms": round(1e3 * min(seconds[1:]), 2),
                "pause_ms": round(statistics.median(pauses[1:]), 2),
            }
        begin = time.perf_counter()
        found = engine.digest()
        report["digest_ms"] = round(1e3 * (time.perf_counter() - begin), 1)
        keys = PositionKeys(torch.device("cuda"))
        for name, tensor in tensors:
            expected = position_digest(tensor.to("cuda").view(-1), keys)
            if found[name] != expected:
                raise SystemExit(f"{road}: {name} is not what was sent")
        return report
    finally:
        engine.shutdown()


def tensors_like(engine: Engine, device: str) -> Named:
    """Random tensors of the engine's names and shapes, in bfloat16."""
    rules = weight_map(engine.asynchronous.resolved.model).rules_by_name.values()
    return [
        (rule.hf_name, (0.02 * torch.randn(rule.shape, device="cuda")).to(torch.bfloat16).to(device)) for rule in rules
    ]


if __name__ == "__main__":
    main()
