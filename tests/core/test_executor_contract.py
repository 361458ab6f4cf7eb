"""What every executor keeps to, whoever computes: order, sampling that waits, failures, and one answer per plan."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.config import EngineConfig, resolve
from headrace.core.executor import Executor, LocalExecutor
from headrace.core.faults import StepError
from headrace.core.rank_executor import RankExecutor
from headrace.runner import build_runner
from headrace.types.memory import MemoryTag, Restore
from headrace.types.plan import SamplePatch, StepPlan, StepResult
from headrace.types.request import TokenSampling
from tests.core.ranks import STAGES, start_two
from tests.parity.models import VOCAB_SIZE, make_model, save_model
from tests.runner.plans import PlanBuilder
from tests.sampling.masks import allow

PAGE_SIZE = 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
NUM_STEPS = 2
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "page_size": PAGE_SIZE,
    "kv_pool_tokens": 512,
    "max_running_requests": 4,
    "max_num_batched_tokens": 6,
    "overlap_depth": 1,
    "num_threads": 1,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ranks": {},
    "stages": STAGES,
    "stages-triton": STAGES | {"attention_backend": "triton"},
}
EACH = ["cpu", "triton", "ranks", "stages"]
"""For what does not depend on both: what a rank does with its memory, and which plans are refused."""

THREE = (TokenSampling(0.0), TokenSampling(0.8, 5, 0.9, 0.0, 1.2, 0.3, 0.2, ((7, 3.0),)), TokenSampling(1.0))
"""One row more than a step of four has: the last is padding."""

TWO, ONE = THREE[:2], THREE[:1]

# Rows that pad a step compute something from whatever memory held; numpy, which interprets them, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", params=[*EACH, "stages-triton"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    num_layers = 2 if "stages" in request.param else 1
    model = make_model("qwen3", **SIZES, num_hidden_layers=num_layers)
    folder = save_model(model, tmp_path_factory.mktemp("tiny"))
    found: Executor
    if request.param in LAYOUTS:
        with pytest.MonkeyPatch.context() as patch:
            if "triton" in request.param:
                patch.setattr("headrace.ipc.rank_spawn.RANK_MODULE", "tests.core.quick_rank")
            found = start_two(folder, SETTINGS | LAYOUTS[request.param])
    else:
        config = EngineConfig(model=str(folder), attention_backend=request.param, **SETTINGS)
        found = LocalExecutor(build_runner(resolve(config, folder)))
    yield found
    found.close()


class Story:
    """A few sequences, sampled differently, from their prompts on: their plans, each with another token per slot. Of
    several stages it is a known one: none waits for another's sample."""

    def __init__(self, executor: Executor, samplings: Sequence[TokenSampling]) -> None:
        self._samplings = samplings
        is_staged = isinstance(executor, RankExecutor) and executor.resolved.engine.pp_size > 1
        self._next_token = (9,) if is_staged else ()
        self._plans = PlanBuilder(page_size=PAGE_SIZE, num_pages=60)
        self._is_first = True

    def next(self, *, waits: bool = False) -> StepPlan:
        slots = range(len(self._samplings))
        for slot, sampling in enumerate(self._samplings):
            if self._is_first:
                self._plans.enter(slot, [slot + 3, 5], sampling=sampling, seed=slot)
            else:
                self._plans.append(slot, *self._next_token)
        plan = self._plans.step([(slot, 2 if self._is_first else 1) for slot in slots])
        self._is_first = False
        return msgspec.structs.replace(plan, waits_to_sample=waits)


def run(
    executor: Executor,
    num_steps: int,
    *,
    waits: bool = False,
    patch: SamplePatch | None = None,
    samplings: Sequence[TokenSampling] = TWO,
) -> list[Any]:
    """Tokens and bits of log-probabilities of so many steps, each submitted while the one before is in flight."""
    story, found = Story(executor, samplings), []
    for number in range(num_steps):
        plan = story.next(waits=waits)
        executor.submit(plan)
        if number:
            found.append(values(executor.collect(), number - 1))
        if waits:
            executor.sample(plan.step_id, patch)
    return [*found, values(executor.collect(), num_steps - 1)]


def values(result: StepResult, step_id: int) -> Any:
    assert result.step_id == step_id
    return result.token_ids.tolist(), result.logprobs.view(np.int32).tolist()


def check_it_goes_on(executor: Executor, expected: list[Any]) -> None:
    """Whatever happened before, new sequences in all slots get what they get alone, for as many steps as these
    are: one, but where the test is of steps that follow each other."""
    assert run(executor, len(expected)) == expected


def check_first(executor: Executor, expected: list[Any]) -> None:
    """The first step of a single sequence gives what it gives the first of several: its token, and its score about."""
    tokens, logprobs = values(executor.collect(), 0)
    assert tokens == expected[0][0][:1]
    found, among = (np.array(each, np.int32).view(np.float32) for each in (logprobs, expected[0][1][:1]))
    np.testing.assert_allclose(found, among, atol=1e-5)


@pytest.fixture(scope="module")
def expected(executor: Executor) -> list[Any]:
    """Of steps that do not wait."""
    return run(executor, NUM_STEPS)


def test_sampling_apart_gives_the_same_bits(executor: Executor, expected: list[Any]) -> None:
    assert run(executor, NUM_STEPS, waits=True) == expected
    assert run(executor, 1, waits=True, samplings=THREE) == run(executor, 1, samplings=THREE)


