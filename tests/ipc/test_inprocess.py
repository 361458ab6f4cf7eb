"""The in-process link: order across threads, batching, and the end of either side."""

from __future__ import annotations

import asyncio
import threading

import pytest

from headrace.ipc import CoreLink, FrontLink, PeerClosed, make_pair
from headrace.types.errors import EngineDeadError
from headrace.types.messages import Command, GetStatus, Output, Reply


def test_messages_cross_in_order_from_and_to_a_thread() -> None:
    front, core = make_pair()
    count = 2000

    def echo(link: CoreLink) -> None:
        seen = 0
        while seen < count:
            for command in link.poll(5.0):
                assert isinstance(command, GetStatus)
                link.send(Reply(command.call_id))
                seen += 1
        link.close()

    async def run(link: FrontLink) -> tuple[list[Output], list[str]]:
        outputs: list[Output] = []
        closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await link.start(outputs.append, closed.set_result)
        for call_id in range(count):
            link.send(GetStatus(call_id))
        reason = await asyncio.wait_for(closed, 10.0)
        return outputs, [reason]

    thread = threading.Thread(target=echo, args=(core,))
    thread.start()
    outputs, reasons = asyncio.run(run(front))
    thread.join(5.0)
    assert outputs == [Reply(call_id) for call_id in range(count)]
    assert reasons == ["the core thread ended"]
    with pytest.raises(EngineDeadError):
        front.send(GetStatus(1))


def test_outputs_sent_before_the_start_are_delivered() -> None:
    front, core = make_pair()
    core.send(Reply(1))

    async def run() -> list[Output]:
        outputs: list[Output] = []
        await front.start(outputs.append, lambda reason: None)
        await asyncio.sleep(0)
        return outputs

    assert asyncio.run(run()) == [Reply(1)]


def test_closing_the_front_ends_the_core_after_its_last_command() -> None:
    front, core = make_pair()

    async def run() -> None:
        await front.start(lambda output: None, lambda reason: pytest.fail("close is not reported"))
        front.send(GetStatus(1))
        await front.close()
        await front.close()

    asyncio.run(run())
    commands: list[Command] = core.poll(1.0)
    assert commands == [GetStatus(1)]
    with pytest.raises(PeerClosed):
        core.poll(1.0)
    with pytest.raises(PeerClosed):
        core.send(Reply(1))
    assert core.poll is not None
    core.close()


def test_poll_without_commands_is_empty() -> None:
    _, core = make_pair()
    assert core.poll(0.0) == []
    assert core.poll(0.01) == []
