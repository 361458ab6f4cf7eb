"""Re-scoring finds what an engine said right, and refuses a figure whose log-probabilities are not the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace import Engine
from headrace.bench import rescore as rescoring
from headrace.bench.models import write_config
from headrace.bench.rescore import ScoredSequence, evenly_spaced, oracle_settings, rescore, scoring_plan
from headrace.config import ResolvedConfig
from headrace.types.errors import InternalError
from headrace.types.sampling_params import LogprobMode, SamplingParams

PROMPTS = [[1, 2, 3], [4] * 21, [7, 5] * 16]


def generate(
    folder: Path, mode: LogprobMode, temperature: float, dtype: str = "float32"
) -> tuple[ResolvedConfig, list[ScoredSequence]]:
    write_config(folder, "tiny")
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "num_threads": 1,
        "seed": 5,
        "dtype": dtype,
    }
    params = [SamplingParams(max_new_tokens=n, temperature=temperature, ignore_eos=True) for n in (1, 9, 40)]
    with Engine(folder, inprocess=True, kv_pool_tokens=512, device="cpu", **settings) as engine:
        outputs = engine.generate(input_ids=PROMPTS, sampling_params=params, logprob_mode=mode)
        resolved = engine.resolved
    sequences = [
        ScoredSequence(prompt, output.token_ids, output.logprobs, output.logprob_mode, temperature)
        for prompt, output in zip(PROMPTS, outputs, strict=True)
    ]
    return resolved, sequences


@pytest.mark.parametrize(
    ("mode", "temperature", "dtype"),
    [("raw", 0.7, "float32"), ("temperature", 0.7, "float32"), ("sampled", 1.0, "float32"), ("raw", 1.0, "bfloat16")],
)
def test_a_true_run_passes(tmp_path: Path, mode: LogprobMode, temperature: float, dtype: str) -> None:
    report = rescore(*generate(tmp_path, mode, temperature, dtype))
    assert (report["rescored"], report["num_rescored_tokens"]) == (3, 50)
    assert report["mean_logprob_difference"] <= report["max_logprob_difference"]
    assert report["max_logprob_difference"] < (1e-4 if dtype == "float32" else 0.2)


def test_wrong_tokens_weights_or_numbers_are_refused(tmp_path: Path) -> None:
    resolved, sequences = generate(tmp_path, "temperature", 1.0)
    *others, last = sequences
    other_token = [*last.token_ids[:-1], (last.token_ids[-1] + 1) % 512]
    other_weights = msgspec.structs.replace(resolved, engine=msgspec.structs.replace(resolved.engine, seed=6))
    not_a_number = msgspec.structs.replace(last, logprobs=[float("nan"), *last.logprobs[1:]])
    wrong: list[tuple[ResolvedConfig, ScoredSequence]] = [
        (resolved, msgspec.structs.replace(last, token_ids=other_token)),
        (resolved, msgspec.structs.replace(last, logprobs=[value + 0.01 for value in last.logprobs])),
        (resolved, not_a_number),
        (other_weights, last),
    ]
    for settings, sequence in wrong:
        with pytest.raises(InternalError, match="differ from the reference"):
            rescore(settings, [*others, sequence])


def test_a_lost_token_is_told(tmp_path: Path) -> None:
    resolved, sequences = generate(tmp_path, "raw", 1.0)
    short = msgspec.structs.replace(sequences[1], logprobs=sequences[1].logprobs[:-1])
    with pytest.raises(InternalError, match="were to be re-scored"):
        rescore(resolved, [short])


def test_nothing_to_rescore_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, _ = generate(tmp_path, "raw", 1.0)
    monkeypatch.setattr(rescoring, "resolve", None)
    assert rescore(resolved, []) == {"rescored": 0}


def test_the_oracle_is_the_same_model_with_other_kernels(tmp_path: Path) -> None:
    resolved, _ = generate(tmp_path, "raw", 1.0, "bfloat16")
    oracle = oracle_settings(resolved, 45)
    assert (oracle.attention_backend, oracle.dtype, oracle.kv_dtype) == ("reference", "bfloat16", "bfloat16")
    assert (oracle.engine.seed, oracle.engine.load_format, oracle.folder) == (5, "dummy", resolved.folder)
    assert (oracle.context_length, oracle.max_total_num_tokens) == (45, 48)


def test_a_plan_scores_the_output_alone() -> None:
    plan = scoring_plan(3, ScoredSequence([5, 6, 7], [8, 9], [-1.0, -2.0]), page_size=2)
    assert plan.token_ids.tolist() == [5, 6, 7, 8] and plan.page_ids.tolist() == [1, 2]
    assert plan.new_slots[0].logprobs.prompt_start == 3 and not plan.row_samples.any()


@pytest.mark.parametrize(("num_items", "num_wanted"), [(1, 16), (16, 16), (512, 16), (5, 2), (9, 0)])
def test_evenly_spaced(num_items: int, num_wanted: int) -> None:
    found = evenly_spaced(num_items, num_wanted)
    assert len(found) == min(num_items, num_wanted)
    if num_wanted > 1:
        assert (found[0], found[-1]) == (0, num_items - 1)
        assert num_items == 1 or np.ptp(np.diff(found)) <= 1
