"""The client against a core that is scripted by hand, over the real in-process link."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Callable, Coroutine
from types import NoneType
from typing import Any

import msgspec
import pytest

from headrace.engine.client import CoreClient
from headrace.engine.device_export import DeviceExport
from headrace.engine.groups import _Announced
from headrace.engine.health import HealthLimits
from headrace.engine.lookback import Lookback
from headrace.engine.update import Updater
from headrace.engine.update_session import UpdateSession
from headrace.ipc import CoreLink, Pulse, PulsePage, make_pair
from headrace.ipc.socket_link import SocketCoreLink, SocketFrontLink
from headrace.types.errors import (
    DeadlineError,
    EngineDeadError,
    ErrorInfo,
    HeadraceError,
    NotFoundError,
    ShutdownError,
)
from headrace.types.foreign import Payload
from headrace.types.handles import handle_of
from headrace.types.messages import (
    Abort,
    Command,
    CoreReady,
    CoreStatus,
    Deltas,
    Finished,
    FlushCache,
    GetStatus,
    GetWeight,
    GiveUp,
    Pause,
    Receive,
    Reply,
    Resume,
    Stage,
    StagePayload,
    Submit,
    WeightPart,
)
from headrace.types.request import Delta, Finish, Request, pack_ids
from headrace.types.weights import BufferRef

STATUS = CoreStatus("ready", "default", 0, "", False, 0, 0, 0, 0, {})


class Recorder:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.errors: list[HeadraceError] = []

    def on_delta(self, delta: Delta) -> None:
        self.deltas.append(delta)

    def on_failure(self, error: HeadraceError) -> None:
        self.errors.append(error)


class ScriptedCore:
    """The core's end of a link, played by the test on the same loop; tells its status by itself."""

    def __init__(self, link: CoreLink, pulse: Pulse) -> None:
        self.link = link
        self.pulse = pulse

    async def commands(self) -> list[Command]:
        """What has arrived since the last call, questions for the status apart."""
        await asyncio.sleep(0.01)
        arrived = self.link.poll(0)
        for command in arrived:
            if isinstance(command, GetStatus):
                self.link.send(Reply(command.call_id, msgspec.msgpack.encode(STATUS)))
        await asyncio.sleep(0.01)
        return [command for command in arrived if not isinstance(command, GetStatus)]


Scenario = Callable[[CoreClient, ScriptedCore], Coroutine[Any, Any, None]]


LIMITS = HealthLimits(watchdog=60.0)


def play(scenario: Scenario, limits: HealthLimits = LIMITS, number: int = 0) -> list[str]:
    """Run a scenario on a started client, front `number`. Returns "killed" if it asked for the core's end."""
    deaths: list[str] = []

    async def main() -> None:
        front, link = make_pair()
        page = PulsePage()
        core = ScriptedCore(link, Pulse(page))  # which beats once, now
        client = CoreClient(front, page, 30.0, lambda _: deaths.append("killed"), limits)
        start = asyncio.create_task(client.start(5.0))
        await asyncio.sleep(0)
        link.send(CoreReady(max_total_num_tokens=7, front=number))
        while not start.done():
            await core.commands()
        assert (await start).max_total_num_tokens == 7
        await scenario(client, core)
        await client.close(ShutdownError("over"))

    asyncio.run(asyncio.wait_for(main(), 20))
    return deaths


def request(handle: int, num_tokens: int = 1) -> Request:
    return Request(handle, str(handle), pack_ids([1] * num_tokens), 4, 0)


def test_requests_of_one_turn_leave_as_one_message() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        for _ in range(50):
            client.submit(request(client.new_handle()), Recorder())
        [message] = await core.commands()
        assert isinstance(message, Submit) and [r.handle for r in message.all_requests()] == list(range(1, 51))

    play(scenario)


def test_handles_are_of_the_front_that_the_core_names() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        handles = [client.new_handle() for _ in range(3)]
        assert handles == [handle_of(9, count) for count in (1, 2, 3)]

        core.link.close()
        await asyncio.sleep(0.01)
        link, back = make_pair()
        page = PulsePage()
        client.attach(link, page)
        start, core = asyncio.create_task(client.start(5.0)), ScriptedCore(back, Pulse(page))
        back.send(CoreReady(front=2))
        while not start.done():
            await core.commands()
        assert client.new_handle() == handle_of(2, 4), "the next core may meet handles of the one before"

    play(scenario, number=9)


