"""How long a full update takes over a process group of NCCL, from a trainer's GPU to the engine's on the same host.

    python bench/gpu_group_update.py --shape qwen3-8b --packings tensors,packed,buckets --runs 7

    tensors   a broadcast for each, as vLLM's and slime's trainers send them by default
    packed    one call, flattened into buffers of about `--packed-mib` on the way, as vLLM's trainers can
    buckets   a call for each bucket of `--bucket-mib`, flattened first, as SGLang's and slime's can

What flattening takes is counted.

The trainer is this process, on device 1, and the engine's core one of its own, on device 0. Each figure is from the
update's begin to its commit's return, in place, by `begin_update`, `stage_from_group` and `commit`: the median of
`--runs`, after one that is not counted. Afterwards the live weights' digests are compared with those of the tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bench.gpu_update import Named, digests_of, tensors_like
from headrace import Engine
from headrace.bench.models import write_config
from headrace.types.messages import JoinGroup
from headrace.weights.group import store_of

_NAME, _TRAINER, _SECONDS = "bench", 1, 60.0


class Trainer:
    """Rank 0 of a group with the engine."""

    def __init__(self, engine: Engine) -> None:
        from torch._C import _distributed_c10d as c10d

        self._engine, self._thread, self._options = engine, ThreadPoolExecutor(1), c10d.BroadcastOptions()
        store = c10d.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=_SECONDS), False)
        port = store.port
        joined = self._thread.submit(
            engine.init_weights_update_group, "127.0.0.1", port, 1, 2, _NAME, "nccl", timeout=_SECONDS
        )
        part = store_of(store, JoinGroup(0, _NAME, "127.0.0.1", port, 0, 2, "nccl"))
        options = c10d.ProcessGroupNCCL.Options()  # type: ignore[attr-defined]
        self._group = c10d.ProcessGroupNCCL(part, 0, 2, options)  # type: ignore[attr-defined]
        joined.result()

    def update(self, calls: list[Named], packing: str | int | None, version: str) -> float:
        """Seconds of one, by so many calls: their tensors are sent as `packing` says (see `stage_from_group`)."""
        tensors = [each for part in calls for each in part]
        manifest = [(name, tuple(tensor.shape), "bfloat16") for name, tensor in tensors]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        session = self._engine.begin_update(version, manifest, mode="inplace")
        for part in calls:
            names = [name for name, _ in part]
            staged = self._thread.submit(self._engine.stage_from_group, session, names, _NAME, packing)
            for sent in _sent(part, packing):
                self._group.broadcast([sent], self._options)
            staged.result()
        self._engine.commit(session)
        return time.perf_counter() - begin

    def close(self) -> None:
        self._engine.destroy_weights_update_group(_NAME)
        self._thread.shutdown()


def _sent(tensors: Named, packing: str | int | None) -> Iterator[torch.Tensor]:
    """What is broadcast, one after the other."""
    if packing is None:
        yield from (tensor for _, tensor in tensors)
        return
    part: list[torch.Tensor] = []
    for _, tensor in tensors:
        part.append(tensor.flatten())
        if isinstance(packing, int) and sum(each.nbytes for each in part) > packing:
            yield torch.cat(part)
            part = []
    if part:
        yield torch.cat(part)


def cut(tensors: Named, num_bytes: int) -> Iterator[Named]:
    """Buckets of at most so many bytes, or one tensor."""
    part: Named = []
    for name, tensor in tensors:
        if part and sum(each.nbytes for _, each in part) + tensor.nbytes > num_bytes:
            yield part
            part = []
        part.append((name, tensor))
    yield part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--packings", default="tensors,packed,buckets")
    parser.add_argument("--packed-mib", type=int, default=256)
    parser.add_argument("--bucket-mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(Path(scratch) / arguments.shape, arguments.shape)
        engine = Engine(
            folder, load_format="dummy", skip_tokenizer_init=True, max_running_requests=8, kv_pool_tokens=1 << 15,
            cuda_graphs=False,
        )  # fmt: skip
        try:
            print(json.dumps(measure(engine, arguments)))
        finally:
            engine.shutdown()


def measure(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.cuda.set_device(_TRAINER)  # the engine would have taken it too
    tensors = tensors_like(engine, "cuda")
    digests = digests_of(tensors)
    num_bytes = sum(tensor.nbytes for _, tensor in tensors)
    report: dict[str, Any] = {"shape": arguments.shape, "gigabytes": num_bytes / 1e9}
    trainer = Trainer(engine)
    ways: dict[str, tuple[list[Named], str | int | None]] = {
        "tensors": ([tensors], None),
        "packed": ([tensors], arguments.packed_mib << 20),
        "buckets": (list(cut(tensors, arguments.bucket_mib << 20)), "flattened_bucket"),
    }
    for way in arguments.packings.split(","):
        seconds = [trainer.update(*ways[way], f"{way} {run}") for run in range(arguments.runs + 1)]
        median = statistics.median(seconds[1:])
        report[way] = {
            "first_ms": round(1e3 * seconds[0], 1),
            "median_ms": round(1e3 * median, 1),
            "best_ms": round(1e3 * min(seconds[1:]), 1),
            "gigabytes_per_second": round(num_bytes / median / 1e9, 1),
        }
    trainer.close()
    if engine.digest() != digests:
        raise SystemExit("what is live is not what was sent")
    return report


if __name__ == "__main__":
    main()
