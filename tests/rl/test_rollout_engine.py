"""The loop over a real engine, in process and over HTTP, with the demo's policy, which now and then calls its tool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from headrace import AsyncClient, Engine, serve
from headrace.rl.conversations import Conversation, RolloutLimits, new_group
from headrace.rl.demo import TOOL_POLICY
from headrace.rl.products import calculator
from headrace.rl.rollout import RolloutLoop
from headrace.rl.tools import FunctionTool
from headrace.text import Tokenizer

PARAMS = {"max_new_tokens": 96}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings: dict[str, Any] = {"num_threads": 1, "dtype": "float32", "context_length": 512, "numerics": "invariant"}
    with Engine(TOOL_POLICY, inprocess=True, device="cpu", **settings) as started:
        yield started


def conversations() -> list[Conversation]:
    groups = [
        new_group([{"role": "user", "content": f"{left}*37=?"}], 6, group=str(left), seed=left) for left in (12, 58)
    ]
    return [each for group in groups for each in group]


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[Conversation]:
    """What undisturbed conversations come to."""
    found = asyncio.run(RolloutLoop(engine, [calculator], sampling_params=PARAMS).run(conversations()))
    faults = {call.fault for each in found for turn in each.turns for call in turn.calls}
    assert {each.status for each in found} <= {"done", "turns"} and "" in faults
    return found


def drawn(found: list[Conversation]) -> list[tuple[list[int], list[float], list[int]]]:
    return [(each.ids, each.logprobs, each.loss_mask) for each in found]


def test_logprobs_are_those_of_the_whole_conversation(engine: Engine, expected: list[Conversation]) -> None:
    """Scored in one piece: what the model saw when it drew a token is what the record says it saw."""
    scored = engine.score(input_ids=[each.prompt_ids + each.ids for each in expected])
    for conversation, score in zip(expected, scored, strict=True):
        behind = score.prompt_logprobs[len(conversation.prompt_ids) :]
        for logprob, again, mark in zip(conversation.logprobs, behind, conversation.loss_mask, strict=True):
            assert again is not None and (not mark or abs(logprob - again) < 1e-4)


def test_a_client_runs_the_same_conversations(engine: Engine, expected: list[Conversation]) -> None:
    async def work() -> list[Conversation]:
        async with (
            AsyncClient(serve(engine).url) as client,
            RolloutLoop(client, [calculator], tokenizer=TOOL_POLICY, sampling_params=PARAMS) as loop,
        ):
            return await loop.run(conversations())

    assert drawn(asyncio.run(work())) == drawn(expected)


def test_an_update_and_aborts_in_the_middle_change_no_token(engine: Engine, expected: list[Conversation]) -> None:
    """The same weights under another version: requests in flight are cut, and go on as they would have."""
    asynchronous = engine.asynchronous
    weights = {name: engine.get_weights_by_name(name) for name in engine.digest()}

    async def disturb() -> None:
        """Once a reply or two of each are under way, three times."""
        for number in range(3):
            begun = (await asynchronous.metrics())["num_generated_tokens"]
            while (await asynchronous.metrics())["num_generated_tokens"] < begun + len(expected):
                await asyncio.sleep(0)
            await asynchronous.abort(all=True)
            await asynchronous.update_weights_from_tensor(weights, f"again-{number}", in_flight="abort")

    async def work() -> list[Conversation]:
        loop = RolloutLoop(engine, [calculator], sampling_params=PARAMS)
        disturbing = asyncio.create_task(disturb())
        found = await loop.run(conversations())
        disturbing.cancel()
        return found

    found = asyncio.run(work())
    assert drawn(found) == drawn(expected)
    assert sum(each.num_resumes for each in found) > 0
    assert any(len({version for version, _ in each.spans if version}) > 1 for each in found)


@pytest.mark.parametrize("limits", [RolloutLimits(max_run_tokens=31), RolloutLimits()])
def test_what_is_cut_goes_on_as_it_would_have(
    engine: Engine, expected: list[Conversation], limits: RolloutLimits
) -> None:
    """By a bound, or by whoever calls `cut`: here the first tool that runs."""
    found, loops = conversations(), list[RolloutLoop]()

    async def cutting(expression: str) -> int:
        if limits.max_run_tokens is None and not num_runs:
            loops[0].cut()
        return calculator(expression)

    tool = FunctionTool(cutting, name="calculator")
    loops.append(RolloutLoop(engine, [tool], sampling_params=PARAMS, limits=limits))
    num_runs = 0
    while not all(each.is_over for each in found):
        asyncio.run(loops[0].run(found))
        num_runs += 1
    assert drawn(found) == drawn(expected) and num_runs > 1


def test_the_policy_reads_what_it_writes() -> None:
    """A token per tag, and a template that shows calls as it was taught to write them."""
    tokenizer = Tokenizer.load(TOOL_POLICY)
    function = {"name": "calculator", "arguments": {"expression": "12*37"}}
    text = tokenizer.apply_chat_template(
        [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}],
        add_generation_prompt=False,
        tokenize=False,
    )
    assert '<tool_call>{"name": "calculator", "arguments": {"expression": "12*37"}}</tool_call>' in text
    assert len(tokenizer.encode("<tool_call></tool_call>")) == 2
