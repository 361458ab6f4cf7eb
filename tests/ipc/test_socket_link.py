"""A link over a socketpair: order, bounds, broken frames, and the death of either end."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import uvloop

from headrace.ipc import PeerClosed, codec, socket_link
from headrace.ipc.codec import OutputCodec, pack_frame
from headrace.ipc.socket_link import SocketCoreLink, SocketFrontLink
from headrace.types.errors import EngineDeadError, ErrorInfo, RequestError, UnavailableError
from headrace.types.messages import Abort, Command, Deltas, GetStatus, Output, Reply, SetVersion, Submit
from headrace.types.request import Delta, Finish, Request, pack_ids

Pair = tuple[socket.socket, socket.socket]
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end on a new loop, of either kind."""

    def run_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(coroutine)

    return run_once


@pytest.fixture
def pair() -> Iterator[Pair]:
    front, core = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    yield front, core
    front.close()
    core.close()


def read_all(link: SocketCoreLink, count: int) -> list[Command]:
    found: list[Command] = []
    while len(found) < count:
        arrived = link.poll(5.0)
        assert arrived, "nothing came"
        found += arrived
    return found


async def until(condition: object, events: asyncio.Event) -> None:
    assert callable(condition)
    while not condition():
        events.clear()
        await asyncio.wait_for(events.wait(), 10.0)


async def outputs_at_front(
    connection: socket.socket, is_whole: Callable[[list[Output]], bool], commands: Sequence[Command] = ()
) -> list[Output]:
    """What a front on this connection receives, having sent `commands`, until `is_whole` says that it is all."""
    link = SocketFrontLink(connection)
    found: list[Output] = []
    arrived = asyncio.Event()

    def on_output(output: Output) -> None:
        found.append(output)
        arrived.set()

    await link.start(on_output, lambda reason: None)
    for command in commands:
        link.send(command)
    await until(lambda: is_whole(found), arrived)
    await link.close()
    return found


def test_commands_and_outputs_arrive_in_order(pair: Pair, run: Run) -> None:
    core = SocketCoreLink(pair[1])
    sent: list[Command] = [Submit((Request(i, "r", pack_ids(range(i % 700)), 1, 1),)) for i in range(3000)]

    def echo() -> None:
        for command in read_all(core, len(sent)):
            assert isinstance(command, Submit)
            request = command.requests[0]
            core.send(Deltas((Delta(request.handle, request.prompt),)))
        core.close()

    thread = threading.Thread(target=echo)
    thread.start()
    outputs = run(outputs_at_front(pair[0], lambda found: len(found) == len(sent), sent))
    thread.join(10.0)
    expected = [Deltas((Delta(c.requests[0].handle, c.requests[0].prompt),)) for c in sent if isinstance(c, Submit)]
    assert outputs == expected


def test_poll_returns_at_once_and_waits_when_told(pair: Pair) -> None:
    core = SocketCoreLink(pair[1])
    assert core.poll(0.0) == []
    assert core.poll(0.01) == []
    threading.Timer(0.05, lambda: pair[0].sendall(pack_frame(msgspec.msgpack.encode(GetStatus(3))))).start()
    assert core.poll(10.0) == [GetStatus(3)]


def test_commands_before_the_end_of_file_are_returned_first(pair: Pair) -> None:
    core = SocketCoreLink(pair[1])
    pair[0].sendall(pack_frame(msgspec.msgpack.encode(Abort(()))))
    pair[0].close()
    assert core.poll(1.0) == [Abort((), "Aborted")]
    with pytest.raises(PeerClosed):
        core.poll(1.0)
    with pytest.raises(PeerClosed):
        core.send(Reply(1))


def test_a_broken_command_is_answered_and_its_neighbours_are_served(pair: Pair) -> None:
    core = SocketCoreLink(pair[1])
    bad = msgspec.msgpack.encode(["get_weight", 9, ["not", "a", "name"]])
    first, last = (pack_frame(msgspec.msgpack.encode(GetStatus(call_id))) for call_id in (1, 2))
    pair[0].sendall(first + pack_frame(bad) + pack_frame(b"\xc1") + last)
    assert core.poll(1.0) == [GetStatus(1), GetStatus(2)]
    data = pair[0].recv(1 << 16)
    reply = msgspec.msgpack.decode(data[4:], type=Output)
    assert isinstance(reply, Reply)
    assert reply.call_id == 9
    assert reply.error is not None


def test_a_frame_over_the_bound_ends_the_link(pair: Pair) -> None:
    core = SocketCoreLink(pair[1])
    pair[0].sendall(b"\xff\xff\xff\xff garbage")
    with pytest.raises(PeerClosed, match="bound"):
        core.poll(1.0)


