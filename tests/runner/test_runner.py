"""Plans in, results out: sampled tokens feed the next step, prompt scores, one packed forward whatever the rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from headrace.config import EngineConfig, resolve
from headrace.runner import Runner, prompt_scores
from headrace.runner import runner as runner_module
from headrace.types.errors import CheckpointError, ConfigError
from headrace.types.plan import LAST_TOKEN, StepResult
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions
from tests.parity.models import VOCAB_SIZE, make_model, reference_logits, save_model
from tests.runner.plans import PlanBuilder

GREEDY = TokenSampling(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3")


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("qwen3"))


def build(folder: Path, **settings: Any) -> Runner:
    defaults: dict[str, Any] = {
        "kv_pool_tokens": 4096,
        "max_running_requests": 40,
        "num_threads": 1,
        "dtype": "float32",
    }
    return Runner(resolve(EngineConfig(model=str(folder), **(defaults | settings)), folder))


def plans_for(**settings: Any) -> PlanBuilder:
    return PlanBuilder(page_size=settings.get("page_size", 16), num_pages=4096 // settings.get("page_size", 16))


def tokens_of(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(VOCAB_SIZE) for _ in range(length)]


def decode(runner: Runner, plans: PlanBuilder, slots: list[int], num_steps: int) -> list[StepResult]:
    """Steps of one token each, whose ids only the device knows."""
    results = []
    for _ in range(num_steps):
        for slot in slots:
            plans.append(slot)
        results.append(runner.launch(plans.step([(slot, 1) for slot in slots])).wait())
    return results


@pytest.mark.parametrize(
    "settings", [{}, {"numerics": "invariant"}, {"attention_backend": "reference"}, {"page_size": 1}]
)
def test_greedy_tokens_and_logprobs_equal_transformers(
    model: PreTrainedModel, folder: Path, settings: dict[str, Any]
) -> None:
    runner, plans = build(folder, **settings), plans_for(**settings)
    prompts = {3: tokens_of(0, 1), 0: tokens_of(1, 30), 7: tokens_of(2, 9)}
    for slot, tokens in prompts.items():
        plans.enter(slot, tokens, sampling=GREEDY)
    num_steps = 12 if "attention_backend" in settings else 64
    results = [runner.launch(plans.step([(slot, len(tokens)) for slot, tokens in prompts.items()])).wait()]
    results += decode(runner, plans, list(prompts), num_steps - 1)
    assert [result.step_id for result in results] == list(range(num_steps))
    for row, tokens in enumerate(prompts.values()):
        generated = [int(result.token_ids[row, 0]) for result in results]
        logprobs = torch.tensor([float(result.logprobs[row, 0]) for result in results])
        logits = reference_logits(model, tokens + generated)[len(tokens) - 1 : -1]
        top_two = logits.topk(2).values
        decided = top_two[:, 0] - top_two[:, 1] > 1e-3
        same = logits.argmax(-1) == torch.tensor(generated)
        assert bool((same | ~decided).all())
        expected = torch.log_softmax(logits, -1)[torch.arange(num_steps), torch.tensor(generated)]
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


def test_result_shapes_and_a_chunk_that_samples_nothing(folder: Path) -> None:
    runner, plans = build(folder), plans_for()
    plans.enter(0, tokens_of(0, 30))
    plans.enter(1, tokens_of(1, 4))
    first = runner.launch(plans.step([(0, 20), (1, 4)])).wait()
    assert first.token_ids.shape == first.logprobs.shape == (1, 1) and first.num_tokens.tolist() == [1]
    assert first.token_ids.dtype == np.int32 and first.logprobs.dtype == np.float32
    alone = runner.launch(plans.step([(0, 5)])).wait()
    assert alone.token_ids.shape == (0, 1) and not alone.prompt_logprobs
    empty = runner.launch(plans.step([])).wait()
    assert empty.step_id == 2 and empty.token_ids.shape == (0, 1)


def test_a_slot_is_reused_and_its_old_tokens_and_pages_forgotten(folder: Path) -> None:
    runner, plans = build(folder), plans_for()
    plans.enter(0, tokens_of(0, 40), sampling=GREEDY)
    runner.launch(plans.step([(0, 40)])).wait()
    decode(runner, plans, [0], 10)
    plans.enter(0, tokens_of(5, 7), sampling=GREEDY)
    again = [runner.launch(plans.step([(0, 7)])).wait(), *decode(runner, plans, [0], 10)]
    fresh_runner, fresh_plans = build(folder), plans_for()
    fresh_plans.enter(0, tokens_of(5, 7), sampling=GREEDY)
    fresh = [fresh_runner.launch(fresh_plans.step([(0, 7)])).wait(), *decode(fresh_runner, fresh_plans, [0], 10)]
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in fresh]


def test_known_and_last_tokens_give_the_same_result(folder: Path) -> None:
    results = []
    for known in (False, True):
        runner, plans = build(folder), plans_for()
        plans.enter(0, tokens_of(0, 12), sampling=GREEDY)
        token = int(runner.launch(plans.step([(0, 12)])).wait().token_ids[0, 0])
        plans.append(0, token if known else LAST_TOKEN)
        results.append(runner.launch(plans.step([(0, 1)])).wait().logprobs.tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("start", [0, 1, 10, 29])
@pytest.mark.parametrize("mode", ["raw", "temperature"])
def test_prompt_logprobs_in_chunks(
    model: PreTrainedModel, folder: Path, start: int, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_scores, "_MAX_LOGITS_BYTES", 4 * VOCAB_SIZE * 3)
    runner, plans = build(folder), plans_for()
    tokens = tokens_of(0, 30)
    options = LogprobOptions(prompt_mode=mode, prompt_start=start, num_top=2, token_ids=(5, 0, 7))
    plans.enter(1, tokens_of(9, 20))
    plans.enter(0, tokens, logprobs=options, sampling=TokenSampling(temperature=0.7))
    expected = torch.log_softmax(reference_logits(model, tokens) / (0.7 if mode == "temperature" else 1.0), -1)
    found: dict[int, float] = {}
    for rows in ([(1, 20), (0, 8)], [(0, 1)], [(0, 21)]):
        for row, scores in runner.launch(plans.step(rows)).wait().prompt_logprobs.items():
            assert rows[row][0] == 0 and scores.extras is not None
            for index, value in enumerate(scores.logprobs):
                position = scores.first + index
                found[position] = float(value)
                before = expected[position - 1]
                top = before.topk(2)
                assert scores.extras.top_ids[index].tolist() == top.indices.tolist()
                torch.testing.assert_close(
                    torch.from_numpy(scores.extras.top_logprobs[index]), top.values, atol=1e-4, rtol=0
                )
                torch.testing.assert_close(
                    torch.from_numpy(scores.extras.asked_logprobs[index]), before[[5, 0, 7]], atol=1e-4, rtol=0
                )
    assert sorted(found) == list(range(max(1, start), 30))
    for position, value in found.items():
        assert value == pytest.approx(float(expected[position - 1, tokens[position]]), abs=1e-4)


def test_a_preempted_sequence_scores_its_prompt_only(folder: Path) -> None:
    runner, plans = build(folder), plans_for()
    tokens = tokens_of(0, 12)
    plans.enter(0, tokens + [3, 4, 5], num_prompt_tokens=12, logprobs=LogprobOptions(prompt_start=0))
    result = runner.launch(plans.step([(0, 15)])).wait()
    assert result.prompt_logprobs[0].first == 1 and len(result.prompt_logprobs[0].logprobs) == 11


def test_extras_are_keyed_by_the_plans_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_MAX_LOGITS_BYTES", 4 * VOCAB_SIZE * 2)  # two sampled rows at a time
    runner, plans = build(folder), plans_for()
    for slot in range(5):
        plans.enter(slot, tokens_of(slot, 20), logprobs=LogprobOptions(num_top=3 if slot in (2, 4) else 0))
    result = runner.launch(plans.step([(3, 20), (0, 10), (2, 20), (1, 20), (4, 20)])).wait()
    assert set(result.extras) == {2, 4} and len(result.token_ids) == 4
    assert result.extras[2].top_ids.shape == (1, 3)


@pytest.mark.parametrize("seed_mates", [0, 3, 30])
def test_seeded_samples_do_not_depend_on_the_batch(folder: Path, seed_mates: int) -> None:
    def sample(num_mates: int) -> list[int]:
        runner, plans = build(folder, numerics="invariant"), plans_for()
        plans.enter(35, tokens_of(0, 20), seed=77)
        for slot in range(num_mates):
            plans.enter(slot, tokens_of(100 + slot, 3 + slot), seed=slot)
        rows = [(slot, 3 + slot) for slot in range(num_mates)] + [(35, 20)]
        results = [runner.launch(plans.step(rows)).wait()]
        results += decode(runner, plans, [slot for slot, _ in rows], 12)
        return [int(result.token_ids[-1, 0]) for result in results]

    assert sample(seed_mates) == sample(0)


def test_gemm_calls_do_not_grow_with_the_number_of_sequences(folder: Path) -> None:
    counts = []
    for num_rows in (1, 8, 40):
        runner, plans = build(folder), plans_for()
        for slot in range(num_rows):
            plans.enter(slot, tokens_of(slot, 5 + slot))
        before = runner.counters()["num_gemm_calls"]
        runner.launch(plans.step([(slot, 5 + slot) for slot in range(num_rows)])).wait()
        prefill = runner.counters()["num_gemm_calls"] - before
        decode(runner, plans, list(range(num_rows)), 1)
        counts.append((prefill, runner.counters()["num_gemm_calls"] - before - prefill))
    assert counts == [(9, 9)] * 3  # four linear layers in each of two blocks, and the head


def test_loading_reports_progress_and_names_what_is_missing(
    model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = EngineConfig(model=str(folder), kv_pool_tokens=256, num_threads=1)
    Runner(resolve(settings, folder), lambda *told: seen.append(told))
    assert [done for _, done, _ in seen] == list(range(1, len(model.state_dict()) + 1))
    assert {(stage, total) for stage, _, total in seen} == {("weights", len(model.state_dict()))}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError):
        build(tmp_path)


def test_dummy_weights_are_a_function_of_the_seed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    digests = [build(tmp_path, load_format="dummy", seed=seed).weights.digest() for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_a_backend_that_cannot_run_this_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="invariant"):
        build(folder, attention_backend="reference", numerics="invariant")
