"""Chat templates rendered where they can harm nobody. Owns the processes that do it, and their deadlines.

What a template computes is unknown: it may loop, grow without end, or do either for some messages only. So it is
compiled and run in `template_process`, a process with a bound on time and memory that is killed when it does not answer
and started again for the next rendering. Processes are started when first needed, and kept.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.ipc.receiving import receive_exactly
from headrace.types.errors import DeadlineError, RequestError, RequestTooLargeError, UnavailableError

RENDER_SECONDS = 5.0
MEMORY_BYTES = 1 << 30
MAX_PAYLOAD_BYTES = 1 << 28
MAX_PROCESSES = 4
WAIT_SECONDS = 30.0
"""How long a rendering may wait for others before it is answered that it may be sent again."""
_START_SECONDS = 60.0
_KILL_SELF_SECONDS = 5.0  # beyond our own deadline: for the case that we are gone
_SCRIPT = Path(__file__).with_name("template_process.py")


class TemplateRenderer:
    """Renders chat templates in up to `MAX_PROCESSES` processes. May be used from any thread."""

    def __init__(self) -> None:
        self._own()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        continue_final_message: bool = False,
    ) -> str:
        """The text; with `continue_final_message` it ends where the last message's content does. Raises `RequestError`
        when the template refuses the messages, or takes too long or too much for them; `UnavailableError` when there is
        no process to run it in, `DeadlineError` when all are busy."""
        if continue_final_message:
            marked, mark = _marked(messages)
            return _until(mark, self.render(template, marked, variables))
        if os.getpid() != self._pid:
            self._own()  # a fork: the processes are the parent's
        payload = _encode({"template": template, "messages": messages, "variables": variables})
        if not self._permits.acquire(timeout=WAIT_SECONDS):
            raise DeadlineError("other chat templates are being rendered")
        try:
            return self._render_in(self._take(), payload)
        finally:
            self._permits.release()

    def submit(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        continue_final_message: bool = False,
    ) -> concurrent.futures.Future[str]:
        """As `render`, in a thread of a few of its own: for event loops."""
        if os.getpid() != self._pid:
            self._own()
        deadline = time.monotonic() + WAIT_SECONDS

        def render() -> str:
            if time.monotonic() > deadline:
                raise DeadlineError("other chat templates are being rendered")
            return self.render(template, messages, variables, continue_final_message=continue_final_message)

        return self._threads.submit(render)

    def interrupt(self) -> None:
        """Refuse what is being rendered now: whoever waits for it is about to end."""
        for process in tuple(self._busy):
            process.kill()

    def _own(self) -> None:
        self._pid = os.getpid()
        self._permits = threading.Semaphore(MAX_PROCESSES)
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_PROCESSES, "headrace-template")
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        weakref.finalize(self, _end_all, self._idle, self._pid)

    def _take(self) -> _Process:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                process = self._idle.pop()
                if process.is_alive:
                    return process
                process.end()
        try:
            return _Process()
        except OSError as error:
            raise UnavailableError(f"no process for chat templates could be started: {error}") from None

    def _render_in(self, process: _Process, payload: bytes) -> str:
        is_reusable = False
        self._busy.add(process)
        try:
            reply = process.exchange(payload)
            is_reusable = True
        except TimeoutError:
            message = f"the chat template did not render these messages within {RENDER_SECONDS:g} s"
            raise RequestError(message, field="messages") from None
        except OSError:
            message = "the chat template's process ended while it rendered these messages"
            raise RequestError(message, field="messages") from None
        finally:
            self._busy.discard(process)
            if is_reusable:
                self._idle.append(process)
            else:
                process.end()
        if reply["reason"]:
            raise RequestError(f"the chat template refused the messages: {reply['reason']}", field="messages")
        return str(reply["text"])


class _Process:
    """One process and the socket to it. Used by one thread at a time."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair()
        words = (theirs.fileno(), RENDER_SECONDS + _KILL_SELF_SECONDS, MEMORY_BYTES)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    # -P: what lies beside the script must not shadow a module.
                    [sys.executable, "-P", str(_SCRIPT), *map(str, words)],
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError:
                self._link.close()
                raise
        try:
            receive_exactly(self._link, 1, time.monotonic() + _START_SECONDS)
        except OSError:
            self.end()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, payload: bytes) -> dict[str, str]:
        """The reply to a request. Raises `TimeoutError` after `RENDER_SECONDS`, another `OSError` when it ends."""
        deadline = time.monotonic() + RENDER_SECONDS
        self._link.settimeout(RENDER_SECONDS)
        self._link.sendall(len(payload).to_bytes(4, "big") + payload)
        size = int.from_bytes(receive_exactly(self._link, 4, deadline), "big")
        reply: dict[str, str] = json.loads(receive_exactly(self._link, size, deadline))
        return reply

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._link.close()
        self._process.kill()
        self._process.wait()


def _marked(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The messages with a mark behind the last one's content, which no template trims, and the mark."""
    *before, last = messages
    content = last.get("content")
    if not isinstance(content, str) or last.get("tool_calls"):
        message = "continue_final_message needs a last message that is text, without tool calls"
        raise RequestError(message, field="continue_final_message")
    mark = f"END{secrets.token_hex(16)}"
    return [*before, {**last, "content": content + mark}], mark


def _until(mark: str, text: str) -> str:
    before, found, _ = text.rpartition(mark)
    if not found:
        message = "continue_final_message: the chat template does not show what the last message says"
        raise RequestError(message, field="continue_final_message")
    return before


def _encode(request: Mapping[str, Any]) -> bytes:
    try:
        payload = json.dumps(request, default=_plain).encode()
    except (TypeError, ValueError, RuntimeError) as error:  # the last: too deep, or a tensor without values
        raise RequestError(f"messages, tools and arguments must be JSON: {error}", field="messages") from None
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RequestTooLargeError(f"messages have {len(payload)} bytes, over {MAX_PAYLOAD_BYTES}", field="messages")
    return payload


def _plain(value: Any) -> Any:
    """JSON of what callers in Python pass besides: other mappings, arrays, pydantic models."""
    if isinstance(value, Mapping):
        return dict(value)
    for method in ("model_dump", "tolist"):
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _end_all(processes: list[_Process], owner: int) -> None:
    if os.getpid() == owner:
        for process in processes:
            process.end()
