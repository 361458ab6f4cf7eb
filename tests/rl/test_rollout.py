"""The loop of conversations: tokens that stay as they were drawn, tools and what goes wrong with them, bounds, cuts."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import Client
from headrace.rl.conversations import Conversation, RolloutLimits, new_group
from headrace.rl.rollout import RolloutLoop, read_conversations
from headrace.rl.tools import FunctionTool
from headrace.text import Tokenizer
from headrace.types.errors import ConfigError, EngineDeadError, HeadraceError, RequestError
from tests.rl.scripted_engine import END, TOKENIZER, ScriptedEngine
from tests.text.builders import byte_level

ASKED = [{"role": "user", "content": "2+3?"}]
PLAIN = Tokenizer(byte_level("{{ messages[0].content }}"))
ADD = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>' + END


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b (int): the second

    Returns:
        a: nothing that describes the argument
    """
    return a + b


def answers(text: str) -> list[str]:
    """What the tools said in a conversation's text."""
    return re.findall(r"<\|im_start\|>tool\n(.*?)<\|im_end\|>", text, re.DOTALL)


def calls_then_says(before: str) -> str:
    """A model that calls once and then says what it was told."""
    found = answers(before)
    return f"It is {found[-1]}.{END}" if found else ADD


def text_of(conversation: Conversation) -> str:
    return TOKENIZER.decode(conversation.prompt_ids + conversation.ids, skip_special_tokens=False)


def sampled_text(conversation: Conversation) -> str:
    ids = [each for each, drawn in zip(conversation.ids, conversation.loss_mask, strict=True) if drawn]
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def check(conversation: Conversation) -> None:
    """Everything lines up, and turns cover exactly what was sampled."""
    count = len(conversation.ids)
    assert len(conversation.logprobs) == len(conversation.loss_mask) == count
    assert sum(number for _, number in conversation.spans) == count
    versions = [version for version, number in conversation.spans for _ in range(number)]
    for token_id, logprob, drawn, version in zip(
        conversation.ids, conversation.logprobs, conversation.loss_mask, versions, strict=True
    ):
        assert (logprob, version is not None) == ((-float(token_id), True) if drawn else (0.0, False))
    covered = [place for turn in conversation.turns for place in range(turn.start, turn.end)]
    if conversation.open_turn is not None:
        covered += range(conversation.open_turn, count)
    assert covered == [place for place, drawn in enumerate(conversation.loss_mask) if drawn]


def run(engine: ScriptedEngine, conversations: list[Conversation], *tools: Any, **settings: Any) -> RolloutLoop:
    """Run them to the end, check them; returns the loop, closed."""

    async def work() -> RolloutLoop:
        async with RolloutLoop(engine, tools, tokenizer=TOKENIZER, **settings) as loop:
            assert await loop.run(conversations) == conversations
            return loop

    loop = asyncio.run(work())
    for each in conversations:
        check(each)
    return loop


def one(script: Callable[[str], str], *tools: Any, **settings: Any) -> Conversation:
    group = new_group(ASKED, 1)
    run(ScriptedEngine(script), group, *tools, **settings)
    return group[0]


def test_a_tool_answers_and_the_model_goes_on() -> None:
    engine, group = ScriptedEngine(calls_then_says), new_group(ASKED, 3, seed=5)
    run(engine, group, add)
    for conversation in group:
        text = text_of(conversation)
        assert text.endswith(f"{ADD}\n<|im_start|>tool\n5{END}\n<|im_start|>assistant\nIt is 5.{END}")
        assert sampled_text(conversation) == ADD + f"It is 5.{END}"
        assert (conversation.status, conversation.reply) == ("done", "It is 5.")
        first, last = conversation.turns
        (call,) = first.calls
        assert (call.name, json.loads(call.arguments), call.content, call.fault) == ("add", {"a": 2, "b": 3}, "5", "")
        assert first.answers[0]["role"] == "tool" and first.answers[0]["content"] == "5"
        assert last.calls == [] and last.finish_reason == "stop"
    assert len({ask["params"].seed for ask in engine.asks}) == 6
    again, twin = ScriptedEngine(calls_then_says), new_group(ASKED, 3, seed=5)
    run(again, twin, add)
    assert {a["params"].seed for a in again.asks} == {a["params"].seed for a in engine.asks}


