"""A link inside one process: the core loop runs in a thread and messages pass by reference, since they are frozen.

Owns the two queues. The core's thread wakes the front's loop once per batch of outputs, not once per output.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Callable

from headrace.ipc.links import PeerClosed
from headrace.types.errors import EngineDeadError
from headrace.types.messages import Command, Output


def make_pair() -> tuple[InprocessFrontLink, InprocessCoreLink]:
    """Two connected ends."""
    front = InprocessFrontLink()
    return front, InprocessCoreLink(front)


class InprocessFrontLink:
    """The front's end; see `FrontLink`."""

    def __init__(self) -> None:
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.is_closed = False
        self._outputs: deque[Output | None] = deque()
        self._wakeup_pending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_output: Callable[[Output], None] | None = None
        self._on_close: Callable[[str], None] | None = None

    async def start(self, on_output: Callable[[Output], None], on_close: Callable[[str], None]) -> None:
        self._on_output, self._on_close = on_output, on_close
        self._loop = asyncio.get_running_loop()
        self._deliver()

    def send(self, command: Command) -> None:
        if self.is_closed:
            raise EngineDeadError("the engine core is gone")
        self.commands.put(command)

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.commands.put(None)

    def push(self, output: Output | None) -> None:
        """Called by the core's thread. None is the end of the core."""
        self._outputs.append(output)
        loop = self._loop
        if self._wakeup_pending or loop is None or loop.is_closed():
            return
        self._wakeup_pending = True
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop was closed between the check and the call
            self.is_closed = True

    def _deliver(self) -> None:
        # Cleared before the queue is read: an output pushed after the last read wakes the loop again.
        self._wakeup_pending = False
        while self._outputs:
            output = self._outputs.popleft()
            if self.is_closed or self._on_output is None or self._on_close is None:
                continue
            if output is None:
                self.is_closed = True
                self._on_close("the core thread ended")
            else:
                self._on_output(output)


class InprocessCoreLink:
    """The core's end; see `CoreLink`."""

    def __init__(self, front: InprocessFrontLink) -> None:
        self._front = front
        self._is_closed = False
        self.is_behind = False  # the two ends share one interpreter: neither gets far ahead of the other

    def poll(self, timeout: float) -> list[Command]:
        commands: list[Command] = []
        if self._is_closed:
            raise PeerClosed("the front closed the link")
        try:
            command = self._front.commands.get(block=timeout > 0, timeout=max(timeout, 0.0) or None)
            while command is not None:
                commands.append(command)
                command = self._front.commands.get_nowait()
        except queue.Empty:
            return commands
        self._is_closed = True
        if not commands:
            raise PeerClosed("the front closed the link")
        return commands

    def send(self, output: Output) -> None:
        if self._front.is_closed:
            raise PeerClosed("the front closed the link")
        self._front.push(output)

    def close(self) -> None:
        self._is_closed = True
        self._front.push(None)
