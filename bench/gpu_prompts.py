"""How fast prompts are computed on one GPU: many long ones at once, and one very long one.

    python bench/gpu_prompts.py --rows llama-16k,llama-60k,8b-2k,0.6b-2k --out prompts.json

Each row is an engine with default settings and random weights in a process of its own. All prompts of a row are given
at once, of ids that no other has: `prompt_tokens_per_second` is of all of them until the last request has ended, the
median of `--runs`. Of a single prompt also when its first token came, and the milliseconds of each after that.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headrace import Engine, SamplingParams
from headrace.bench.models import SHAPES


class Row(NamedTuple):
    """So many prompts of so many ids each, and what comes after each."""

    config: dict[str, Any]
    num_prompts: int
    prompt_tokens: int
    new_tokens: int


ROWS = {
    "llama-16k": Row(SHAPES["llama-3.1-8b"], 32, 16_384, 1),
    "llama-60k": Row(SHAPES["llama-3.1-8b"], 1, 60_000, 64),
    "8b-2k": Row(SHAPES["qwen3-8b"], 128, 2_048, 16),
    "0.6b-2k": Row(SHAPES["qwen3-0.6b"], 512, 2_048, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    for name in arguments.rows.split(","):
        results[name] = measure(ROWS[name], arguments.runs)
        print(name, json.dumps(results[name]), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if len(results) == 2:  # as every benchmark of `gpu_report.py`: its figures come last
        print(json.dumps(results[arguments.rows]))


def measure(row: Row, runs: int) -> dict[str, Any]:
    """A run that is not counted, then `runs` of them."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(row.config), encoding="utf-8")
        with Engine(scratch, inprocess=False, load_format="dummy", skip_tokenizer_init=True) as engine:
            found = [one_run(engine, row, seed) for seed in range(runs + 1)][1:]
    return {name: round(statistics.median(each[name] for each in found), 3) for name in found[0]}


def one_run(engine: Engine, row: Row, seed: int) -> dict[str, float]:
    choose = random.Random(seed)
    prompts = [[choose.randrange(2, 100_000) for _ in range(row.prompt_tokens)] for _ in range(row.num_prompts)]
    params = SamplingParams(max_new_tokens=row.new_tokens, ignore_eos=True)
    begin = time.perf_counter()
    if row.num_prompts > 1:
        engine.generate(input_ids=prompts, sampling_params=params, progress=False)
        return {"prompt_tokens_per_second": row.num_prompts * row.prompt_tokens / (time.perf_counter() - begin)}
    times = [time.perf_counter() - begin for _ in engine.stream(input_ids=prompts[0], sampling_params=params)]
    return {"first_token_s": times[0], "ms_per_token": 1e3 * (times[-1] - times[0]) / (row.new_tokens - 1)}


if __name__ == "__main__":
    main()