def test_sampled_ids_come_back_as_they_were() -> None:
    """A reply in tokens that no tokenizer would choose: the text is the same, the ids are not."""
    odd = [TOKENIZER.encode(each)[0] for each in "the wheel"]
    assert TOKENIZER.encode("the wheel") != odd and TOKENIZER.decode(odd) == "the wheel"

    class Odd(ScriptedEngine):
        async def generate(self, *args: Any, **options: Any) -> Any:
            (reply,) = await super().generate(*args, **options)
            if len(self.asks) == 1:
                reply.token_ids[:0] = odd
                reply.logprobs[:0] = [-float(each) for each in odd]
                reply.version_spans[:] = [("v1", len(reply.token_ids))]
            return [reply]

    engine, group = Odd(calls_then_says), new_group(ASKED, 1)
    run(engine, group, add)
    conversation, (first, second) = group[0], engine.asks
    assert conversation.ids[: len(odd)] == odd
    assert second["input_ids"][: len(first["input_ids"]) + len(odd)] == first["input_ids"] + odd
    assert conversation.turns[0].calls[0].content == "5"


@pytest.mark.parametrize(
    ("call", "said", "fault"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>', "missing required field `b`", "invalid"),
        ('<tool_call>{"name": "add", "arguments": {"a": "2", "b": 3}}</tool_call>', "Expected `int`", "invalid"),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "one of add, ", "invalid"),
        ('<tool_call>{"name": "add", "arg</tool_call>', "cannot be read", "invalid"),
        ("<tool_call>", "cannot be read", "invalid"),
        ('<tool_call>{"name": "fails", "arguments": {}}</tool_call>', "ZeroDivisionError", "failed"),
        ('<tool_call>{"name": "fails_later", "arguments": {}}</tool_call>', "KeyError", "failed"),
        ('<tool_call>{"name": "odd", "arguments": {}}</tool_call>', "TypeError", "failed"),
        ('<tool_call>{"name": "hangs", "arguments": {}}</tool_call>', "within 0.05 s", "late"),
        ('<tool_call>{"name": "sleeps", "arguments": {}}</tool_call>', "within 0.05 s", "late"),
        ('<tool_call>{"name": "long", "arguments": {}}</tool_call>', f"{'x' * 100}... (900 more characters)", ""),
    ],
)
def test_what_goes_wrong_with_a_call_is_told_to_the_model(call: str, said: str, fault: str) -> None:
    ending = threading.Event()

    def fails() -> float:
        return 1 / 0

    async def fails_later() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    def odd() -> object:
        return object()

    def hangs() -> None:
        ending.wait(60)

    async def sleeps() -> None:
        await asyncio.sleep(60)

    def long() -> str:
        return "x" * 1000

    conversation = one(
        lambda before: f"ok{END}" if answers(before) else call + END,
        *(add, fails, fails_later, odd, hangs, sleeps, long),
        limits=RolloutLimits(tool_timeout=0.05, max_answer_characters=100),
    )
    ending.set()
    assert (conversation.status, conversation.reply) == ("done", "ok")
    assert said in answers(text_of(conversation))[0]
    assert conversation.turns[0].calls[0].fault == fault


def test_calls_in_thoughts_are_not_run_and_many_are_bounded() -> None:
    call = ADD.removesuffix(END)
    thinking = one(lambda before: f"<think>{call}</think>no{END}", add)
    assert (thinking.status, len(thinking.turns), thinking.turns[0].calls) == ("done", 1, [])
    many = one(
        lambda before: f"ok{END}" if answers(before) else call * 3 + "<tool_call>?" + END,
        add,
        limits=RolloutLimits(max_turn_calls=2),
        sampling_params={"max_new_tokens": 400},
    )
    assert [each.fault for each in many.turns[0].calls] == ["", "", "invalid", "invalid"]
    assert answers(text_of(many))[:2] == ["5", "5"] and "at most 2" in answers(text_of(many))[2]


