"""What it gives that pipeline stages overlap, apart from how fast a machine is: layers sleep, as if devices computed.

`python -m bench.pipeline_overlap [SECONDS_PER_ROW SECONDS_PER_STEP]`, of a layer: per row, as where products are what
takes time, per step, as where reading weights is. Prints tokens per second of the same requests, beside one stage.
Every rank is this program too, as `headrace.core.rank_process` with layers that sleep.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from headrace import Engine, SamplingParams
from headrace.bench.models import write_config
from headrace.core import rank_process
from headrace.ipc import rank_spawn
from headrace.layers.step import ForwardStep
from headrace.models.decoder import Decoder

NUM_REQUESTS, NUM_TOKENS = 8, 16
SECONDS_PER_ROW, SECONDS_PER_STEP = "HEADRACE_BENCH_ROW_SECONDS", "HEADRACE_BENCH_STEP_SECONDS"
LAYOUTS: dict[str, dict[str, int]] = {
    "one stage": {},
    "two": {"pp_size": 2},
    "two, no overlap": {"pp_size": 2, "overlap_depth": 0},
}


def let_layers_sleep() -> None:
    """Of this process: as long as the environment says."""
    forward, per_row, per_step = (
        Decoder.forward,
        *(float(os.environ[each]) for each in (SECONDS_PER_ROW, SECONDS_PER_STEP)),
    )

    def sleeping(self: Decoder, hidden_TX: Tensor, step: ForwardStep) -> Tensor:
        time.sleep(len(self._layers) * (per_step + per_row * len(hidden_TX)))
        return forward(self, hidden_TX, step)

    Decoder.forward = sleeping  # type: ignore[method-assign]


def tokens_per_second(folder: Path, layout: dict[str, int]) -> float:
    """Of requests that come together."""
    settings: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "num_threads": 1, "seed": 0, **layout}
    params = SamplingParams(temperature=0.0, max_new_tokens=NUM_TOKENS, ignore_eos=True)
    with Engine(folder, skip_tokenizer_init=True, inprocess=True, prefix_cache=False, **settings) as engine:
        engine.generate(input_ids=[1])
        started = time.perf_counter()
        engine.generate(input_ids=[[1, 2, 3, number] for number in range(NUM_REQUESTS)], sampling_params=params)
        return NUM_REQUESTS * NUM_TOKENS / (time.perf_counter() - started)


def main() -> None:
    rank_spawn.RANK_MODULE = "bench.pipeline_overlap"
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    os.environ[SECONDS_PER_ROW], os.environ[SECONDS_PER_STEP] = sys.argv[1:] or ("0.005", "0")
    let_layers_sleep()
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(Path(name), "tiny")
        found = {layout: tokens_per_second(folder, settings) for layout, settings in LAYOUTS.items()}
    for layout, speed in found.items():
        print(f"{layout:16} {speed:7.1f} tokens/s, {speed / found['one stage']:.2f} of one stage")


if __name__ == "__main__":
    if "--channel" in sys.argv:
        let_layers_sleep()
        os._exit(rank_process.main(sys.argv[1:]))
    main()
