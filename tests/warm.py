"""Processes of tests that begin warm: forked off one that has imported torch, which a cold start takes two seconds for.

Where `warm_starts` holds, `subprocess.Popen` starts the modules named in `MODULES` so, and they do in their turn. All
else is as after a cold start: the module runs as `__main__` with its arguments, in a process that is a child of the one
that asked, with the descriptors, environment, folder and session that were asked for and no others. Any other command,
and any in an environment that imports may have looked at, starts cold.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import inspect
import itertools
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.ipc.spawn import python_path

MODULES = (
    "headrace",
    "headrace.core.process",
    "headrace.core.rank_process",
    "tests.core.device_rank",
    "tests.core.faulty_rank",
    "tests.core.quick_rank",
    "tests.engine.group_trainer",
    "tests.faults.trainer",
    "tests.parallel.pool",
    "tests.server.bucket_client",
    "tests.server.vllm_client",
)
IMPORTS = (
    "torch.distributed",
    "safetensors.torch",
    "headrace.core.service",
    "headrace.core.rank_start",
    "headrace.core.rank_member",
    "headrace.runner",
    "headrace.models",
    "headrace.cli.serve",
    "headrace.core.rank_node",
    *(name for name in MODULES if name != "tests.core.device_rank"),  # it imports triton, which others must not have
)
SECONDS = 60.0
_NOT_LOOKED_AT = (
    *("HEADRACE_", "PYTEST_", "TORCHINDUCTOR_CACHE_DIR"),
    *("NCCL_", "TORCH_NCCL_", "TRITON_CACHE_", "TRITON_STORE_", "FLASHINFER_", "OMP_WAIT_POLICY"),
)
"""Of those that Headrace sets in its process, too: read by libraries that no import of the template loads, or late."""
_PR_SET_CHILD_SUBREAPER = 36
_FREE_NUMBER = 512  # above all that a start asks for
_NAME_BYTES = 512
_Popen: Any = subprocess.Popen
_cold_start = _Popen._execute_child


class Start(msgspec.Struct):
    """What was asked for; `numbers` are the descriptors of the new process, the standard ones first."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    has_own_session: bool
    numbers: list[int]

    @property
    def module(self) -> str:
        return self.arguments[self.arguments.index("-m") + 1]


@contextlib.contextmanager
def warm_starts(template: Template) -> Iterator[None]:
    """For this process, and those that it starts so."""
    with _replaced(template.start):
        yield


@contextlib.contextmanager
def cold_starts() -> Iterator[None]:
    """As everywhere else, within `warm_starts`."""
    warm, _Popen._execute_child = _Popen._execute_child, _cold_start
    try:
        yield
    finally:
        _Popen._execute_child = warm


@contextlib.contextmanager
def _replaced(start: Any) -> Iterator[None]:
    """`start` takes a `Start` and the descriptors here that it is to have, and returns a process id."""

    def execute_child(process: Any, *given: Any) -> None:
        asked = inspect.signature(_cold_start).bind(process, *given).arguments
        wanted = _start_of(asked)
        if wanted is None:
            _cold_start(process, *given)
            return
        streams = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        ours = [number if each == -1 else each for number, each in enumerate(streams)] + wanted.numbers[3:]
        process.pid = start(wanted, ours)
        process._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        process._close_pipe_fds(*(asked[name] for name in pipes))

    before, _Popen._execute_child = _Popen._execute_child, execute_child
    try:
        yield
    finally:
        _Popen._execute_child = before


def are_starts_warm() -> bool:
    return _Popen._execute_child is not _cold_start


def _start_of(asked: dict[str, Any]) -> Start | None:
    """None for what has to start cold."""
    words = asked["args"]
    if not isinstance(words, list) or words[:1] != [sys.executable] or "-m" not in words[:3]:
        return None
    given = dict(os.environ if asked["env"] is None else asked["env"])
    wanted = Start(words, given, str(asked["cwd"] or Path.cwd()), asked["start_new_session"], [0, 1, 2])
    plain = asked["preexec_fn"] is None and asked["close_fds"] and asked["process_group"] in (-1, None)
    if wanted.module not in MODULES or not plain or _looked_at(given) != _looked_at(_ENVIRONMENT):
        return None
    wanted.numbers += map(int, asked["pass_fds"])
    return wanted


def _looked_at(environment: dict[str, str]) -> dict[str, Any]:
    """What imports may have looked at: none does at Headrace's own variables, nor at one that an import sets."""
    paths = set(environment.get("PYTHONPATH", "").split(os.pathsep)) | {python_path().split(os.pathsep)[0]}
    kept = {name: value for name, value in environment.items() if not name.startswith(_NOT_LOOKED_AT)}
    return {**kept, "PYTHONPATH": paths - {""}}


_ENVIRONMENT = dict(os.environ)