def test_bounds_of_turns_tokens_and_context() -> None:
    turns = one(lambda before: ADD, add, limits=RolloutLimits(max_turns=3))
    assert (turns.status, len(turns.turns)) == ("turns", 3) and turns.turns[2].calls == []
    whole = len(one(calls_then_says, add).ids)
    for limits in ({"max_tokens": whole - 1}, {"context_length": whole - 1 + len(turns.prompt_ids)}):
        short = one(calls_then_says, add, limits=RolloutLimits(**limits))
        assert (short.status, len(short.ids)) == ("length", whole - 1)
        assert short.turns[-1].finish_reason == "length" and short.reply == "It is 5."
    no_room = one(calls_then_says, add, limits=RolloutLimits(max_tokens=whole - 12))
    assert no_room.status == "length" and len(no_room.turns) == 1 and len(no_room.ids) == no_room.turns[0].end
    reply = one(calls_then_says, add, sampling_params={"max_new_tokens": 5})
    assert (reply.status, len(reply.ids), reply.turns[0].finish_reason) == ("length", 5, "length")


def test_a_deadline_keeps_what_was_drawn() -> None:
    engine, group = ScriptedEngine(calls_then_says, hold_after=4), new_group(ASKED, 2)
    run(engine, group, add, limits=RolloutLimits(timeout=0.05))
    for conversation in group:
        assert (conversation.status, len(conversation.ids)) == ("deadline", 4)
        assert conversation.turns[0].finish_reason == "deadline" and conversation.seconds >= 0.05


def test_what_an_abort_cuts_is_resumed_with_its_versions() -> None:
    """As an update with `in_flight="abort"` does: some tokens of one version, the rest of another."""
    engine, group = ScriptedEngine(calls_then_says, hold_after=4), new_group(ASKED, 1)

    async def work() -> None:
        async with RolloutLoop(engine, [add], tokenizer=TOKENIZER) as loop:
            running = asyncio.create_task(loop.run(group))
            while not engine.live:
                await asyncio.sleep(0)
            engine.version, engine.hold_after = "v2", None
            for aborted in engine.live.values():
                aborted.set()
            await running

    engine_version = engine.version
    asyncio.run(work())
    (conversation,) = group
    assert conversation.status == "done" and conversation.num_resumes == 1
    first, second = engine.asks[:2]
    assert second["input_ids"][:-4] == first["input_ids"] and second["num_output_ids_in_prompt"] == 4
    assert second["params"].seed == first["params"].seed
    assert second["params"].max_new_tokens == first["params"].max_new_tokens - 4
    assert sampled_text(conversation) == ADD + f"It is 5.{END}" and engine_version == "v1"


def test_tails_are_cut_and_go_on_in_the_next_run(tmp_path: Path) -> None:
    engine, group = ScriptedEngine(calls_then_says), new_group(ASKED, 2, seed=3)
    told: list[list[Conversation]] = []
    settings: dict[str, Any] = {"limits": RolloutLimits(max_run_tokens=20), "on_group": told.append}

    async def work() -> list[str]:
        found: list[str] = []
        async with RolloutLoop(engine, [add], tokenizer=TOKENIZER, log=tmp_path / "log", **settings) as loop:
            while not all(each.is_over for each in group):
                await loop.run(group)
                found.append(group[0].status)
                for each in group:
                    check(each)
                assert read_conversations(tmp_path / "log") == group
                engine.version += "+"
        return found

    statuses = asyncio.run(work())
    assert len(statuses) > 2 and statuses == ["cut"] * (len(statuses) - 1) + ["done"]
    assert told == [group]
    assert sampled_text(group[0]) == ADD + f"It is 5.{END}"
    versions = dict.fromkeys(version for version, _ in group[0].spans if version)
    assert list(versions) == ["v1" + "+" * number for number in range(len(statuses))]
    assert len((tmp_path / "log").read_text().splitlines()) == 2 * len(statuses)


def test_the_rest_is_cut_once_enough_groups_are_complete() -> None:
    engine = ScriptedEngine(lambda before: f"slow one{END}" if "slow" in before else f"ok{END}", hold_after=4)
    quick = [new_group(ASKED, 2, group=str(number)) for number in range(2)]
    slow = new_group([{"role": "user", "content": "slow"}], 2, group="slow")
    told: list[str] = []

    async def work() -> None:
        on_group = lambda group: told.append(group[0].group)  # noqa: E731
        async with RolloutLoop(engine, tokenizer=TOKENIZER, on_group=on_group) as loop:
            await loop.run([*slow, *quick[0], *quick[1]], enough=2)
            assert {each.status for each in slow} == {"cut"} and {len(each.ids) for each in slow} <= {0, 4}
            engine.hold_after = None
            loop.cut()  # no run is in progress: nothing happens
            await loop.run(slow)

    asyncio.run(work())
    assert told == ["0", "1", "slow"] or told == ["1", "0", "slow"]
    assert [(each.status, each.reply) for each in slow] == [("done", "slow one")] * 2


