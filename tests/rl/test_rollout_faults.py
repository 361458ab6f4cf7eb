"""What tools, callbacks and files do that they should not: it concerns one conversation, and no work is lost by it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import ConfigError, RequestError
from headrace.rl.rollout import Conversation, RolloutLimits, RolloutLoop, new_group, read_conversations
from tests.rl.scripted_engine import TOKENIZER, ScriptedEngine
from tests.rl.test_rollout import ASKED, Submit, add, calls_then_says, run, submits


class Unwritable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def raising(kind: type[BaseException], *words: Any) -> list[Callable[..., Any]]:
    """Tools that do so in a thread, on the loop, and where a thread made something to wait for."""

    def add(a: int, b: int) -> int:
        raise kind(*words)

    async def later(a: int, b: int) -> int:
        await asyncio.sleep(0)
        raise kind(*words)

    def between(a: int, b: int) -> Any:
        return later(a, b)

    later.__name__ = between.__name__ = "add"
    return [add, later, between]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (SystemExit, (3,)),
        (asyncio.CancelledError, ()),
        (BaseException, ("x",)),
        (BaseExceptionGroup, ("g", [SystemExit(1)])),
        (StopAsyncIteration, ()),
        (Unwritable, ()),
    ],
)
def test_whatever_a_tool_raises_is_told_to_the_model(kind: type[BaseException], words: tuple[Any, ...]) -> None:
    """`exit()` in a program of the model's ends neither the run nor the process."""
    for tool in raising(kind, *words):
        group = new_group(ASKED, 2)
        run(ScriptedEngine(calls_then_says), group, tool)
        for each in group:
            (call,) = each.turns[0].calls
            assert (each.status, call.fault) == ("done", "failed")
            assert call.content.startswith(f"Error: {kind.__name__}")


def test_an_interrupt_in_a_thread_is_the_tools_own() -> None:
    for kind in (KeyboardInterrupt, GeneratorExit, StopIteration):
        group = new_group(ASKED, 1)
        run(ScriptedEngine(calls_then_says), group, raising(kind)[0])
        assert group[0].turns[0].calls[0].fault == "failed"


class Breaking(Submit):
    """Fails at the end of conversations whose truth is `at`, in one of its methods."""

    def __init__(self, method: str, how: Callable[[], Any]) -> None:
        super().__init__()
        self.method, self.how = method, how

    async def _end(self, method: str, instance_id: str) -> Any:
        if method == self.method and self.live[instance_id]["truth"] == "bad":
            found = self.how()
            return await found if asyncio.iscoroutine(found) else found
        return None

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        found = await self._end("calc_reward", instance_id)
        return 0.5 if found is None else found

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        try:
            await self._end("release", instance_id)
        finally:
            await super().release(instance_id)


def raises(kind: type[BaseException]) -> Callable[[], Any]:
    def raise_it() -> Any:
        raise kind("broken")

    return raise_it


@pytest.mark.parametrize("method", ["calc_reward", "release"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (raises(ValueError), "ValueError: broken"),
        (raises(SystemExit), "SystemExit: broken"),
        (lambda: asyncio.sleep(60), "not released within 0.2 s"),
    ],
    ids=["raises", "exits", "hangs"],
)
def test_a_tool_that_fails_at_the_end_of_one_conversation_leaves_the_others(
    method: str, how: Callable[[], Any], said: str
) -> None:
    tool = Breaking(method, how)
    group = new_group(ASKED, 3)
    for each, truth in zip(group, ("good", "bad", "good"), strict=True):
        each.tools_kwargs = {"submit": {"create_kwargs": {"truth": truth}}}
    groups: list[list[Conversation]] = []
    run(ScriptedEngine(submits), group, tool, limits=RolloutLimits(tool_timeout=0.2), on_group=groups.append)
    assert [each.status for each in group] == ["done", "error", "done"]
    assert [each.tool_rewards for each in group] == [{"submit": 0.5}, {}, {"submit": 0.5}]
    error = group[1].error
    assert error is not None and said in error.message and "submit" in error.message
    assert len(groups) == 1 and not tool.live