class Template:
    """The process that has imported everything, and does nothing but fork.

    `begin` has it serve a socket; what it returns waits for its end.
    """

    def __init__(self, begin: Callable[[socket.socket], Callable[[float], Any]] | None = None) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(SECONDS)
        with theirs:
            self._wait = (begin or _started)(theirs)

    def start(self, wanted: Start, descriptors: list[int]) -> int:
        """Its child is no child of ours until the process between them has ended: then it is, as no process nearer to
        it takes orphans."""
        with self._lock, _taking_orphans():
            socket.send_fds(self._socket, [msgspec.json.encode(wanted)], descriptors)
            return int(self._socket.recv(64))

    def close(self) -> None:
        self._socket.close()
        self._wait(SECONDS)


def _started(connection: socket.socket) -> Callable[[float], Any]:
    number = connection.fileno()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.warm", str(number), "-" * _NAME_BYTES],
        pass_fds=[number],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**_ENVIRONMENT, "PYTHONPATH": python_path()},
    )
    return process.wait


def forked(connection: socket.socket) -> Callable[[float], Any]:
    """A template that is forked off this process, which has one thread. It ends with this one."""
    if not os.fork():
        try:
            os.dup2(connection.fileno(), 3)
            os.closerange(4, 1 << 16)
            main(3)
        except BaseException:  # process entry point
            traceback.print_exc()
        finally:
            os._exit(0)
    return lambda _: None


@contextlib.contextmanager
def _taking_orphans() -> Iterator[None]:
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        library.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _serve(connection: socket.socket) -> None:
    """The template's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 64)
        if not message:
            return
        wanted = msgspec.json.decode(message, type=Start)
        ready, told = os.pipe()
        if not (between := os.fork()):
            os.close(ready)
            between = os.getpid()
            if not os.fork():
                while os.getppid() == between:
                    time.sleep(0.0005)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                _become(wanted, descriptors, told)
            os._exit(0)
        os.waitpid(between, 0)
        for each in (told, *descriptors):
            os.close(each)
        connection.send(os.read(ready, 64))
        os.close(ready)


def _start_from_here(known: frozenset[Any], wanted: Start, descriptors: list[int]) -> int:
    """How a process that began warm starts one: what it has in memory is what the other needs, but for what it does at
    its own end, all finalizers but those `known`: they are of descriptors that the other has not."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        for each in _finalizers() - known:
            each.detach()
        _become(wanted, descriptors, told)
    os.close(told)
    assert os.read(ready, 64), "it has ended"
    os.close(ready)
    return pid


def _finalizers() -> frozenset[Any]:
    return frozenset(weakref.finalize._registry)  # type: ignore[attr-defined]


def _become(wanted: Start, descriptors: list[int], told: int) -> None:
    """Be the process that was asked for, to its end."""
    code = 1
    try:
        if wanted.has_own_session:
            os.setsid()
        _forget_handlers()
        _take(wanted.numbers, descriptors, told)
        for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
            stream = open(number, mode, buffering=1 if name == "stderr" else -1, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.chdir(wanted.folder)
        os.environ.clear()
        os.environ.update(wanted.environment)
        _rename(wanted.arguments)
        sys.argv[:] = ["-m", *wanted.arguments[wanted.arguments.index(wanted.module) + 1 :]]
        gc.enable()
        runpy.run_module(wanted.module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # process entry point
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _forget_handlers() -> None:
    """Of signals, as a program that begins: what is ignored stays so."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _take(numbers: list[int], descriptors: list[int], told: int) -> None:
    """Have these descriptors under these numbers, and no other; then say that this process is there."""
    kept = [fcntl.fcntl(each, fcntl.F_DUPFD, _FREE_NUMBER) for each in (told, *descriptors)]
    for number, each in zip(numbers, kept[1:], strict=True):
        os.dup2(each, number)
    asked = sorted({*numbers, kept[0]})
    for before, after in itertools.pairwise([*asked, 1 << 16]):
        os.closerange(before + 1, after)
    os.write(kept[0], str(os.getpid()).encode())
    os.close(kept[0])


def _rename(arguments: list[str]) -> None:
    """Show these where the system shows a process's arguments: tests find processes by them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first, end = int(fields[45]), int(fields[46])
    words = "\0".join(arguments).encode()[: end - first - 1]
    ctypes.memmove(first, words.ljust(end - first, b"\0"), end - first)


def main(number: int) -> None:
    """Import, and serve until the other end is closed."""
    gc.disable()
    for name in IMPORTS:
        __import__(name)
    gc.freeze()
    for name in MODULES:
        if name != "headrace":
            sys.modules.pop(name, None)  # each is run, as a new one
    num_threads = len(os.listdir("/proc/self/task"))
    assert num_threads == 1, f"{num_threads} threads: only a process of one can be forked"
    connection = socket.socket(fileno=number)
    with _replaced(functools.partial(_start_from_here, _finalizers())):
        _serve(connection)


if __name__ == "__main__":
    main(int(sys.argv[1]))
