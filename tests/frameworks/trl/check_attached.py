"""TRL's own trainers, unpatched, sample from an engine that `attach` gave them, or by a `rollout_func`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from headrace import Client, Engine, RequestError, serve
from headrace.rl.rollout import RolloutLimits, RolloutLoop
from headrace.rl.trl import TrlGeneration, WeightTransfer, attach, make_rollout_func
from tests.frameworks.trl.training import (
    CLOSE,
    CLOSE_LOGPROB,
    ENGINE,
    POLICY,
    arguments,
    logged,
    model_logprobs,
    right,
    sums,
)

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(500)]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(str(POLICY), **ENGINE) as engine:
        yield engine


def grpo(folder: Path, max_steps: int = 2, reward: Any = right, **more: Any) -> Any:
    settings = more.pop("settings", {})
    args = arguments(GRPOConfig, folder, max_steps=max_steps, **settings)
    return GRPOTrainer(str(POLICY), reward, args=args, train_dataset=sums(), **more)


class Watched:
    """What an attached trainer was given, and how far its probabilities are from those of its own model."""

    def __init__(self, trainer: Any, generation: TrlGeneration) -> None:
        self.differences: list[float] = []
        self.counts: list[int] = []
        drawn = generation.generate

        def generate(prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Any:
            found = drawn(prompts, images, num_generations, profiler)
            self.counts.append(len(found[1]))
            for prompt, ids, values, tokens in zip(*found, strict=True):
                assert [[token] for token in ids] == tokens
                expected = model_logprobs(trainer.model, prompt, ids)
                pairs = zip(expected, values, strict=True)
                self.differences += [abs(math.exp(theirs) - math.exp(ours)) for theirs, (ours,) in pairs]
            return found

        generation.generate = generate  # type: ignore[method-assign]


def test_grpo_learns(engine: Engine, tmp_path: Path) -> None:
    """Each step's samples are of that step's weights, TRL's own correction finds nothing to correct, and the reward
    rises."""
    trainer = grpo(tmp_path, max_steps=40)
    generation = attach(trainer, engine, verify=True)
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) <= CLOSE_LOGPROB
    assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1.0] * 40, abs=1e-4)
    reports = generation.policy.reports
    assert [report.update.version for report in reports] == [str(step) for step in range(40)]
    assert all(report.is_verified for report in reports) and engine.version == "39"
    rewards = logged(trainer, "reward")
    print("reward", [round(each, 3) for each in rewards])
    print("seconds of a push", sum(each.seconds for each in reports) / 40)
    assert sum(rewards[-8:]) > sum(rewards[:8]) + 0.5


def test_rloo(engine: Engine, tmp_path: Path) -> None:
    args = arguments(RLOOConfig, tmp_path, max_steps=3)
    trainer = RLOOTrainer(str(POLICY), right, args=args, train_dataset=sums())
    generation = attach(trainer, engine)
    watched = Watched(trainer, generation)
    trainer.train()
    assert watched.counts == [32] * 3 and max(watched.differences) <= CLOSE
    assert [report.update.version for report in generation.policy.reports] == ["0", "1", "2"]


def test_a_server_is_as_good_as_an_engine(engine: Engine, tmp_path: Path) -> None:
    """Over HTTP, at another temperature, with what cuts the distribution and what `generation_kwargs` adds."""
    settings = {"temperature": 3.0, "top_p": 0.95, "top_k": 50, "generation_kwargs": {"max_tokens": 5, "seed": 3}}
    trainer = grpo(tmp_path, settings=settings)
    handle = serve(engine)
    with Client(handle.url) as client:
        generation = attach(trainer, client)
        trainer.train()
        assert logged(trainer, "completions/max_length") == [5.0, 5.0]
        assert client.status().version == "1"
        prompt = trainer.processing_class.apply_chat_template([{"role": "user", "content": "1+2=?"}])["input_ids"]
        first, second, other = generation.generate([prompt, prompt, [*prompt, 5]], None, 2)[1:3][0]
        assert first != second and len(other) == 5
        assert generation.generate([prompt, prompt, [*prompt, 5]], None, 2)[1] == [first, second, other]
    handle.stop()


def test_adapters_are_pushed_merged(engine: Engine, tmp_path: Path) -> None:
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = grpo(tmp_path, max_steps=2, peft_config=adapters)
    generation = attach(trainer, engine, verify=True)
    before = engine.digest()
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) <= CLOSE_LOGPROB
    changed = {name for name, value in engine.digest().items() if value != before[name]}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    assert len(generation.policy.reports) == 2


def test_a_rollout_func_brings_its_versions(engine: Engine, tmp_path: Path) -> None:
    """TRL hands its columns to the reward function. Attached too, the trainer corrects."""
    versions: list[set[str]] = []

    def reward(completions: Any, weight_version: list[str], **columns: Any) -> list[float]:
        versions.append(set(weight_version))
        return right(completions, **columns)

    trainer = grpo(tmp_path / "alone", reward=reward, rollout_func=make_rollout_func(engine))
    trainer.train()
    assert versions == [{"0"}, {"1"}] and engine.version == "1"
    trainer = grpo(tmp_path / "attached", reward=reward, rollout_func=make_rollout_func(engine))
    generation = attach(trainer, engine)
    trainer.train()
    assert versions[2:] == [{"0"}, {"1"}] and len(generation.policy.reports) == 2
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) <= CLOSE_LOGPROB


def calculator(expression: str) -> str:
    """Works out a product.

    Args:
        expression: two factors, as 12*34
    """
    left, right = expression.split("*")
    return str(int(left) * int(right))


def test_conversations_with_tools(tmp_path: Path) -> None:
    """A loop's conversations are the rollouts: what the tool said is masked, and TRL corrects what was sampled."""
    from headrace.rl.demo import TOOL_POLICY

    seen: list[dict[str, Any]] = []

    def reward(completions: Any, **columns: Any) -> list[float]:
        seen.append(columns)
        return [value or 0.0 for value in columns["rollout_reward"]]

    with Engine(str(TOOL_POLICY), **{**ENGINE, "context_length": 512}) as engine:
        loop = RolloutLoop(
            engine,
            [calculator],
            sampling_params={"max_new_tokens": 64},
            limits=RolloutLimits(max_turns=3),
            reward=lambda each: float(len(each.turns)),
            logprob_mode="sampled",
        )
        args = arguments(GRPOConfig, tmp_path, max_steps=2)
        trainer = GRPOTrainer(
            str(TOOL_POLICY),
            reward,
            args=args,
            train_dataset=sums().map(lambda row: {"prompt": [{"role": "user", "content": "12*34=?"}]}),
            rollout_func=make_rollout_func(engine, loop=loop),
        )
        attach(trainer, engine)
        trainer.train()
        asyncio.run(loop.close())
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) <= CLOSE_LOGPROB
    turns = [number for columns in seen for number in columns["rollout_turns"]]
    assert max(turns) > 1, "no conversation called the tool"
    assert {version for columns in seen for version in columns["weight_version"]} == {"0", "1"}


def test_what_cannot_be_attached_is_named(engine: Engine, tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    with pytest.raises(RequestError, match="without accelerator") as caught:
        attach(object(), engine)
    assert caught.value.field == "trainer"
    trainer.args.generation_kwargs = {"num_beams": 2}
    generation = attach(trainer, engine)
    with pytest.raises(RequestError, match="num_beams"):
        generation.generate([[1, 2]], None, 1)
    with pytest.raises(RequestError, match="images"):
        generation.generate([[1, 2]], [["image"]], 1)
    attach(trainer, engine)
    trainer.vllm_generation = object()
    with pytest.raises(RequestError, match="of its own"):
        attach(trainer, engine)


def test_a_transfer_leaves_no_pause(engine: Engine) -> None:
    transfer = WeightTransfer(engine)
    transfer.init_weight_transfer()
    transfer.pause()
    with pytest.raises(Exception, match="nope"):
        transfer.send_weights(iter([("nope", __import__("torch").zeros(1))]))
    assert engine.status().paused
    transfer.destroy()
    assert not engine.status().paused and not transfer.reports