def test_huge_batches_leave_in_bounded_messages() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        for _ in range(5):
            client.submit(request(client.new_handle(), 1_000_000), Recorder())
        messages = await core.commands()
        assert [len(list(m.all_requests())) for m in messages if isinstance(m, Submit)] == [2, 2, 1]

    play(scenario)


def test_an_abort_follows_the_requests_submitted_before_it() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        client.submit(request(1), Recorder())
        client.abort([1, 99], "enough")
        client.drop(1, is_answered=False)
        client.submit(request(2), Recorder())
        first, second, third, fourth = await core.commands()
        assert isinstance(first, Submit) and second == Abort((1,), "enough")
        assert isinstance(third, Submit) and fourth == Finished((1,))

    play(scenario)


def test_deltas_go_to_their_sink_until_the_terminal_one() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        one, two = Recorder(), Recorder()
        client.submit(request(1), one)
        client.submit(request(2), two)
        last = Finish("length")
        core.link.send(Deltas((Delta(1), Delta(2, finish=last), Delta(77))))
        core.link.send(Deltas((Delta(2), Delta(1, finish=last), Delta(1))))
        await core.commands()
        assert [len(one.deltas), len(two.deltas), len(client._sinks)] == [2, 1, 0]

    play(scenario)


def test_replies_find_their_calls_in_any_order() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        calls = [asyncio.create_task(client.call(FlushCache, int)) for _ in range(3)]
        commands = await core.commands()
        for number, command in reversed(list(enumerate(commands))):
            assert isinstance(command, FlushCache)
            core.link.send(Reply(command.call_id, msgspec.msgpack.encode(number)))
        assert await asyncio.gather(*calls) == [0, 1, 2]

    play(scenario)


def test_the_core_s_error_is_raised_with_its_class() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        call = asyncio.create_task(client.call(lambda i: GetWeight(i, "x", BufferRef("", 1)), WeightPart))
        [command] = await core.commands()
        assert isinstance(command, GetWeight)
        core.link.send(Reply(command.call_id, error=ErrorInfo("NotFoundError", "no x", "name")))
        with pytest.raises(NotFoundError, match="no x") as caught:
            await call
        assert caught.value.field == "name"

    play(scenario)


@pytest.mark.parametrize("is_refused", [False, True])
@pytest.mark.parametrize("comes_with_it", [True, False])
def test_after_a_change_the_status_is_fresh(is_refused: bool, comes_with_it: bool) -> None:
    """It comes with the answer; where it does not, it is asked for."""

    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        changed = msgspec.structs.replace(STATUS, version="new") if comes_with_it else STATUS
        call = asyncio.create_task(client.change(Resume, NoneType))
        await asyncio.sleep(0)
        [command] = await core.commands()
        assert isinstance(command, Resume) and command.wants_status
        noted: list[CoreStatus] = []
        client.on_status = noted.append
        error = ErrorInfo("WeightUpdateError", "no") if is_refused else None
        status = msgspec.msgpack.encode(changed) if comes_with_it else b""
        core.link.send(Reply(command.call_id, error=error, status=status))
        while not call.done():
            await (asyncio.sleep(0.01) if comes_with_it else core.commands())
        assert noted[-1:] == [changed] and (call.exception() is not None) == is_refused
        reading = asyncio.create_task(client.call(FlushCache, int))
        [command] = await core.commands()
        assert isinstance(command, FlushCache) and not command.wants_status
        core.link.send(Reply(command.call_id, msgspec.msgpack.encode(1)))
        await reading

    play(scenario)


