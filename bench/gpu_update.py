"""How long a full update of an engine's weights takes on one GPU, by the road and by where the tensors are.

    python bench/gpu_update.py --shape qwen3-8b --roads device,bucket,host,own --modes inplace,shadow --out update.json

    device   tensors of this process on the core's GPU, the core in a process of its own
    host     the same tensors in this process's CPU memory
    own      tensors on the GPU, the core in a thread of this process
    bucket   as device, all of them in one allocation: mapping another process's takes the driver a while for each

Each figure is a whole `update_weights_from_tensor`, of which nothing is left to do when it returns: the median of
`--runs`, after one that is not counted; between two is a tenth of a second, as a trainer has other things to do.
`verified` is the same with a digest of each tensor in the manifest, which the core holds against what arrived. `phases`
are medians too, of where the front's time went; of the road `own` also what the core did meanwhile. Afterwards a digest
is compared with that of the tensors.

What running requests see of updates, and memory that is released and resumed, is `gpu_pause.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headrace import Engine
from headrace.bench.models import write_config
from headrace.engine.held_tensors import HeldTensors
from headrace.engine.update import Updater
from headrace.models import weight_map
from headrace.types.weights import TensorInfo
from headrace.weights.device_staging import DeviceCopies
from headrace.weights.position_sum import PositionKeys, position_digest
from headrace.weights.store import WeightStore

Named = list[tuple[str, torch.Tensor]]
Phases = dict[str, float]

_ASYNC = {"begin": (Updater, "begin"), "stage call": (Updater, "_upload"), "commit": (Updater, "commit")}
_PLAIN = {
    "list": (HeldTensors, "__init__"),
    "core: enqueue": (DeviceCopies, "_enqueue"),
    "core: copies, looks": (DeviceCopies, "advance"),
    "core: begin": (WeightStore, "begin"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--roads", default="device,bucket,host,own")
    parser.add_argument("--modes", default="inplace,shadow,verified")
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
        tensors = in_one_allocation(tensors) if road == "bucket" else tensors
        digests = digests_of(tensors)
        report: dict[str, Any] = {"gigabytes": sum(tensor.nbytes for _, tensor in tensors) / 1e9}
        for mode in modes:
            report[mode] = one_mode(engine, tensors, digests, mode, runs)
        begin = time.perf_counter()
        found = engine.digest()
        report["digest_ms"] = round(1e3 * (time.perf_counter() - begin), 1)
        if any(found[name] != digest for name, digest in digests.items()):
            raise SystemExit(f"{road}: what is live is not what was sent")
        return report
    finally:
        engine.shutdown()


def one_mode(engine: Engine, tensors: Named, digests: dict[str, str], mode: str, runs: int) -> dict[str, Any]:
    seconds, pauses, parts = [], [], []
    for run in range(runs + 1):
        torch.cuda.synchronize()
        time.sleep(0.1)
        with phases() as spent:
            begin = time.perf_counter()
            pause = update(engine, tensors, digests, mode, str(run))
            seconds.append(time.perf_counter() - begin)
        pauses.append(pause)
        parts.append(dict(spent))
    names = {name for part in parts for name in part}
    middle = {name: statistics.median(part.get(name, 0.0) for part in parts[1:]) for name in names}
    return {
        "first_ms": round(1e3 * seconds[0], 2),
        "median_ms": round(1e3 * statistics.median(seconds[1:]), 2),
        "best_ms": round(1e3 * min(seconds[1:]), 2),
        "pause_ms": round(statistics.median(pauses[1:]), 2),
        "phases": {name: round(1e3 * spent, 2) for name, spent in middle.items()},
    }


def update(engine: Engine, tensors: Named, digests: dict[str, str], mode: str, version: str) -> float:
    """One update; returns how long no step could run."""
    if mode != "verified":
        return engine.update_weights_from_tensor(tensors, version=version, mode=mode).pause_ms  # type: ignore[arg-type]
    manifest = [TensorInfo(name, tuple(each.shape), "bfloat16", digests[name]) for name, each in tensors]
    session = engine.begin_update(version, manifest, mode="inplace")
    engine.stage(session, tensors)
    return engine.commit(session).pause_ms


@contextmanager
def phases() -> Iterator[Phases]:
    """Seconds that calls in this process take, by what they do."""
    spent: Phases = defaultdict(float)
    replaced = [(owner, name, getattr(owner, name)) for owner, name in (*_ASYNC.values(), *_PLAIN.values())]
    for what, (owner, name) in _ASYNC.items():
        setattr(owner, name, _timed_coroutine(getattr(owner, name), spent, what))
    for what, (owner, name) in _PLAIN.items():
        setattr(owner, name, _timed(getattr(owner, name), spent, what))
    try:
        yield spent
    finally:
        for owner, name, function in replaced:
            setattr(owner, name, function)


def _timed(function: Any, spent: Phases, what: str) -> Any:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - begin

    return timed


def _timed_coroutine(function: Any, spent: Phases, what: str) -> Any:
    @functools.wraps(function)
    async def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return await function(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - begin

    return timed


def tensors_like(engine: Engine, device: str) -> Named:
    """Random tensors of the engine's names and shapes, in bfloat16; made on a GPU where there is one."""
    rules = weight_map(engine.asynchronous.resolved.model).rules_by_name.values()
    maker = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        (rule.hf_name, (0.02 * torch.randn(rule.shape, device=maker)).to(torch.bfloat16).to(device)) for rule in rules
    ]


def in_one_allocation(tensors: Named) -> Named:
    """The same values, as a trainer's buckets hold them."""
    bucket = torch.empty(sum(tensor.numel() for _, tensor in tensors), dtype=torch.bfloat16, device="cuda")
    parts = bucket.split([tensor.numel() for _, tensor in tensors])
    return [(name, part.view(tensor.shape).copy_(tensor)) for (name, tensor), part in zip(tensors, parts, strict=True)]


def digests_of(tensors: Named) -> dict[str, str]:
    """What the engine will say of them."""
    keys = PositionKeys(torch.device("cuda"))
    return {name: position_digest(tensor.to("cuda").view(-1), keys) for name, tensor in tensors}


if __name__ == "__main__":
    main()
