"""What an update costs per tensor, whatever its size: full updates of models of many tiny tensors, over memory of the
host from this process to a core in its own.

    python bench/update_overhead.py --layers 36,1818 --modes inplace,shadow --out overhead.json

Of Qwen3's form, 36 layers are 399 tensors and 1818 are 20,001. `wall` is of whole updates, `front` and `core` are the
CPU time of each process, all in microseconds per tensor, and the least of `--runs`. `copied` are the bytes copied in an
update, as a multiple of the model's: counted with another engine, whose core is a thread of this process.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headrace import Engine
from headrace.bench.models import SHAPES
from headrace.engine import memory_copy
from headrace.engine.tensors import TensorBytes
from headrace.models import weight_map
from headrace.weights.staging import BytesSource
from headrace.weights.store import WeightStore

Named = list[tuple[str, torch.Tensor]]

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="36,1818")
    parser.add_argument("--modes", default="inplace,shadow")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    for layers in map(int, arguments.layers.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            config = {**SHAPES["tiny"], **SIZES, "num_hidden_layers": layers, "tie_word_embeddings": False}
            (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for mode in arguments.modes.split(","):
                results.append({"mode": mode, **measure(scratch, mode, arguments.runs), **count(scratch, mode)})
                print(json.dumps(results[-1]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def start(folder: str, **settings: Any) -> Engine:
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu", "dtype": "bfloat16"}
    return Engine(folder, **options, max_running_requests=2, kv_pool_tokens=256, **settings)


def tensors_of(engine: Engine) -> Named:
    rules = weight_map(engine.asynchronous.resolved.model).rules_by_name.values()
    return [(rule.hf_name, torch.randn(rule.shape).bfloat16()) for rule in rules]


def measure(folder: str, mode: str, runs: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"wall": [], "front": [], "core": []}
    with start(folder) as engine:
        tensors = tensors_of(engine)
        for run in range(runs + 1):
            begin, front, core = time.perf_counter(), time.process_time(), children_seconds()
            engine.update_weights_from_tensor(tensors, version=str(run), mode=mode)  # type: ignore[arg-type]
            found["wall"].append(time.perf_counter() - begin)
            found["front"].append(time.process_time() - front)
            found["core"].append(children_seconds() - core)
    each = {name: round(1e6 * min(seconds[1:]) / len(tensors), 1) for name, seconds in found.items()}
    return {"num_tensors": len(tensors), **each}


def children_seconds() -> float:
    """CPU time of this process's children, by the scheduler's own account."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == os.getpid():
                total += sum(int((task / "schedstat").read_text().split()[0]) for task in (entry / "task").iterdir())
        except OSError:
            continue
    return total / 1e9


def count(folder: str, mode: str) -> dict[str, Any]:
    with start(folder, inprocess=True) as engine:
        tensors = tensors_of(engine)
        with counted() as copied:
            engine.update_weights_from_tensor(tensors, version="counted", mode=mode)  # type: ignore[arg-type]
    return {"copied": round(copied[0] / sum(tensor.nbytes for _, tensor in tensors), 3)}


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that go from tensors to buffers, from there to where they wait, and from there over live ones."""
    copied = [0]
    into_buffer, out_of_it, commit = TensorBytes.copy_into, BytesSource.copy, WeightStore.commit

    def write(data: TensorBytes, view: Any, copy: memory_copy.Copy = memory_copy.copy_memory) -> None:
        copied[0] += len(data)
        into_buffer(data, view, copy)

    def read(source: BytesSource, part: slice, destination: torch.Tensor) -> None:
        copied[0] += destination.nbytes
        out_of_it(source, part, destination)

    def make_live(store: WeightStore) -> Any:
        shadow = store._require_update().shadow
        copied[0] += sum(memory.nbytes for memories in shadow.values() for memory in memories)
        return commit(store)

    TensorBytes.copy_into, BytesSource.copy, WeightStore.commit = write, read, make_live  # type: ignore[method-assign]
    try:
        yield copied
    finally:
        TensorBytes.copy_into, BytesSource.copy, WeightStore.commit = into_buffer, out_of_it, commit  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
