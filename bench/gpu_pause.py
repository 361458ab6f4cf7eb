"""What running requests see of weight updates on one GPU, and how long released memory takes to come back.

    python bench/gpu_pause.py --shape qwen3-8b --parts pause,throughput,release,copy --out pause.json

    pause        the longest gap between two tokens of a request around a shadow update, less a normal step
    throughput   tokens a second with a full shadow update every 2 s, and without
    release      weights and KV cache released and resumed, without a copy of the weights
    copy         the same with a copy on the host, and how fast it comes back

256 requests run; the tensors of the updates are this process's, on the same GPU as the core's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from gpu_update import tensors_like

from headrace import Engine, SamplingParams
from headrace.bench.models import write_config

NUM_REQUESTS = 256
PROMPT_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--parts", default="pause,throughput,release,copy")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run of requests")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "shape": arguments.shape}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(Path(scratch) / arguments.shape, arguments.shape)
        if {"pause", "throughput"} & set(parts):
            with start(folder) as engine:
                results |= beside_requests(engine, parts, arguments.seconds)
        for part in ("release", "copy"):
            if part in parts:
                with start(folder, memory_saver=True, keep_weights_copy=part == "copy", cuda_graphs=False) as engine:
                    results[part] = released(engine, has_copy=part == "copy")
    print(json.dumps(results, indent=1), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def start(folder: Path, **settings: Any) -> Engine:
    return Engine(
        folder,
        inprocess=False,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_running_requests=NUM_REQUESTS,
        kv_pool_tokens=1 << 18,
        **settings,
    )


def beside_requests(engine: Engine, parts: list[str], seconds: float) -> dict[str, Any]:
    tensors = tensors_like(engine, "cuda")
    engine.update_weights_from_tensor(tensors, version="first", mode="shadow")
    run(engine, 2.0)
    quiet = run(engine, seconds)
    found: dict[str, Any] = {"quiet": quiet}

    def update(number: int) -> None:
        engine.update_weights_from_tensor(tensors, version=str(number), mode="shadow", in_flight="keep")

    every = run(engine, seconds, update, 2.0)
    if "pause" in parts:
        found["pause_ms"] = every["longest_ms"] - quiet["step_ms"]
    if "throughput" in parts:
        found["throughput"] = every["tokens_per_s"] / quiet["tokens_per_s"]
    return found | {"updated": every}


def run(engine: Engine, seconds: float, action: Any = None, every_s: float = 1.0) -> dict[str, Any]:
    """Requests for so long, with an action beside them now and then: their tokens, and the gaps between two of one."""
    prompts = [[(7 * number + place) % 1000 + 1 for place in range(PROMPT_TOKENS)] for number in range(NUM_REQUESTS)]
    params = SamplingParams(temperature=1.0, max_new_tokens=900, ignore_eos=True)
    is_over = threading.Event()
    took: list[float] = []

    def act() -> None:
        number = 0
        while not is_over.wait(every_s):
            begin = time.perf_counter()
            action(number)
            took.append(1e3 * (time.perf_counter() - begin))
            number += 1

    last: dict[int, float] = {}
    gaps: list[float] = []
    num_tokens, begin, thread = 0, 0.0, threading.Thread(target=act)
    for piece in engine.stream(input_ids=prompts, sampling_params=params):
        now = time.perf_counter()
        if piece.prompt_index in last:
            gaps.append(1e3 * (now - last[piece.prompt_index]))
        last[piece.prompt_index] = now
        if not begin and len(last) == NUM_REQUESTS:
            begin, num_tokens, gaps = now, 0, []
            if action is not None:
                thread.start()
        num_tokens += len(piece.token_ids)
        if begin and now - begin >= seconds:
            break
    is_over.set()
    elapsed = time.perf_counter() - begin
    if action is not None:
        thread.join()
    gaps.sort()
    return {
        "tokens_per_s": num_tokens / elapsed,
        "step_ms": statistics.median(gaps),
        "p99_ms": gaps[len(gaps) * 99 // 100],
        "longest_ms": gaps[-1],
        "updates_ms": took,
    }


def released(engine: Engine, *, has_copy: bool) -> dict[str, Any]:
    """Medians of three times, and what of the device was free in between."""
    tensors, spent = tensors_like(engine, "cuda"), []
    gigabytes = sum(tensor.nbytes for _, tensor in tensors) / 1e9
    free = []
    for number in range(4):
        begin = time.perf_counter()
        engine.release_memory_occupation(["weights", "kv_cache"])
        middle = time.perf_counter()
        free.append(torch.cuda.mem_get_info()[0] / 1e9)
        again = time.perf_counter()
        engine.resume_memory_occupation(["kv_cache"])
        kv_cache = time.perf_counter()
        engine.resume_memory_occupation(["weights"], restore="copy" if has_copy else "await")
        end = time.perf_counter()
        free.append(torch.cuda.mem_get_info()[0] / 1e9)
        if not has_copy:
            engine.update_weights_from_tensor(tensors, version=str(number))
        spent.append((middle - begin, kv_cache - again, end - kv_cache))
    release, kv_cache, weights = (statistics.median(each[part] for each in spent[1:]) for part in range(3))
    found = {"release_ms": 1e3 * release, "resume_kv_ms": 1e3 * kv_cache, "resume_weights_ms": 1e3 * weights}
    return {**found, "gigabytes": gigabytes, "weights_gb_per_s": gigabytes / weights, "free_gb": free}


if __name__ == "__main__":
    main()