def test_a_status_that_was_asked_for_before_a_change_is_not_noted_behind_it() -> None:
    """Both answers may be read at once: then who has asked wakes after the change's has been heard of."""

    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        asking = asyncio.create_task(client._refresh())  # as the watch does
        changing = asyncio.create_task(client.change(Resume, NoneType))
        await asyncio.sleep(0.01)
        *asked, change = core.link.poll(0)
        assert asked and isinstance(change, Resume)
        changed = msgspec.msgpack.encode(msgspec.structs.replace(STATUS, version="new"))
        for question in asked:
            assert isinstance(question, GetStatus)
            core.link.send(Reply(question.call_id, msgspec.msgpack.encode(STATUS)))
        core.link.send(Reply(change.call_id, status=changed))
        await asyncio.gather(asking, changing)
        assert client.status is not None and client.status.version == "new"

    play(scenario)


ROADS: dict[str, Callable[[CoreClient, UpdateSession], Coroutine[Any, Any, None]]] = {
    "upload": lambda client, session: updater_of(client)._upload(session, DeviceExport((), shares_process=True)),
    "buffer": lambda client, session: updater_of(client).stage_buffer(session, BufferRef("", 1), ()),
    "payload": lambda client, session: updater_of(client).stage_payload(session, Payload(), ()),
    "group": lambda client, session: _Announced(client).receive(session, ()),
}


def updater_of(client: CoreClient) -> Updater:
    return Updater(client, asyncio.get_running_loop(), Lookback(), shares_process=True)


@pytest.mark.parametrize("mode", ["inplace", "shadow"])
@pytest.mark.parametrize("road", ROADS)
def test_what_writes_over_live_weights_brings_the_status(road: str, mode: str) -> None:
    """They have no version from then on, and nobody is to be told the old one."""

    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        session = UpdateSession(1, "new", mode, (), 60.0)
        staging = asyncio.create_task(ROADS[road](client, session))
        [command] = await core.commands()
        assert isinstance(command, Stage | StagePayload | Receive) and command.wants_status == (mode == "inplace")
        status = msgspec.msgpack.encode(msgspec.structs.replace(STATUS, state="updating", version=""))
        core.link.send(Reply(command.call_id, status=status))
        await staging

    play(scenario)


def test_a_call_has_a_deadline_and_a_late_reply_harms_nobody() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        with pytest.raises(DeadlineError, match="FlushCache"):
            await client.call(FlushCache, int, 0.01)
        [command] = await core.commands()
        assert isinstance(command, FlushCache)
        core.link.send(Reply(command.call_id, msgspec.msgpack.encode(1)))
        await core.commands()
        assert client.is_alive

    play(scenario)


def is_ok(call_id: int) -> Reply:
    return Reply(call_id, msgspec.msgpack.encode(None))


def test_a_call_carries_its_deadline() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        before = time.monotonic()
        call = asyncio.create_task(client.change(Resume, NoneType, 7.0))
        [command] = await core.commands()
        assert isinstance(command, Resume) and before + 7.0 <= command.deadline <= time.monotonic() + 7.0
        core.link.send(is_ok(command.call_id))
        await core.commands()
        await call

    play(scenario)


def test_a_call_that_the_core_has_come_to_is_waited_for_beyond_its_deadline() -> None:
    """It may be done, or be undone; only the core knows."""

    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        done = asyncio.create_task(client.call(FlushCache, int, 0.05))
        undone = asyncio.create_task(client.call(FlushCache, int, 0.05))
        first, second = await core.commands()
        assert isinstance(first, FlushCache) and isinstance(second, FlushCache)
        core.pulse.claim(second.call_id)
        await asyncio.sleep(0.3)
        assert not done.done() and not undone.done()
        core.link.send(Reply(first.call_id, msgspec.msgpack.encode(5)))
        core.link.send(Reply(second.call_id, error=ErrorInfo("DeadlineError", "undone")))
        await core.commands()
        assert await done == 5
        with pytest.raises(DeadlineError, match="undone"):
            await undone

    play(scenario)


def test_a_cancelled_call_is_over_before_its_caller_goes_on() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        call = asyncio.create_task(client.change(lambda i: Pause(i, "drain"), NoneType))
        [pause] = await core.commands()
        assert isinstance(pause, Pause)
        core.pulse.claim(pause.call_id)
        for _ in range(3):  # being cancelled again does not end it
            call.cancel()
            await asyncio.sleep(0.02)
        [given_up] = await core.commands()
        assert isinstance(given_up, GiveUp) and given_up.target == pause.call_id and not call.done()
        core.link.send(Reply(pause.call_id, error=ErrorInfo("DeadlineError", "given up")))
        await core.commands()
        assert not call.done()
        core.link.send(is_ok(given_up.call_id))
        while not call.done():
            await core.commands()
        assert call.cancelled()

    play(scenario)