def test_a_patch_that_comes_late_says_what_may_be_sampled(executor: Executor, expected: list[Any]) -> None:
    ids = [11, 30, 31, 32, 64, VOCAB_SIZE - 1]
    patch = allow([0, 2], [ids, ids[:1]], VOCAB_SIZE)
    for tokens, _ in run(executor, 1, waits=True, patch=patch, samplings=THREE):
        assert tokens[0][0] in ids and tokens[2][0] == ids[0]
        assert tokens[1] == expected[0][0][1]
    everything = allow([0, 1], [range(VOCAB_SIZE)] * 2, VOCAB_SIZE)
    found = run(executor, NUM_STEPS, waits=True, patch=everything)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


def test_plans_are_answered_in_their_order_however_many_are_in_flight(executor: Executor, expected: list[Any]) -> None:
    story = Story(executor, TWO)
    for _ in range(3):
        executor.submit(story.next())
    assert [values(executor.collect(), step_id) for step_id in range(3)][:NUM_STEPS] == expected


@pytest.mark.parametrize("executor", EACH, indirect=True, scope="module")
def test_a_plan_before_the_sampling_of_the_last_fails_with_it(executor: Executor, expected: list[Any]) -> None:
    story = Story(executor, ONE)
    executor.submit(story.next())
    for _ in range(2):
        executor.submit(story.next(waits=True))
    executor.sample(2)
    check_first(executor, expected)
    for step_id in (1, 2):
        with pytest.raises(StepError, match=f"step {step_id}") as failure:
            executor.collect()
        assert failure.value.is_refusal == (step_id == 1)
    check_it_goes_on(executor, expected[:1])


@pytest.mark.parametrize("executor", EACH, indirect=True, scope="module")
def test_a_plan_that_is_collected_before_its_sampling_fails(executor: Executor, expected: list[Any]) -> None:
    for _ in range(4):  # more often than there are copies of what travels
        executor.submit(Story(executor, ONE).next(waits=True))
        with pytest.raises(StepError):
            executor.collect()
    check_it_goes_on(executor, expected[:1])


@pytest.mark.parametrize("waits", [False, True])
def test_after_a_failure_none_is_executed_until_it_was_collected(
    executor: Executor, expected: list[Any], waits: bool
) -> None:
    """It writes to a page table that no device has: what that is called depends on it, that it fails does not."""
    story = Story(executor, ONE)
    executor.submit(story.next())
    plan = story.next()
    cell = [np.array([at], np.int32) for at in (1 << 20, 0, 1)]
    cells = dict(zip(("page_slots", "page_columns", "page_ids"), cell, strict=True))
    executor.submit(msgspec.structs.replace(plan, **cells, waits_to_sample=waits))
    if waits:
        executor.sample(plan.step_id)
    executor.submit(story.next())
    check_first(executor, expected)
    for step_id in (1, 2):
        with pytest.raises(StepError, match=f"step {step_id}") as failure:
            executor.collect()
        assert not failure.value.is_refusal
    check_it_goes_on(executor, expected)


EVERY: list[MemoryTag] = ["weights", "kv_cache", "cuda_graph"]


@pytest.mark.parametrize("executor", EACH, indirect=True, scope="module")
@pytest.mark.parametrize(
    ("restore", "released"),
    [("copy", [EVERY[1:2], EVERY[:1], EVERY]), ("disk", [EVERY[:1], EVERY])],
    ids=["copy", "disk"],
)
def test_released_memory_comes_back_where_it_was(
    executor: Executor, expected: list[Any], restore: Restore, released: list[list[MemoryTag]]
) -> None:
    """Weights from either source; what else is released has none."""
    digests = digests_of(executor)
    for tags in released:
        exhaust(executor.release(tags, keeps_copy=restore == "copy"))
        exhaust(executor.release(tags, keeps_copy=False))  # of what is released already nothing is lost
        exhaust(executor.resume(tags, restore))
        assert digests_of(executor) == digests
        check_it_goes_on(executor, expected[:1])


def test_without_graphs_plans_are_executed_all_the_same(executor: Executor, expected: list[Any]) -> None:
    for _ in range(2):
        exhaust(executor.release(["cuda_graph"], keeps_copy=False))
    check_it_goes_on(executor, expected[:1])
    exhaust(executor.resume(["cuda_graph"], "await"))
    check_it_goes_on(executor, expected)


@pytest.mark.parametrize("executor", EACH, indirect=True, scope="module")
def test_a_resume_that_is_given_up_takes_nothing(executor: Executor, expected: list[Any]) -> None:
    digests = digests_of(executor)
    exhaust(executor.release(["weights"], keeps_copy=True))
    coming = executor.resume(["weights"], "copy")
    next(coming)
    coming.close()
    exhaust(executor.resume(["weights"], "copy"))
    assert digests_of(executor) == digests
    check_it_goes_on(executor, expected[:1])


@pytest.mark.parametrize("executor", EACH, indirect=True, scope="module")
def test_weights_that_are_awaited_are_zero(executor: Executor) -> None:
    digests = digests_of(executor)
    exhaust(executor.release(["weights"], keeps_copy=False))
    exhaust(executor.resume(["weights"], "await"))
    lost = digests_of(executor)
    assert all(lost[name] != digests[name] for name in digests)
    exhaust(executor.release(["weights"], keeps_copy=False))
    exhaust(executor.resume(["weights"], "disk"))
    assert digests_of(executor) == digests


def digests_of(executor: Executor) -> dict[str, str]:
    return dict(filter(None, executor.weights.digest_in_slices()))


def exhaust(slices: Generator[None]) -> None:
    for _ in slices:
        pass
