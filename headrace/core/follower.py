"""A rank other than the first: it executes plans and does what rank 0 says, in the order in which it says it.

Owns the steps that rank 0 has not yet heard of and the works between them. It decides nothing: a plan that comes is
launched, whatever became of the one before, because rank 0 launches it too. Every rank samples. A result is not sent
but shown, as 32 bits in the page.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from headrace.core.faults import FAULTS, describe, is_of_lost_device
from headrace.core.rank_messages import (
    PLAN,
    RESULT,
    TELL,
    GiveUpOn,
    RankAnswer,
    SampleStep,
    VoidStep,
    command_decoder,
    encode_message,
)
from headrace.core.rank_results import ResultOn, digest_of, encode_result
from headrace.core.rank_works import RankWorks, Work
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RankPage
from headrace.runner.pending import LocalStep
from headrace.types.errors import HeadraceError, InternalError, UpdateConflictError
from headrace.types.plan import SamplePatch, StepPlan
from headrace.types.plan_words import decode

logger = logging.getLogger(__name__)

IDLE_SECONDS = 3600.0
RESULT_SECONDS = 0.02
"""How long the result of a step may stay unread while no further plan comes."""

SENT_SECONDS = 0.0002
"""Between two looks whether the device has a result that rank 0 waits for."""

ARRIVAL_SECONDS = 0.001


class Follower:
    """One rank at work. `launch` begins a plan as a runner does; `overlap_depth` plans may be begun ahead. Where it
    `sends_results`, rank 0 has none of its own, and hears of each as soon as it is there."""

    def __init__(
        self,
        launch: Callable[[StepPlan], LocalStep],
        works: RankWorks,
        channel: RankChannel,
        page: RankPage,
        overlap_depth: int,
        *,
        sends_results: bool = False,
    ) -> None:
        self._launch = launch
        self._works = works
        self._channel = channel
        self._page = page
        self._overlap_depth = overlap_depth
        self._sends_results = sends_results
        self._num_heard = 0
        self._steps: deque[tuple[int, LocalStep]] = deque()  # by number of the plan
        self._unsampled: int | None = None
        self._open: deque[tuple[int, Work]] = deque()

    def run(self) -> None:
        """Until rank 0 lets go: `PeerClosed`."""
        is_waiting = False
        while True:
            timeout = IDLE_SECONDS if not self._open else ARRIVAL_SECONDS if is_waiting else 0.0
            longest = SENT_SECONDS if self._sends_results else RESULT_SECONDS
            frames = self._channel.receive(min(timeout, longest) if self._steps else timeout)
            for kind, payload in frames:
                if kind == PLAN:
                    self._begin(payload)
                elif kind == TELL:
                    self._hear(command_decoder.decode(payload))
                self._send_what_is_done()
            if self._sends_results:
                self._send_what_is_done()
            elif len(self._steps) > (self._overlap_depth if frames else 0) and self._unsampled is None:
                self._end_step()
            is_waiting = bool(self._open) and self._work()

    # Steps.

    def _begin(self, words: memoryview) -> None:
        plan, number = decode(np.frombuffer(words, np.int32)), self._num_heard
        self._num_heard += 1
        while len(self._steps) > self._overlap_depth:
            self._end_step()
        try:
            step = self._launch(plan)
        except FAULTS as fault:
            self._fail(number, fault)
            return
        self._steps.append((number, step))
        self._unsampled = number if plan.waits_to_sample else None

    def _sample(self, message: SampleStep) -> None:
        if self._unsampled != message.number:
            return  # it has failed here
        self._unsampled = None
        step = self._steps[-1][1]
        rows = np.frombuffer(message.rows, np.int32)
        patch = SamplePatch(rows, np.frombuffer(message.masks, np.int32).reshape(len(rows), -1)) if len(rows) else None
        try:
            step.sample(patch)
        except FAULTS as fault:
            self._steps.pop()
            self._fail(message.number, fault)

    def _send_what_is_done(self) -> None:
        while self._sends_results and self._steps and self._steps[0][0] != self._unsampled:
            if not self._steps[0][1].is_done:
                return
            self._end_step()

    def _end_step(self) -> None:
        """Show what came of the oldest, or send it."""
        number, step = self._steps.popleft()
        try:
            result = step.wait()
        except FAULTS as fault:
            self._fail(number, fault)
        else:
            self._page.write_result(number, digest_of(result))
            if self._sends_results:
                self._channel.send(RESULT, encode_result(ResultOn.of(number, result)))

    def _void(self, message: VoidStep) -> None:
        """Rank 0 knows of a step's failure: on all ranks it is over."""
        is_unsampled = self._unsampled == message.number
        if is_unsampled:
            self._unsampled = None
        for found in [found for found in self._steps if found[0] == message.number]:
            self._steps.remove(found)
            if not is_unsampled:
                with suppress(*FAULTS):  # what it wrote to is free then
                    found[1].wait()
        self._page.clear_failure()
        self._channel.send(TELL, encode_message(RankAnswer(message.ticket)))

    def _fail(self, number: int, fault: BaseException) -> None:
        """Rank 0 finds out whether it failed everywhere. It hears of the first: of those behind it nothing counts."""
        logger.error("a step failed", exc_info=fault)
        if self._page.failed is None:
            self._page.write_failure(number, describe(fault))
        if self._sends_results:
            self._channel.send(RESULT, encode_result(ResultOn(number)))

    # Messages.

    def _hear(self, message: Any) -> None:
        match message:
            case SampleStep():
                self._sample(message)
            case VoidStep():
                self._void(message)
            case GiveUpOn():
                self._give_up(message.target)
            case _:
                work = self._works.work_of(message)
                if work is None:
                    self._works.do(message)
                else:
                    self._advance(message.ticket, work)  # before anything that is said later

    def _give_up(self, target: int) -> None:
        for ticket, work in [each for each in self._open if each[0] == target]:
            self._open.remove((ticket, work))
            work.close()
            self._answer(ticket, UpdateConflictError("it was given up"))

    def _work(self) -> bool:
        """A slice of each work; whether all of them wait for something."""
        num_waiting = sum(self._advance(*self._open.popleft()) for _ in range(len(self._open)))
        return bool(self._open) and num_waiting == len(self._open)

    def _advance(self, ticket: int, work: Work) -> bool:
        """A slice of a work, which is open until it is answered; whether it waits for something."""
        try:
            is_waiting = next(work)
        except StopIteration as end:
            found = ((), end.value) if isinstance(end.value, bytes) else (end.value,)
            self._channel.send(TELL, encode_message(RankAnswer(ticket, None, *found)))
            return False
        except HeadraceError as error:
            self._answer(ticket, error)
            return False
        except FAULTS as fault:
            if is_of_lost_device(fault):
                raise
            logger.exception("what rank 0 asked for failed")
            self._answer(ticket, InternalError(describe(fault)))
            return False
        self._open.append((ticket, work))
        return is_waiting

    def _answer(self, ticket: int, error: HeadraceError) -> None:
        self._channel.send(TELL, encode_message(RankAnswer(ticket, error.info())))