def test_deltas_over_the_bound_leave_in_parts_and_one_alone_as_an_error(
    pair: Pair, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 1 << 12)
    core = SocketCoreLink(pair[1])
    sizes = [100, 1500, 1500, 1500, 5000, 100, 1500]
    core.send(Deltas(tuple(Delta(handle, bytes(size)) for handle, size in enumerate(sizes))))
    core.send(Reply(7, bytes(1 << 13)))
    core.send(Reply(8, b"end"))
    received: list[Output] = run(outputs_at_front(pair[0], lambda found: Reply(8, b"end") in found))
    deltas = [delta for output in received if isinstance(output, Deltas) for delta in output.deltas]
    assert [delta.handle for delta in deltas] == list(range(len(sizes)))
    assert [len(delta.token_ids) for delta in deltas] == [0 if size > 1 << 12 else size for size in sizes]
    failed = [delta for delta in deltas if delta.finish is not None]
    assert [delta.handle for delta in failed] == [4]
    assert failed[0].finish is not None and failed[0].finish.error is not None
    assert "bound of 4096" in failed[0].finish.error.message
    replies = [output for output in received if isinstance(output, Reply)]
    assert [reply.call_id for reply in replies] == [7, 8]
    assert replies[0].error is not None and replies[1].error is None


def test_a_value_that_cannot_travel_is_refused(pair: Pair, run: Run) -> None:
    class Number(int):
        pass

    async def main() -> None:
        front = SocketFrontLink(pair[0])
        for bad in (GetStatus(Number(1)), GetStatus(1 << 70), SetVersion(1, "\ud800")):
            with pytest.raises(RequestError, match="cannot be sent"):
                front.send(bad)
        await front.close()

    run(main())


def test_an_answer_that_cannot_be_encoded_costs_its_receiver_only(pair: Pair, run: Run) -> None:
    core = SocketCoreLink(pair[1])
    bad = Delta(2, finish=Finish("abort", message="\ud800"))
    core.send(Deltas((Delta(1), bad, Delta(3))))
    core.send(Reply(4, error=ErrorInfo("InternalError", "\udcff")))
    core.send(Reply(5))
    received = run(outputs_at_front(pair[0], lambda found: bool(found) and found[-1] == Reply(5)))
    deltas = [delta for output in received if isinstance(output, Deltas) for delta in output.deltas]
    assert [delta.handle for delta in deltas] == [1, 2, 3]
    assert [delta.finish is None or delta.finish.type for delta in deltas] == [True, "error", True]
    replies = [output for output in received if isinstance(output, Reply)]
    assert [(reply.call_id, reply.error is not None) for reply in replies] == [(4, True), (5, False)]


def test_a_front_that_never_reads_ends_the_link(pair: Pair) -> None:
    core = SocketCoreLink(pair[1], max_backlog_bytes=1 << 20, stall_timeout=0.1)
    output = Reply(1, bytes(1 << 18))
    with pytest.raises(PeerClosed, match="read nothing"):
        for _ in range(100):
            core.send(output)


def test_a_slow_front_loses_nothing(pair: Pair, run: Run) -> None:
    core = SocketCoreLink(pair[1], max_backlog_bytes=1 << 20, stall_timeout=30.0)
    outputs = [Reply(i, bytes([i]) * (1 << 17)) for i in range(64)]
    found: list[Output] = []

    def front() -> None:
        found.extend(run(outputs_at_front(pair[0], lambda arrived: len(arrived) == len(outputs))))

    thread = threading.Thread(target=front)
    thread.start()
    for output in outputs:
        core.send(output)
    core.close()
    thread.join(10.0)
    assert found == outputs


def test_the_front_learns_that_the_core_is_gone(pair: Pair, run: Run) -> None:
    async def front() -> list[str]:
        link = SocketFrontLink(pair[0])
        reasons: list[str] = []
        closed = asyncio.Event()

        def on_close(reason: str) -> None:
            reasons.append(reason)
            closed.set()

        await link.start(lambda output: None, on_close)
        pair[1].close()
        await asyncio.wait_for(closed.wait(), 5.0)
        with pytest.raises(EngineDeadError):
            link.send(GetStatus(1))
        await link.close()
        await link.close()
        return reasons

    assert run(front()) == ["the core closed the link"]


def test_an_undecodable_output_ends_the_link_with_its_reason(pair: Pair, run: Run) -> None:
    async def front() -> str:
        link = SocketFrontLink(pair[0])
        reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await link.start(lambda output: None, reason.set_result)
        pair[1].sendall(pack_frame(msgspec.msgpack.encode(["deltas", 5])))
        found = await asyncio.wait_for(reason, 5.0)
        await link.close()
        return found

    assert "cannot be decoded" in run(front())


