"""The demo, a few steps long: its figures, and that its files let anyone recompute rewards and logprobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from headrace.rl.arithmetic import Problem, reward
from headrace.rl.conversations import read_conversations
from headrace.rl.demo import POLICY, TOOL_POLICY, Demo, checkpoint_digests, run_demo
from headrace.rl.demo_options import DemoOptions
from headrace.rl.display import StepRecord
from headrace.rl.products import product_reward
from headrace.types.errors import ConfigError

FIELDS = {
    "reward_start",
    "reward_end",
    "steps",
    "updates",
    "requests",
    "lost_requests",
    "max_abs_logprob_diff",
    "tokens_per_second",
    "update_pause_ms_p50",
    "final_version",
    "digest_match",
    "output_dir",
}
STEPS, GROUPS, SIZE = 6, 4, 4


def _options(folder: Path, **changes: Any) -> DemoOptions:
    small: dict[str, Any] = {"steps": STEPS, "num_groups": GROUPS, "group_size": SIZE, "num_threads": 1}
    return DemoOptions(output_dir=str(folder), **{**small, **changes})


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_demo(_options(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def rollouts(summary: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(summary["output_dir"]) / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_figures_are_those_promised(summary: dict[str, Any]) -> None:
    assert set(summary) == FIELDS
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["steps"], summary["updates"]) == (STEPS, STEPS)
    assert (summary["requests"], summary["lost_requests"]) == (STEPS * GROUPS * SIZE, 0)
    assert summary["final_version"] == f"step-{STEPS}"
    assert summary["digest_match"] is True
    assert 0 < summary["max_abs_logprob_diff"] <= 1e-4
    assert summary["tokens_per_second"] > 0 and summary["update_pause_ms_p50"] > 0


def test_rewards_can_be_recomputed_from_ids(summary: dict[str, Any], rollouts: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    assert len(rollouts) == summary["requests"]
    for rollout in rollouts:
        assert tokenizer.encode(rollout["prompt"]) == rollout["prompt_ids"]
        text = tokenizer.decode(rollout["ids"], skip_special_tokens=True)
        left, right = rollout["prompt"].split("\n")[1].removesuffix("=?<|im_end|>").split("+")
        assert rollout["answer"] == int(left) + int(right)
        assert rollout["text"] == text
        assert rollout["reward"] == reward(Problem(int(left), int(right)), text)
    by_step = [[r["reward"] for r in rollouts if r["step"] == step] for step in range(1, STEPS + 1)]
    means = [sum(rewards) / len(rewards) for rewards in by_step]
    assert summary["reward_start"] == pytest.approx(sum(means[:5]) / 5)
    assert summary["reward_end"] == pytest.approx(sum(means[-5:]) / 5)


@pytest.mark.parametrize(("weights", "step"), [("weights_first", 1), ("weights_last", STEPS)])
def test_logprobs_can_be_recomputed_from_the_weights(
    summary: dict[str, Any], rollouts: list[dict[str, Any]], weights: str, step: int
) -> None:
    model = Qwen3ForCausalLM.from_pretrained(Path(summary["output_dir"]) / weights, dtype=torch.float32)
    chosen = [rollout for rollout in rollouts if rollout["step"] == step]
    assert len(chosen) == GROUPS * SIZE
    for rollout in chosen:
        ids, start = rollout["prompt_ids"] + rollout["ids"], len(rollout["prompt_ids"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout["ids"]).unsqueeze(1)).squeeze(1)
        assert torch.allclose(torch.tensor(rollout["logprobs"]), expected, rtol=0, atol=1e-4)


def test_each_rollout_names_the_version_that_made_it(rollouts: list[dict[str, Any]]) -> None:
    for rollout in rollouts:
        assert rollout["spans"] == [[f"step-{rollout['step']}", len(rollout["ids"])]]
        assert len(rollout["logprobs"]) == len(rollout["ids"])


def test_samples_of_a_group_differ_and_have_their_own_seeds(rollouts: list[dict[str, Any]]) -> None:
    assert len({rollout["seed"] for rollout in rollouts}) == len(rollouts)
    group = [tuple(r["ids"]) for r in rollouts if (r["step"], r["group"]) == (1, 0)]
    assert len(group) == SIZE and len(set(group)) > 1


def test_the_output_holds_picture_and_weights(summary: dict[str, Any]) -> None:
    output = Path(summary["output_dir"])
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    steps = [json.loads(line) for line in (output / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert checkpoint_digests(output / "weights_first") == checkpoint_digests(POLICY)
    assert checkpoint_digests(output / "weights_last") != checkpoint_digests(POLICY)


def test_with_tools_conversations_are_learned_from(tmp_path: Path) -> None:
    summary = run_demo(_options(tmp_path, tools=True, steps=2))
    assert set(summary) == FIELDS and (summary["lost_requests"], summary["digest_match"]) == (0, True)
    assert 0 < summary["max_abs_logprob_diff"] <= 1e-4  # also of what was sampled behind a tool's answer
    conversations = read_conversations(tmp_path / "rollouts.jsonl")
    assert len(conversations) == summary["requests"] == 2 * GROUPS * SIZE
    assert any(len(each.turns) > 1 and 0 in each.loss_mask for each in conversations)
    for each in conversations:
        right = each.status == "done" and product_reward(each.data["answer"], each.reply)
        assert each.reward == right and {version for version, _ in each.spans} <= {each.spans[0][0], None}
    assert checkpoint_digests(tmp_path / "weights_first") == checkpoint_digests(TOOL_POLICY)


def test_without_push_the_engine_keeps_its_first_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_demo(_options(tmp_path / "made", push=False, steps=2))
    assert (summary["updates"], summary["final_version"], summary["digest_match"]) == (0, "default", False)
    assert summary["max_abs_logprob_diff"] <= 1e-4
    lines = (tmp_path / "made" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["spans"][0][0] for line in lines} == {"default"}
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "step 1/2" in printed.err and "step 2/2" in printed.err and "no update" in printed.err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("seed", -1),
        ("num_groups", 0),
        ("group_size", 1),
        ("num_threads", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
    ],
)
def test_bad_options_are_named(field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=field) as raised:
        DemoOptions(**options)
    assert raised.value.field == field


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        run_demo(_options(tmp_path / "taken"))


def test_an_interrupted_demo_leaves_its_picture_and_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Demo.run_step

    def run_step(demo: Demo, step: int) -> StepRecord:
        if step == 3:
            raise KeyboardInterrupt
        return real(demo, step)

    monkeypatch.setattr(Demo, "run_step", run_step)
    with pytest.raises(KeyboardInterrupt):
        run_demo(_options(tmp_path))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    steps = [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    rollouts = (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert steps == [1, 2] and {json.loads(line)["step"] for line in rollouts} == {1, 2}


@pytest.mark.parametrize("name", ["circle", "a\0b"])
def test_an_output_dir_that_is_no_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "circle").symlink_to("circle")  # some versions of Python resolve it; it cannot be made a folder either
    with pytest.raises(ConfigError) as caught:
        run_demo(_options(tmp_path / name))
    assert caught.value.field == "output_dir"