def test_a_read_back_conversation_goes_on_in_another_loop(tmp_path: Path) -> None:
    group = new_group(ASKED, 2, data={"answer": 5})
    run(ScriptedEngine(calls_then_says), group, add, limits=RolloutLimits(max_run_tokens=9), log=tmp_path / "log")
    back = read_conversations(tmp_path / "log")
    assert back == group and {each.status for each in back} == {"cut"}
    told: list[list[Conversation]] = []
    run(ScriptedEngine(calls_then_says), back, add, reward=lambda each: each.data["answer"], on_group=told.append)
    assert [(each.status, each.reward) for each in back] == [("done", 5.0)] * 2 and told == [back]
    over = [group[0], back[1]]
    run(ScriptedEngine(calls_then_says), over, add, on_group=told.append)
    assert len(told) == 2 and told[1][1] is back[1]


def test_errors_of_the_engine() -> None:
    """One that may be tried again hands the conversation back; another ends it; a wrong setting ends the run."""
    engine, group = ScriptedEngine(calls_then_says), new_group(ASKED, 3)
    engine.failures = [EngineDeadError("died"), RequestError("no", field="input_ids")]
    run(engine, group, add)
    assert [each.status for each in group] == ["cut", "error", "done"]
    assert [each.error.code if each.error else "" for each in group] == ["EngineDeadError", "RequestError", ""]
    run(engine, group, add)
    assert [(each.status, each.error is None) for each in group] == [("done", True), ("error", False), ("done", True)]
    engine.failures = [ConfigError("no", field="api_key")]
    with pytest.raises(ConfigError, match="no"):
        run(engine, new_group(ASKED, 3), add)
    (refused,) = new_group([{"role": "nobody", "content": ""}], 1)
    run(engine, [refused], add)
    assert refused.status == "error" and refused.error is not None and "role" in refused.error.field


def test_somebody_answers_replies_without_calls() -> None:
    def respond(conversation: Conversation) -> Any:
        return [{"role": "user", "content": "sure?"}] if conversation.reply == "yes" else None

    conversation = one(lambda before: f"no{END}" if "sure?" in before else f"yes{END}", respond=respond)
    assert text_of(conversation).endswith(f"yes{END}\n<|im_start|>user\nsure?{END}\n<|im_start|>assistant\nno{END}")
    assert [turn.text for turn in conversation.turns] == ["yes", "no"] and conversation.status == "done"
    bounded = one(lambda before: f"yes{END}", respond=respond, limits=RolloutLimits(max_turns=2))
    assert bounded.status == "turns"


def test_what_a_callback_raises_ends_the_run() -> None:
    async def reward(conversation: Conversation) -> float:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run(ScriptedEngine(calls_then_says), new_group(ASKED, 4), add, reward=reward)


class Submit:
    """A tool with the methods of verl's `BaseTool`, as its own examples have them."""

    name = "submit"
    tool_schema = {"type": "function", "function": {"name": "submit", "parameters": {"type": "object"}}}

    def __init__(self) -> None:
        self.live: dict[str, dict[str, Any]] = {}
        self.num_created = 0

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, Any]:
        self.num_created += 1
        name = instance_id or str(self.num_created)
        await asyncio.sleep(0)
        self.live[name] = {**kwargs["create_kwargs"], "said": []}
        return name, None

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[Any, float, dict[str, Any]]:
        said = self.live[instance_id]["said"]
        said.append(parameters["x"])
        return {"text": f"noted {parameters['x']}"}, -0.05, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return float(self.live[instance_id]["truth"] in self.live[instance_id]["said"])

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        del self.live[instance_id]


def submits(before: str) -> str:
    call = '<tool_call>{{"name": "submit", "arguments": {{"x": {}}}}}</tool_call>'
    return f"done{END}" if answers(before) else call.format(4) + call.format(5) + END