@pytest.mark.parametrize("is_late", [False, True])
def test_an_output_that_the_front_breaks_over_ends_the_link(
    pair: Pair, run: Run, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """Also when it was left for a later turn of the loop. What is behind it would be somebody's answer."""

    class Panic(BaseException):
        pass

    def take(output: Output) -> None:
        taken.append(output)
        if len(taken) == 2:
            raise Panic

    taken: list[Output] = []
    monkeypatch.setattr(socket_link, "DELIVER_SECONDS", 2e-6 if is_late else 10.0)

    async def front() -> str:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        link = SocketFrontLink(pair[0])
        reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await link.start(take, reason.set_result)
        for _ in range(3):
            pair[1].sendall(pack_frame(OutputCodec().encode(Deltas(()))))
        found = await asyncio.wait_for(reason, 5.0)
        await link.close()
        return found

    assert "broke over" in run(front())
    assert len(taken) == 2


def test_closing_is_not_reported_and_is_seen_by_the_core(pair: Pair, run: Run) -> None:
    core = SocketCoreLink(pair[1])
    forked_copy = pair[0].dup()  # as a process forked off the front would hold it

    async def front() -> list[str]:
        link = SocketFrontLink(pair[0])
        reasons: list[str] = []
        await link.start(lambda output: None, reasons.append)
        link.send(GetStatus(5))
        await link.close()
        await asyncio.sleep(0.01)
        return reasons

    assert run(front()) == []
    assert core.poll(1.0) == [GetStatus(5)]
    with pytest.raises(PeerClosed):
        core.poll(1.0)
    forked_copy.close()


@pytest.mark.parametrize("how", ["before", "closed", "cancelled"])
def test_closing_a_link_that_is_being_connected_leaves_nothing(
    pair: Pair, run: Run, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def front() -> None:
        link = SocketFrontLink(pair[0])
        if how == "before":
            await link.close()
        start = asyncio.create_task(link.start(lambda output: None, lambda reason: None))
        await asyncio.sleep(0)
        if how == "cancelled":
            start.cancel()
        await link.close()
        await asyncio.wait([start])
        assert start.cancelled() is (how == "cancelled")
        assert isinstance(None if start.cancelled() else start.exception(), EngineDeadError) is (how == "before")
        assert pair[0].fileno() == -1

    run(front())
    gc.collect()
    assert caplog.records == []
    with pytest.raises(PeerClosed):
        SocketCoreLink(pair[1]).poll(1.0)


def test_a_core_that_never_reads_is_refused_more(pair: Pair, run: Run) -> None:
    async def front() -> None:
        link = SocketFrontLink(pair[0], max_backlog_bytes=1 << 20)
        await link.start(lambda output: None, lambda reason: None)
        command = Submit((Request(1, "r", bytes(1 << 18), 1, 1),))
        with pytest.raises(UnavailableError, match="fast enough"):
            for _ in range(100):
                link.send(command)
                await asyncio.sleep(0)
        pair[1].close()
        await link.close()

    run(front())


def test_many_deltas_leave_the_loop_time_and_all_come_in_order(run: Run, pair: Pair) -> None:
    core = SocketCoreLink(pair[1])
    expected = [Delta(handle, pack_ids([handle])) for handle in range(3000)]

    async def receive() -> tuple[list[Output], int]:
        front, found, ended = SocketFrontLink(pair[0]), list[Output](), asyncio.Event()

        def take(output: Output) -> None:
            time.sleep(0.002)
            found.append(output)

        await front.start(take, lambda reason: ended.set())
        core.send(Deltas(tuple(expected)))
        core.send(Reply(1))
        core.close()
        num_turns = 0
        while not ended.is_set():
            num_turns += 1
            await asyncio.sleep(0)
        await front.close()
        return found, num_turns

    found, num_turns = run(receive())
    assert isinstance(found[-1], Reply)
    assert [delta for output in found[:-1] if isinstance(output, Deltas) for delta in output.deltas] == expected
    assert num_turns > 5


def test_a_core_knows_that_its_front_is_behind(run: Run, pair: Pair) -> None:
    core = SocketCoreLink(pair[1])
    seen = [core.is_behind]
    core.send(Deltas((Delta(1, b"x" * (1 << 18)),)))
    seen.append(core.is_behind)

    async def read() -> None:
        front, came = SocketFrontLink(pair[0]), asyncio.Event()
        await front.start(lambda output: came.set(), lambda reason: None)
        while not came.is_set():
            core.poll(0.0)  # sends what the kernel had no room for
            await asyncio.sleep(0.001)
        seen.append(core.is_behind)
        await front.close()

    run(read())
    assert seen == [False, True, False]
