"""What top-p, penalties and bias add to the sampling of a step on one GPU: a table of kernels, then one line of JSON.

    python bench/gpu_processors.py [--rows 256,32,1] [--spreads 0.64,3] [--cases CASE,...] [--rounds N] [--out FILE]

Each case enters as many sequences as rows into a `DeviceSampler` and samples steps of them the way a runner does: by
replays of a captured graph where `DeviceSampler.path` allows it, else by launches from Python. `step_us` is the median
over rounds of the device's time from step to step, `host_us` what the host needs to enqueue one, `kernels` the
microseconds of each kernel per step by torch's profiler. Logits are normal with a spread of --spreads: 0.64 is what a
Qwen3-0.6B of random weights gives, 3 is nearer to a trained one. `rate` is what remains of the tokens per second of
steps that take --step-ms with plain sampling.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from headrace.sampling.device_sampler import DeviceSampler
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions

DEVICE = torch.device("cuda")
VOCAB = 151936
PROMPT = 620  # tokens already seen
STEPS = 20  # of a round

CASES = {
    "plain": TokenSampling(),
    "top_p": TokenSampling(top_p=0.9),
    "repetition": TokenSampling(repetition_penalty=1.1),
    "both": TokenSampling(top_p=0.9, repetition_penalty=1.1),
    "bias": TokenSampling(logit_bias=tuple((token, 0.5) for token in range(0, VOCAB, 1500))),
    "presence_frequency": TokenSampling(presence_penalty=0.3, frequency_penalty=0.1),
    "top_k_top_p": TokenSampling(top_k=50, top_p=0.95),
}


def make_sampler(sampling: TokenSampling, num_rows: int) -> DeviceSampler:
    """With a sequence of these parameters in each slot."""
    sampler = DeviceSampler(VOCAB, num_rows, num_rows, DEVICE)
    generator = np.random.default_rng(0)
    options = LogprobOptions("temperature", "raw", None, 0, (), 0)
    inits = [
        SlotInit(
            slot=slot, seed=slot, num_prompt_tokens=PROMPT, sampling=sampling, logprobs=options, stop_token_ids=(),
            token_ids=generator.integers(0, VOCAB, PROMPT).astype(np.int32), min_length=0,
        )
        for slot in range(num_rows)
    ]  # fmt: skip
    records = np.stack([sampler.enter(init) for init in inits])
    sampler.write_slots(torch.from_numpy(records).to(DEVICE))
    return sampler


def make_step(sampler: DeviceSampler, num_rows: int, spread: float) -> tuple[str, Callable[[], object]]:
    """How steps are sampled, and what samples one."""
    torch.manual_seed(1)
    logits = torch.randn(num_rows, VOCAB, device=DEVICE) * spread
    slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    positions = torch.full_like(slots, PROMPT)
    tokens, logprobs = torch.zeros_like(slots), torch.zeros(num_rows, device=DEVICE)
    on_host = np.arange(num_rows, dtype=np.int32), np.full(num_rows, PROMPT, np.int32)
    path = sampler.path(*on_host)
    given = logits, slots, positions, tokens, logprobs
    if path == "eager":
        return path, lambda: sampler.sample_eager(*given, *on_host)
    sampler.sample(*given, plain=path == "plain")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(*given, plain=path == "plain")
    return path, graph.replay


def time_steps(step: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Microseconds of a step, on the device and to enqueue."""
    for _ in range(3):
        step()
    device, host = [], []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        host.append((time.perf_counter() - start) * 1e6 / STEPS)
        end.record()
        end.synchronize()
        device.append(begin.elapsed_time(end) * 1e3 / STEPS)
    return median(device), median(host)


def kernel_times(step: Callable[[], object]) -> dict[str, float]:
    """Microseconds a step spends in each kernel and copy."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    on_device = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    times = {event.key[:60]: event.self_device_time_total / STEPS for event in on_device}
    return {key: round(us, 1) for key, us in sorted(times.items(), key=lambda item: -item[1])}


def measure(name: str, num_rows: int, spread: float, rounds: int) -> dict[str, object]:
    """One case: what it took, printed too."""
    sampler = make_sampler(CASES[name], num_rows)
    path, step = make_step(sampler, num_rows, spread)
    device_us, host_us = time_steps(step, rounds)
    kernels = kernel_times(step)
    print(f"{name:20s} {num_rows:4d} rows, spread {spread:g}: {device_us:8.1f} us ({path}; host {host_us:.0f} us)")
    for key, us in kernels.items():
        print(f"{'':24s}{us:8.1f} us  {key}", flush=True)
    return {
        "case": name, "rows": num_rows, "spread": spread, "path": path, "step_us": round(device_us, 1),
        "host_us": round(host_us, 1), "kernels": kernels,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="256,32,1")
    parser.add_argument("--spreads", default="0.64,3")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=9.0, help="a step of 256 rows with plain sampling")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    with torch.inference_mode():
        for num_rows in map(int, arguments.rows.split(",")):
            for spread in map(float, arguments.spreads.split(",")):
                cases = [measure(name, num_rows, spread, arguments.rounds) for name in arguments.cases.split(",")]
                plain = next((float(str(case["step_us"])) for case in cases if case["case"] == "plain"), None)
                for case in cases:
                    if plain is not None and num_rows == 256:
                        added = float(str(case["step_us"])) - plain
                        case["rate"] = round(1.0 / (1.0 + added * 1e-3 / arguments.step_ms), 4)
                results += cases
    report = json.dumps({"device": torch.cuda.get_device_name(), "results": results})
    print(report)
    if arguments.out:
        arguments.out.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