def test_all_tools_are_released_where_one_cannot_be() -> None:
    """Also those of conversations that are left."""
    tool = Breaking("release", raises(ValueError))
    group = new_group(ASKED, 3)
    for each, truth in zip(group, ("bad", "good", "good"), strict=True):
        each.tools_kwargs = {"submit": {"create_kwargs": {"truth": truth}}}
    limits = RolloutLimits(max_run_tokens=len(TOKENIZER.encode(submits(""))))

    async def work() -> None:
        loop = RolloutLoop(ScriptedEngine(submits), [tool], tokenizer=TOKENIZER, limits=limits)
        await loop.run(group)
        assert len(tool.live) == 3
        with pytest.raises(RequestError, match="submit at the end"):
            await loop.close()
        assert not tool.live

    asyncio.run(work())


def test_one_that_is_never_opened_keeps_nobody() -> None:
    class Stuck(Submit):
        async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

    group = new_group(ASKED, 1)
    run(ScriptedEngine(submits), group, Stuck(), limits=RolloutLimits(tool_timeout=0.1))
    assert (group[0].status, {call.fault for call in group[0].turns[0].calls}) == ("done", {"late"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_a_failure_and_the_log_stays_readable(value: float, tmp_path: Path) -> None:
    class Odd(Submit):
        async def execute(self, instance_id: str, parameters: Any, **kwargs: Any) -> tuple[Any, float, dict[str, Any]]:
            return {"text": "noted"}, value, {}

        async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
            return value

    group = new_group(ASKED, 1, tools_kwargs={"submit": {"create_kwargs": {"truth": 1}}})
    run(ScriptedEngine(submits), group, Odd(), log=tmp_path / "log")
    (read,) = read_conversations(tmp_path / "log")
    assert read == group[0]
    assert (read.status, {call.fault for call in read.turns[0].calls}) == ("error", {"failed"})


@pytest.mark.parametrize("name", ["messages", "data", "tools_kwargs"])
def test_what_is_not_json_is_named_before_anything_is_sampled(name: str, tmp_path: Path) -> None:
    def bad() -> list[Conversation]:
        group = new_group(ASKED, 2)
        value: Any = {"messages": [{"role": "user", "content": object()}], "data": {1, object()}}.get(name)
        setattr(group[1], name, {"submit": {"x": object()}} if value is None else value)
        return group

    engine = ScriptedEngine(calls_then_says)
    with pytest.raises(RequestError, match=rf"conversations\[1\]\.{name} is not JSON") as caught:
        run(engine, bad(), add, log=tmp_path / "log")
    assert caught.value.field == "conversations" and not engine.asks
    if name != "messages":
        run(engine, bad(), add)  # nobody writes it


def test_what_a_callback_makes_of_a_conversation_is_named_too(tmp_path: Path) -> None:
    def reward(conversation: Conversation) -> float:
        conversation.data = object()
        return 1.0

    with pytest.raises(ConfigError, match="is not JSON") as caught:
        run(ScriptedEngine(calls_then_says), new_group(ASKED, 1), add, log=tmp_path / "log", reward=reward)
    assert caught.value.field == "log"


def test_a_log_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    """Who wrote it was killed: what the next one writes is not lost with that line."""
    log, first, second = tmp_path / "log", new_group(ASKED, 2), new_group(ASKED, 2)
    run(ScriptedEngine(calls_then_says), first, add, log=log)
    log.write_bytes(log.read_bytes()[:-5])
    run(ScriptedEngine(calls_then_says), second, add, log=log)
    names = [each.id for each in read_conversations(log)]
    assert len(names) == 3 and {each.id for each in second} < set(names)
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([lines[0], b'{"id": 3}', *lines[1:]]))
    with pytest.raises(ConfigError, match="line 2"):
        read_conversations(log)


def test_two_runs_that_begin_together_are_one_too_many() -> None:
    async def work() -> None:
        async with RolloutLoop(ScriptedEngine(calls_then_says), [add], tokenizer=TOKENIZER) as loop:
            held = asyncio.Event()
            prepared = loop._prepared

            async def later() -> Any:
                await held.wait()
                return await prepared()

            loop._prepared = later  # type: ignore[method-assign]
            first = asyncio.ensure_future(loop.run(new_group(ASKED, 1)))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="another run"):
                await loop.run(new_group(ASKED, 1))
            held.set()
            assert (await first)[0].status == "done"
            assert (await loop.run(new_group(ASKED, 1)))[0].status == "done"

    asyncio.run(work())