@pytest.mark.parametrize("is_done", [True, False])
def test_a_call_for_good_is_not_cancelled_once_the_core_has_done_it(is_done: bool) -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        call = asyncio.create_task(client.change_for_good(Resume, NoneType))
        [resume] = await core.commands()
        assert isinstance(resume, Resume)
        call.cancel()
        [given_up] = await core.commands()
        assert isinstance(given_up, GiveUp) and given_up.target == resume.call_id
        core.link.send(
            is_ok(resume.call_id) if is_done else Reply(resume.call_id, error=ErrorInfo("DeadlineError", "given up"))
        )
        core.link.send(is_ok(given_up.call_id))
        while not call.done():
            await core.commands()
        assert call.cancelled() != is_done

    play(scenario)


def test_a_cancelled_call_that_the_core_never_came_to_is_over_at_its_deadline() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        call = asyncio.create_task(client.change(Resume, NoneType, 0.2))
        await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.sleep(0.02)
        assert not call.done()  # the core may come to it before it hears that it is given up
        await asyncio.wait([call])
        assert call.cancelled()

    play(scenario)


def test_a_cancelled_call_does_not_outlive_the_core() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        call = asyncio.create_task(client.change(Resume, NoneType))
        [command] = await core.commands()
        assert isinstance(command, Resume)
        core.pulse.claim(command.call_id)
        call.cancel()
        await core.commands()
        core.link.close()
        await asyncio.wait([call])
        assert call.cancelled() and not client.is_alive

    play(scenario)


def test_death_answers_everybody_at_once() -> None:
    sinks = [Recorder() for _ in range(64)]

    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        for handle, sink in enumerate(sinks):
            client.submit(request(handle), sink)
        call = asyncio.create_task(client.call(FlushCache, int))
        await core.commands()
        client.submit(request(100), late := Recorder())
        core.link.close()
        with pytest.raises(EngineDeadError):
            await call
        assert not client.is_alive and not client._sinks
        assert [type(error) for error in late.errors] == [EngineDeadError]
        with pytest.raises(EngineDeadError):
            client.submit(request(101), Recorder())
        with pytest.raises(EngineDeadError):
            await client.call(FlushCache, int)

    assert play(scenario) == ["killed"]
    assert [[type(error) for error in sink.errors] for sink in sinks] == [[EngineDeadError]] * 64


@pytest.mark.parametrize("finds_out", ["a request", "a call", "an end", "an abort"])
def test_nobody_is_served_once_the_link_is_found_gone(finds_out: str) -> None:
    async def scenario() -> None:
        front, back = socket.socketpair()
        is_known = asyncio.Event()

        async def describe_exit() -> str:
            await is_known.wait()
            return "killed by signal 9"

        deaths: list[HeadraceError] = []
        page = PulsePage()
        core = ScriptedCore(SocketCoreLink(back), Pulse(page))
        client = CoreClient(SocketFrontLink(front, describe_exit=describe_exit), page, 30.0, deaths.append, LIMITS)
        start = asyncio.create_task(client.start(5.0))
        core.link.send(CoreReady())
        while not start.done():
            await core.commands()
        client.submit(request(1), running := Recorder())
        await core.commands()
        core.link.close()
        await asyncio.sleep(0.05)
        assert len(client._sinks) == 1, "the client was told already"
        failed = Recorder()
        if finds_out == "a request":
            client.submit(request(2), failed)
            await asyncio.sleep(0)
            assert [type(error) for error in failed.errors] == [EngineDeadError]
        elif finds_out == "a call":
            with pytest.raises(EngineDeadError):
                await client.call(FlushCache, int)
        elif finds_out == "an end":
            client.drop(1, is_answered=False)
            await asyncio.sleep(0)
        else:
            with pytest.raises(EngineDeadError):
                client.abort([1], "")
        assert not client.is_alive and not client.is_responsive and not deaths
        with pytest.raises(EngineDeadError):
            client.submit(request(3), Recorder())
        is_known.set()
        await asyncio.sleep(0.01)
        reasons = [error.message for error in (*deaths, *running.errors)]
        assert len(reasons) == (1 if finds_out == "an end" else 2)
        assert all("killed by signal 9" in reason for reason in reasons)
        await client.close(ShutdownError("over"))

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_core_without_a_pulse_is_unresponsive_and_then_dead() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        client.submit(request(1), sink := Recorder())
        assert client.is_responsive
        while client.diagnose() is None:
            await core.commands()
        assert not sink.errors
        while client.is_alive:
            await core.commands()
        assert [type(error) for error in sink.errors] == [EngineDeadError]
        assert "has not run" in sink.errors[0].message

    assert play(scenario, HealthLimits(watchdog=60.0, patience=0.5, hopeless=1.0)) == ["killed"]


