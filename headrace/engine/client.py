"""The front's side of one core. Owns handles, the live sequences by handle, the watch over the core's pulse, and the
one moment at which the core is dead for everybody. Knows nothing of text, prompts or processes.

Bound to one event loop: every method is called on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Protocol, TypeVar

import msgspec

from headrace.engine.calls import Calls, look_at
from headrace.engine.health import Ailment, HealthLimits, diagnose
from headrace.engine.ledger import Ledger
from headrace.engine.work_log import WorkLog
from headrace.ipc import FrontLink, PulsePage
from headrace.types.errors import DeadlineError, EngineDeadError, HeadraceError, RequestError, ShutdownError
from headrace.types.handles import handle_of
from headrace.types.messages import (
    Abort,
    Command,
    CoreFailed,
    CoreReady,
    CoreStatus,
    Deltas,
    Finished,
    GetStatus,
    Output,
    Pause,
    ReleaseMemory,
    Reply,
    Shutdown,
    Submit,
)
from headrace.types.request import DEFAULT_VERSION, Delta, Request
from headrace.types.weights import PauseMode

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
STATUS_SECONDS = 4.0
NUM_HOPELESS_LOOKS = 3
"""So many looks in a row must find a core hopeless: a freeze of both processes must not be held against it."""

MAX_SUBMIT_BYTES = 1 << 23
_NULL = b"\xc0"

Payload = TypeVar("Payload")


class Sink(Protocol):
    """Who wants the deltas of one sequence. Exactly one of a terminal delta and `on_failure` ends it."""

    def on_delta(self, delta: Delta) -> None: ...

    def on_failure(self, error: HeadraceError) -> None: ...


class CoreClient:
    """Commands to a core and its answers.

    `status` is the core's last account of itself; `is_whole` says that its weights can serve, also during an update.
    """

    def __init__(
        self,
        link: FrontLink,
        pulse: PulsePage,
        control_timeout: float,
        on_death: Callable[[HeadraceError], object],
        limits: HealthLimits,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`control_timeout`: default deadline of a call, in seconds. `on_death` ends whatever is left of the core.
        `clock` is the core's too."""
        self.ledger = ledger or Ledger(DEFAULT_VERSION)
        self._link = link
        self._pulse = pulse
        self._limits = limits
        self.control_timeout = control_timeout
        self._on_death = on_death
        self._calls = Calls(self._send_call, pulse, clock)
        self._sinks: dict[int, Sink] = {}
        self._last_handle = 0
        self._submits: list[Request] = []
        self._finished: list[int] = []
        self._flush_scheduled = False
        self._ready: asyncio.Future[CoreReady] | None = None
        self._has_said_why = False  # it cannot start, and ends therefore
        self._watch: asyncio.Task[None] | None = None
        self._is_ending = False
        self._end: HeadraceError | None = None
        self._barred: HeadraceError | None = None
        self.status: CoreStatus | None = None
        self.on_status: Callable[[CoreStatus], None] | None = None
        """Hears of every one."""
        self._work = WorkLog()
        self.is_whole = True
        self.devices: tuple[str, ...] = ()
        """The UUIDs of the devices whose memory the core reads where it lies; none on a CPU."""

    @property
    def is_alive(self) -> bool:
        """True from the start until the core's death or `close`, and again once another core has taken its place."""
        return self._end is None and self._barred is None

    @property
    def is_responsive(self) -> bool:
        """True while the core lives and its pulse is that of a loop that goes on."""
        return self.is_alive and self.diagnose() is None

    def diagnose(self) -> Ailment | None:
        """What is wrong with the core now, by its pulse alone; of any thread."""
        return diagnose(self._pulse.read(), time.monotonic_ns(), self._limits)

    async def start(self, timeout: float) -> CoreReady:
        """Wait for the core to be ready. Raises its error, `EngineDeadError`, or `DeadlineError` after `timeout` s."""
        if self._end is not None:
            raise _copy(self._end)
        loop = asyncio.get_running_loop()
        self._ready, self._has_said_why = loop.create_future(), False
        self._ready.add_done_callback(look_at)  # an end of this client may come before anybody waits
        await self._link.start(self._on_output, self._on_close)
        try:
            ready = await asyncio.wait_for(self._ready, timeout)
        except TimeoutError:
            message = f"the core was not ready within start_timeout {timeout:g} s"
            raise DeadlineError(message, field="start_timeout") from None
        if ready.error is not None:
            raise ready.error.to_exception()
        self._last_handle = handle_of(ready.front, self._last_handle)
        self.devices = ready.devices
        await self._take_over()
        self._watch = loop.create_task(self._watch_core())
        return ready

    async def detach(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.wait([watch])
        await self._link.close()

    def attach(self, link: FrontLink, pulse: PulsePage) -> None:
        """Another core takes the place of the dead one: `start` it next. Until then nobody is served."""
        assert self._end is not None, "a core that lives is not replaced"
        self._link, self._pulse = link, pulse
        self._calls.follow(pulse)
        self._barred = type(self._end)(f"{self._end.message}; it is being started again")
        self._end = None

    def end(self, error: HeadraceError) -> None:
        """No other core comes: `error` is what everybody hears from now on."""
        self._end = error

    def new_handle(self) -> int:
        """A handle no other sequence of this client has had."""
        self._last_handle += 1
        return self._last_handle

    def submit(self, request: Request, sink: Sink) -> None:
        """Send a request; those of one loop turn leave as one message. Raises when the core is gone."""
        self.check_alive()
        self._sinks[request.handle] = sink
        self._submits.append(request)
        self._schedule_flush()

    def abort(self, handles: Iterable[int], message: str) -> None:
        """Ask for the terminal deltas of these sequences, with what they have so far."""
        live = tuple(handle for handle in handles if handle in self._sinks)
        if live and self.is_alive:
            self._send(Abort(live, message))

    def drop(self, handle: int, *, is_answered: bool) -> None:
        """Forget a sequence. One that the core has not ended yet is freed there; its deltas are ignored from now on."""
        if self._sinks.pop(handle, None) is not None and not is_answered and self.is_alive:
            self._finished.append(handle)
            self._schedule_flush()

    async def call(
        self, command: Callable[[int], Command], reply: type[Payload], timeout: float | None = None
    ) -> Payload:
        """Send the command made from a call id and return its reply, decoded to the type `reply`.

        Raises the core's error, `DeadlineError` if it was not done within `timeout` (default `control_timeout`)
        seconds, or `EngineDeadError`.
        """
        self.check_alive()
        payload = await self._calls.call(command, self._limit(timeout))
        return msgspec.msgpack.decode(payload or _NULL, type=reply)

    async def change(
        self, command: Callable[[int], Command], reply: type[Payload], timeout: float | None = None
    ) -> Payload:
        """As `call`, for commands that change the core's state: `status` is fresh after the core's answer, on errors
        too."""
        self.check_alive()
        payload = await self._calls.call(command, self._limit(timeout), self._refresh)
        return msgspec.msgpack.decode(payload or _NULL, type=reply)

    async def change_for_good(
        self, command: Callable[[int], Command], reply: type[Payload], timeout: float | None = None
    ) -> Payload:
        """As `change`, for the last command of what a caller asks for, which nothing undoes: cancelled once the core
        has done it, it returns all the same."""
        self.check_alive()
        payload = await self._calls.call(command, self._limit(timeout), self._refresh, is_final=True)
        return msgspec.msgpack.decode(payload or _NULL, type=reply)

    async def bring(self, command: Callable[[int], Command], mode: str, timeout: float | None = None) -> None:
        """As `call`, for what stages tensors of an update; as `change` where its `mode` is "inplace": live weights are
        not whole any more then."""
        await (self.change if mode == "inplace" else self.call)(command, NoneType, timeout)

    async def ask(
        self, question: Callable[[int], GetStatus | Shutdown], reply: type[Payload], timeout: float | None = None
    ) -> Payload:
        """As `call`, for questions whose answer is all that matters: `DeadlineError` at the deadline, at once."""
        self.check_alive()
        payload = await self._calls.ask(question, self._limit(timeout))
        return msgspec.msgpack.decode(payload or _NULL, type=reply)

    async def pause(self, mode: PauseMode, timeout: float | None = None) -> int:
        """Pause generation. Returns the id of the call, for whom it comes too late: `give_up` undoes it."""
        ids: list[int] = []

        def command(call_id: int) -> Command:
            ids.append(call_id)
            return Pause(call_id, mode)

        await self.change(command, NoneType, timeout)
        return ids[0]

    async def give_up(self, call_id: int) -> None:
        """Leave nothing of a call that was answered when nobody listened any more."""
        await self._calls.give_up(call_id)
        await self._refresh()

    def check_alive(self) -> None:
        """Raise the error that ended this client, if one did."""
        error = self._end or self._barred
        if error is not None:
            raise _copy(error)

    def note_ending(self) -> None:
        """The engine ends, from any thread: a core that ends from now on is no news. Who ends this process may have
        killed the core just before, as Ray does."""
        self._is_ending = True

    async def shut_down(self, timeout: float) -> bool:
        """Ask the core to answer what runs and to end. Returns whether it has agreed (or was dead before)."""
        self.note_ending()
        if self._end is not None:
            return True
        if self._watch is None:
            return False  # still starting: it reads no commands yet
        try:
            await self.ask(Shutdown, NoneType, timeout)
        except HeadraceError as error:
            logger.debug("the core did not take its leave: %s", error)
            return False
        return True

    async def close(self, error: HeadraceError) -> None:
        """End the link; whatever is still live fails with `error`. Idempotent."""
        self._finish_all(error)
        await self.detach()

    async def _take_over(self) -> None:
        """Have a core that is ready be as the one before it was, and serve."""
        mode = self.ledger.paused
        if mode is not None:
            await self._calls.call(lambda call_id: Pause(call_id, mode), self.control_timeout)
        tags = tuple(self.ledger.released)
        if tags:
            await self._calls.call(lambda call_id: ReleaseMemory(call_id, tags), self.control_timeout)
        await self._calls.ask(GetStatus, self.control_timeout)
        self._barred = None
        self.check_alive()

    def _limit(self, timeout: float | None) -> float:
        return self.control_timeout if timeout is None else timeout

    async def _refresh(self) -> None:
        with contextlib.suppress(HeadraceError):  # the caller has its own answer; the watch will see what is wrong
            await self.ask(GetStatus, CoreStatus, STATUS_SECONDS)  # noted as it comes

    def _note(self, status: CoreStatus) -> None:
        self.status = status
        self._work.note(status, time.monotonic())
        if self.on_status is not None:
            self.on_status(status)
        if status.state != "updating":  # while updating it stays what it was before
            self.is_whole = status.state == "ready"

    async def _watch_core(self) -> None:
        """Keep `status` fresh, feel the pulse, and give up a core that is past hope."""
        num_hopeless = 0
        while self.is_alive:
            ailment = self.diagnose()
            if ailment is None:
                await self._refresh()
            num_hopeless = num_hopeless + 1 if ailment is not None and ailment.is_hopeless else 0
            if ailment is not None and num_hopeless >= NUM_HOPELESS_LOOKS:
                self._die(EngineDeadError(ailment.message))
            await asyncio.sleep(WATCH_SECONDS)

    def _send_call(self, command: Command) -> None:
        self._send(command)
        self.ledger.sent(command)

    def _send(self, command: Command) -> None:
        """Send after everything that was asked before it."""
        self._flush()
        self._put(command)

    def _put(self, command: Command) -> None:
        """Give the link a command. One found gone bars everybody from now on: `_die` follows, once it is known how the
        core ended."""
        try:
            self._link.send(command)
        except EngineDeadError as error:
            self._barred = error
            raise

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        submits, self._submits = self._submits, []
        finished, self._finished = self._finished, []
        if len(submits) == 1:
            self._send_requests(tuple(submits))
        elif submits:
            for requests in _in_bounded_groups(submits):
                self._send_requests(requests)
        if finished and self.is_alive:
            try:
                self._put(Finished(tuple(finished)))
            except HeadraceError as error:
                logger.debug("the core was not told of %d ended sequences: %s", len(finished), error)

    def _send_requests(self, requests: tuple[Request, ...]) -> None:
        try:
            self._put(Submit.of(requests))
        except RequestError as error:  # a value that cannot travel costs its own request only
            if len(requests) == 1:
                self._fail_sinks([requests[0].handle], error)
                return
            for request in requests:
                self._send_requests((request,))
        except HeadraceError as error:
            self._fail_sinks([request.handle for request in requests], error)

    def _on_output(self, output: Output) -> None:
        if isinstance(output, Deltas):
            for delta in output.deltas:
                sink = self._sinks.get(delta.handle)
                if sink is not None:
                    if delta.finish is not None:
                        del self._sinks[delta.handle]
                    sink.on_delta(delta)
        elif isinstance(output, Reply):
            self.ledger.answered(output)
            if status := self._calls.status_in(output):  # here, in their order: who waits for one may wake much later
                self._note(msgspec.msgpack.decode(status, type=CoreStatus))
            self._calls.settle(output)
        elif isinstance(output, CoreFailed):
            self._die(output.error.to_exception())
        elif self._ready is not None and not self._ready.done():
            self._ready.set_result(output)
            self._has_said_why = output.error is not None

    def _on_close(self, reason: str) -> None:
        self._die(EngineDeadError(reason))

    def _die(self, reason: HeadraceError) -> None:
        if self._end is not None:
            return
        if self._is_ending:
            self._finish_all(ShutdownError("the engine is shut down"))
            return
        logger.log(logging.DEBUG if self._has_said_why else logging.ERROR, "the engine core is dead: %s", reason)
        error = type(reason)(f"the engine core is dead: {reason}")
        self._finish_all(error)
        self._on_death(error)

    def _finish_all(self, error: HeadraceError) -> None:
        if self._end is not None:
            return
        self._end = error
        self._submits.clear()
        self._finished.clear()
        self._calls.fail(lambda: _copy(error))
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(_copy(error))
        self._fail_sinks(list(self._sinks), error)

    def _fail_sinks(self, handles: Iterable[int], error: HeadraceError) -> None:
        for handle in handles:
            sink = self._sinks.pop(handle, None)
            if sink is not None:
                sink.on_failure(_copy(error))


def _copy(error: HeadraceError) -> HeadraceError:
    """A fresh exception for each waiter: one raised twice would gather both tracebacks."""
    return type(error)(error.message, field=error.field)


def _in_bounded_groups(requests: list[Request]) -> Iterable[tuple[Request, ...]]:
    """All requests in as few messages as a bound on the bytes of each allows."""
    group: list[Request] = []
    num_bytes = 0
    for request in requests:
        added = _num_added_bytes(request, group[-1] if group else None)
        if group and num_bytes + added > MAX_SUBMIT_BYTES:
            yield tuple(group)
            group, num_bytes, added = [], 0, _num_added_bytes(request, None)
        group.append(request)
        num_bytes += added
    if group:
        yield tuple(group)


def _num_added_bytes(request: Request, last: Request | None) -> int:
    """About what a request adds to a message that ends with `last`."""
    is_shared = last is not None and last.sampling is request.sampling
    lists = (request.stop_token_ids, request.logprobs.token_ids, *[request.sampling.logit_bias] * 3)
    prompt = b"" if last is not None and last.prompt is request.prompt else request.prompt
    return 256 + len(request.request_id) + len(prompt) + (0 if is_shared else 5 * sum(map(len, lists)))
