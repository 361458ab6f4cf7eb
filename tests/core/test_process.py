"""A real core process: start, failure to start, sudden death of either side, and what crosses the boundary."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.config import ResolvedConfig
from headrace.ipc import CoreProcess, FrontLink, begin_process, start_process
from headrace.ipc.buffers import SharedBuffer
from headrace.ipc.codec import pack_frame
from headrace.ipc.pulse import PULSE_BYTES
from headrace.types.errors import ShutdownError
from headrace.types.messages import (
    BeginUpdate,
    CommitUpdate,
    CoreReady,
    CoreStatus,
    Deltas,
    GetStatus,
    Output,
    Reply,
    Shutdown,
    Stage,
    Submit,
)
from headrace.types.request import Delta, unpack_ids
from headrace.types.weights import BufferEntry, UpdateReport
from tests.arch.source import ROOT, child_environment
from tests.core.harness import bucket_of, manifest_of, new_tensors, request, tiny_config
from tests.processes import children_of, runs

cold = pytest.mark.usefixtures("cold_processes")  # where the start is what is tested


class Front:
    """A core process and what it has sent."""

    def __init__(self, process: CoreProcess, link: FrontLink) -> None:
        self.process = process
        self.link = link
        self.ready: CoreReady | None = None
        self.replies: dict[int, Reply] = {}
        self.deltas: dict[int, list[Delta]] = {}
        self.close_reason = ""
        self._news = asyncio.Event()

    async def start(self) -> None:
        await self.link.start(self._on_output, self._on_close)
        await self.until(lambda: self.ready is not None or bool(self.close_reason))

    async def until(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def call(self, command: Any, kind: Any = None) -> Any:
        self.link.send(command)
        await self.until(lambda: command.call_id in self.replies)
        reply = self.replies[command.call_id]
        assert reply.error is None, reply.error
        return msgspec.msgpack.decode(reply.payload, type=kind)

    def has_ended(self, handle: int) -> bool:
        known = self.deltas.get(handle)
        return bool(known) and known is not None and known[-1].finish is not None

    def _on_output(self, output: Output) -> None:
        if isinstance(output, CoreReady):
            self.ready = output
        elif isinstance(output, Reply):
            self.replies[output.call_id] = output
        elif isinstance(output, Deltas):
            for delta in output.deltas:
                self.deltas.setdefault(delta.handle, []).append(delta)
        self._news.set()

    def _on_close(self, reason: str) -> None:
        self.close_reason = reason
        self._news.set()


def with_core(
    body: Callable[[Front], Coroutine[Any, Any, None]], resolved: ResolvedConfig | None = None, executor: str = "free"
) -> CoreProcess:
    """Run `body` against a new core process; returns the process, ended."""

    async def run() -> CoreProcess:
        process, link = start_process(msgspec.msgpack.encode(resolved or tiny_config()), executor=executor)
        front = Front(process, link)
        try:
            await front.start()
            await body(front)
        finally:
            await link.close()
            process.close(5.0)
        return process

    process = asyncio.run(run())
    assert not process.is_alive
    assert not Path(f"/proc/{process.pid}").exists()  # reaped: no zombie
    return process


def wait_until_gone(pid: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not runs(pid)


@cold
def test_requests_run_in_a_process_of_their_own() -> None:
    async def body(front: Front) -> None:
        assert front.ready is not None and front.ready.error is None
        assert (front.ready.page_size, front.ready.num_layers, front.ready.max_total_num_tokens) == (4, 2, 4096)
        requests = tuple(request(handle, max_new_tokens=20, deliver_every=5) for handle in range(1, 65))
        front.link.send(Submit(requests))
        await front.until(lambda: all(front.has_ended(handle) for handle in range(1, 65)))
        for handle in range(1, 65):
            tokens = [int(token) for delta in front.deltas[handle] for token in unpack_ids(delta.token_ids)]
            assert tokens == list(range(6, 26))
        status = await front.call(GetStatus(1), CoreStatus)
        assert status.num_used_tokens == 0
        await front.call(Shutdown(2))
        await front.until(lambda: bool(front.close_reason))

    process = with_core(body)
    assert process.exit_code == 0


def test_weights_cross_in_shared_memory() -> None:
    tensors = new_tensors(5.0)
    buffer, offsets = bucket_of(list(tensors.values()))

    async def body(front: Front) -> None:
        begun = await front.call(BeginUpdate(1, "v1", manifest_of(tensors)), dict[str, Any])
        entries = tuple(BufferEntry(index, offset) for index, offset in enumerate(offsets))
        await front.call(Stage(2, begun["session_id"], buffer.ref, entries))
        report = await front.call(CommitUpdate(3, begun["session_id"]), UpdateReport)
        assert (report.version, report.epoch, report.num_tensors) == ("v1", 1, len(tensors))

    with_core(body)
    buffer.close()


@cold
def test_a_core_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def body(front: Front) -> None:
        assert front.ready is not None and front.ready.error is not None
        assert front.ready.error.code == "CheckpointError"
        assert str(tmp_path) in front.ready.error.message
        await front.until(lambda: bool(front.close_reason))

    resolved = msgspec.structs.replace(tiny_config(), folder=str(tmp_path))
    process = with_core(body, resolved, executor="local")
    assert process.exit_code == 1


@cold
@pytest.mark.parametrize("executor", ["local", "free"])
def test_a_core_may_begin_before_its_settings_are_there(executor: str) -> None:
    async def run() -> None:
        begun = begin_process(executor=executor, num_ranks=int(executor == "local"))
        time.sleep(0.2)  # it waits meanwhile, or imports
        process, link = begun.configure(msgspec.msgpack.encode(tiny_config()))
        begun.close()  # which is not for it to end any more
        front = Front(process, link)
        await front.start()
        assert front.ready is not None and process.is_alive
        assert front.ready.error is None or front.ready.error.code == "CheckpointError"  # there is no such folder
        await link.close()
        process.close(5.0)

    asyncio.run(run())


@cold
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_kept_torch_from_being_loaded_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_ranks: int
) -> None:
    stub = "import builtins\nif hasattr(builtins, 'tried'): raise ImportError('again')\nbuiltins.tried = 1\n"
    (tmp_path / "torch.py").write_text(f"{stub}raise RuntimeError('its first words')\n")
    monkeypatch.setattr("headrace.ipc.spawn.python_path", lambda: f"{tmp_path}{os.pathsep}{ROOT}")

    async def run() -> CoreProcess:
        begun = begin_process(num_ranks=num_ranks)
        ranks = await_children(begun._process.pid, num_ranks - 1)
        process, link = begun.configure(msgspec.msgpack.encode(tiny_config(tp_size=num_ranks)))
        front = Front(process, link)
        await front.start()
        assert front.ready is not None and front.ready.error is not None
        assert front.ready.error.message == "the engine core cannot start: RuntimeError: its first words"
        assert not any(map(runs, ranks))  # they went first
        await link.close()
        process.close(5.0)
        return process

    assert asyncio.run(run()).exit_code == 1


def await_children(pid: int, number: int) -> list[int]:
    deadline = time.monotonic() + 60.0
    while len(found := children_of(pid)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_core_that_gets_no_settings_is_ended() -> None:
    before = os.listdir("/proc/self/fd")
    begun = begin_process(num_ranks=2)
    pid = begun._process.pid
    (rank,) = await_children(pid, 1)
    assert runs(pid)
    begun.close()
    begun.close()
    assert not Path(f"/proc/{pid}").exists() and wait_until_gone(rank, 10.0)
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ShutdownError):
        begun.configure(b"")


@pytest.mark.parametrize("missing", ["os.pipe", "headrace.ipc.spawn._start"])
def test_a_core_that_cannot_be_launched_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(missing, fails)
    with pytest.raises(OSError, match="Too many") as caught:
        start_process(b"")
    assert os.listdir("/proc/self/fd") == before, caught


def test_a_killed_core_is_noticed_and_named() -> None:
    async def body(front: Front) -> None:
        front.link.send(Submit(tuple(request(handle, max_new_tokens=200) for handle in range(1, 65))))
        os.kill(front.process.pid, signal.SIGKILL)
        await front.until(lambda: bool(front.close_reason), timeout=2.0)
        assert "signal 9" in front.close_reason

    assert with_core(body).exit_code == -signal.SIGKILL


def test_malformed_frames_do_not_stop_the_core() -> None:
    async def body(front: Front) -> None:
        link: Any = front.link
        bad = [b"", b"\xc1", b"\x93\x01\x02\x03", msgspec.msgpack.encode(["get_weight", 9, 5]), os.urandom(1000)]
        link._transport.write(b"".join(map(pack_frame, bad)))
        await front.until(lambda: 9 in front.replies)
        error = front.replies[9].error
        assert error is not None and error.code == "InternalError"
        assert (await front.call(GetStatus(10), CoreStatus)).state == "ready"

    with_core(body)


def test_closing_the_link_ends_an_idle_core() -> None:
    async def body(front: Front) -> None:
        assert front.process.is_alive

    assert with_core(body).exit_code == 0


PARENT = """
import asyncio, os, sys, time, msgspec
from headrace.ipc import start_process
from headrace.types.messages import Submit