def test_closing_answers_what_is_live() -> None:
    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        client.submit(request(1), sink := Recorder())
        call = asyncio.create_task(client.call(FlushCache, int))
        await asyncio.sleep(0)
        await client.close(ShutdownError("over"))
        await client.close(ShutdownError("twice"))
        with pytest.raises(ShutdownError, match="over"):
            await call
        assert [error.message for error in sink.errors] == ["over"]

    assert play(scenario) == []


@pytest.mark.parametrize("is_answered", [True, False])
def test_closing_ends_the_watch(is_answered: bool) -> None:
    """Also when the answer that it waits for comes at that moment."""

    async def scenario(client: CoreClient, core: ScriptedCore) -> None:
        watch, commands = client._watch, list[Command]()
        assert watch is not None
        while not commands:
            await asyncio.sleep(0.01)
            commands = core.link.poll(0)
        if is_answered:
            client._on_output(Reply(commands[0].call_id, msgspec.msgpack.encode(STATUS)))  # type: ignore[union-attr]
        await client.close(ShutdownError("over"))
        assert watch.cancelled()

    play(scenario)


def test_a_client_that_was_closed_does_not_start() -> None:
    async def main() -> None:
        client = CoreClient(make_pair()[0], PulsePage(), 5.0, lambda _: None, LIMITS)
        await client.close(ShutdownError("over"))
        with pytest.raises(ShutdownError, match="over"):
            await client.start(5.0)

    asyncio.run(main())


def test_a_start_that_is_given_up_while_its_link_begins_leaves_no_error_that_nobody_looked_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As where an engine closes while a core is started again; some loops take longer to begin a link than others."""

    async def main() -> None:
        front, _ = make_pair()
        client = CoreClient(front, PulsePage(), 5.0, lambda _: None, LIMITS)
        front.start = lambda *_: asyncio.sleep(60)  # type: ignore[method-assign]
        start = asyncio.create_task(client.start(5.0))
        await asyncio.sleep(0)
        await client.close(ShutdownError("over"))
        start.cancel()
        await asyncio.wait([start])

    asyncio.run(main())
    gc.collect()
    assert not [record for record in caplog.records if "never retrieved" in record.message]


@pytest.mark.parametrize("is_gone_at_once", [False, True])
def test_a_core_that_cannot_start_says_why_and_its_end_is_no_news(
    is_gone_at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        front, link = make_pair()
        client = CoreClient(front, PulsePage(), 5.0, lambda _: None, LIMITS)
        ready = CoreReady(error=ErrorInfo("CheckpointError", "model.safetensors is corrupt", "model.safetensors"))
        if is_gone_at_once:
            asyncio.get_running_loop().call_soon(client._on_output, ready)
            asyncio.get_running_loop().call_soon(client._on_close, "it has ended")
        else:
            link.send(ready)
        with pytest.raises(HeadraceError, match="corrupt") as caught:
            await client.start(5.0)
        assert caught.value.field == "model.safetensors"
        await client.close(ShutdownError("over"))

    asyncio.run(main())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_core_that_does_not_start_in_time_is_an_error() -> None:
    async def main() -> None:
        client = CoreClient(make_pair()[0], PulsePage(), 5.0, lambda _: None, LIMITS)
        with pytest.raises(DeadlineError, match="start_timeout"):
            await client.start(0.01)
        await client.close(ShutdownError("over"))

    asyncio.run(main())