def test_a_tool_of_verls_has_one_instance_per_conversation() -> None:
    tool = Submit()
    group = new_group(ASKED, 2, tools_kwargs={"submit": {"create_kwargs": {"truth": 5}}})
    group[1].tools_kwargs = {"submit": {"create_kwargs": {"truth": 6}}}
    run(ScriptedEngine(submits), group, tool)
    assert [each.tool_rewards for each in group] == [{"submit": 1.0}, {"submit": 0.0}]
    assert [each.reward for each in group[0].turns[0].calls] == [-0.05, -0.05]
    assert answers(text_of(group[0])) == ["noted 4", "noted 5"]
    assert (tool.live, tool.num_created) == ({}, 2)


def test_a_cut_conversation_keeps_its_tool_until_the_loop_is_left() -> None:
    tool = Submit()
    group = new_group(ASKED, 2, tools_kwargs={"submit": {"create_kwargs": {"truth": 5}}})
    engine = ScriptedEngine(submits)
    length = len(TOKENIZER.encode(submits("")))

    async def work() -> None:
        limits = RolloutLimits(max_run_tokens=length)
        async with RolloutLoop(engine, [tool], tokenizer=TOKENIZER, limits=limits) as loop:
            await loop.run(group)
            assert [each.status for each in group] == ["cut", "cut"] and len(tool.live) == 2
            await loop.run(group[:1])
            assert group[0].tool_rewards == {"submit": 1.0} and len(tool.live) == 1

    asyncio.run(work())
    assert (tool.live, tool.num_created) == ({}, 2)


def test_schemas_are_made_or_given() -> None:
    function = FunctionTool(add).schema["function"]
    assert (function["name"], function["description"]) == ("add", "Adds two numbers.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the first"},
            "b": {"type": "integer", "description": "the second"},
        },
        "required": ["a", "b"],
    }
    given = {"type": "object", "properties": {"a": {}, "b": {}}}
    assert FunctionTool(add, name="plus", schema=given).schema["function"]["parameters"] == given
    call = ADD.replace('"b": 3', '"b": 3, "c": 1')
    wrong = one(lambda before: f"ok{END}" if answers(before) else call, FunctionTool(add, schema=given))
    assert wrong.turns[0].calls[0].fault == "invalid"


def variadic(*values: int) -> int:
    return len(values)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("tools", {"tools": [add, add]}),
        ("tools", {"tools": [3]}),
        ("tools", {"tools": [variadic]}),
        ("engine", {"engine": Client("http://127.0.0.1:1")}),
        ("log", {"log": "/proc/nowhere/log"}),
        ("sampling_params.n", {"sampling_params": {"n": 2}}),
        ("sampling_params.seed", {"sampling_params": {"seed": 2}}),
    ],
)
def test_wrong_arguments_are_named(field: str, settings: dict[str, Any]) -> None:
    engine = settings.pop("engine", ScriptedEngine(calls_then_says))
    with pytest.raises(HeadraceError) as caught:
        RolloutLoop(engine, **settings)
    assert caught.value.field == field


def test_wrong_limits_and_calls_are_named(tmp_path: Path) -> None:
    for field, value in (("max_turns", 0), ("timeout", 0), ("tool_timeout", float("nan")), ("max_tokens", 1.5)):
        limits: dict[str, Any] = {field: value}
        with pytest.raises(ConfigError) as caught:
            RolloutLimits(**limits)
        assert caught.value.field == field
    group = new_group(ASKED, 1)
    with pytest.raises(RequestError, match="twice"):
        run(ScriptedEngine(calls_then_says), [*group, *group])
    cases: list[tuple[dict[str, Any], str]] = [({}, "tokenizer"), ({"tokenizer": PLAIN, "tools": [add]}, "tools")]
    for settings, field in cases:
        with pytest.raises(ConfigError) as caught:
            asyncio.run(RolloutLoop(ScriptedEngine(calls_then_says), **settings).run(group))
        assert caught.value.field == field
    (tmp_path / "log").write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_conversations(tmp_path / "log")


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    group = new_group(ASKED, 2)
    run(ScriptedEngine(calls_then_says), group, add, log=tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-5])
    assert len(read_conversations(tmp_path / "log")) == 1