config, submit = map(bytes.fromhex, sys.argv[2:])

async def main():
    process, link = start_process(config, executor="free")
    ready = asyncio.Event()
    await link.start(lambda output: ready.set(), print)
    await ready.wait()
    link.send(msgspec.msgpack.decode(submit, type=Submit))
    if sys.argv[1] == "forked" and os.fork() == 0:  # a sibling that holds copies of every descriptor
        os.setsid()
        print(process.pid, os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    if sys.argv[1] == "plain":
        print(process.pid, 0, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["plain", "forked"])
def test_a_killed_parent_leaves_no_core(how: str) -> None:
    environment = child_environment()
    submit = Submit(tuple(request(handle, max_new_tokens=200) for handle in range(1, 5)))
    messages = [msgspec.msgpack.encode(message).hex() for message in (tiny_config(), submit)]
    command = [sys.executable, "-c", PARENT, how, *messages]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    core, sibling = map(int, parent.stdout.readline().split())
    assert runs(core)
    parent.kill()
    parent.wait(10.0)
    parent.stdout.close()
    gone = wait_until_gone(core, 5.0)
    if sibling:
        os.kill(sibling, signal.SIGKILL)
    assert gone


def test_the_front_stays_free_of_torch() -> None:
    code = "import sys, headrace.ipc, headrace.core, headrace.core.process; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert found.stdout.strip() == "False"


def test_a_core_process_logs_of_itself_as_it_was_told_to() -> None:
    """As what it loads does."""
    near, far = socket.socketpair()
    read_end, write_end = os.pipe()
    near.close()
    with far, SharedBuffer.create(PULSE_BYTES) as page:
        numbers = {"link": far.fileno(), "lifeline": read_end, "pulse": page.descriptor, "parent": os.getpid()}
        words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
        core = subprocess.run(
            [sys.executable, "-P", "-m", "headrace.core.process", *words, "--log-json"],
            pass_fds=[value for name, value in numbers.items() if name != "parent"],
            stderr=subprocess.PIPE,
            env=child_environment(),
            timeout=60,
        )
    os.close(read_end)
    os.close(write_end)
    [line] = core.stderr.splitlines()
    told = msgspec.json.decode(line)
    assert core.returncode == 2 and told["logger"] == "core.process"
    assert told["message"].startswith("no configuration: ")
