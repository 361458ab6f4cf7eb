"""The scheduler of one replica: requests in, `StepPlan`s out, `StepResult`s in, `Delta`s out.

Owns the steps in flight and the weight version and epoch that new steps bear; delegates who runs to the roster, what a
step holds to the planner, and what came of it to the applier. Every method runs between steps on one thread. It knows
neither tensors nor text, and never reads a clock.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from headrace.scheduler.applier import InFlight, ResultApplier
from headrace.scheduler.counters import Counters
from headrace.scheduler.fault_isolation import FaultIsolation
from headrace.scheduler.limits import SchedulerLimits, read_prompt
from headrace.scheduler.planner import StepPlanner
from headrace.scheduler.roster import Roster
from headrace.scheduler.sequence import Sequence, State
from headrace.types.errors import ErrorInfo, InternalError, RequestError, UnavailableError
from headrace.types.plan import StepPlan, StepResult
from headrace.types.request import Delta, Finish, Request

logger = logging.getLogger(__name__)

BREACHES = (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, Warning)
"""What `plan` and `apply` may raise when the scheduler's books are wrong: always our own bug."""


class Scheduler:
    """Continuous batching over a paged KV pool. Every accepted request gets exactly one terminal delta, unless the
    front discards it."""

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        version: str = "default",
        epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` is looked at when a sequence starts, and when it has its first token."""
        self.limits = limits
        self._clock = clock
        self.version = version
        self.epoch = epoch
        self._version_index = 0
        self._last_added: Request | None = None
        self._num_plans = 0
        self._counters = Counters()
        self._in_flight: deque[InFlight] = deque()
        self._interrupted: tuple[InFlight, list[Delta]] | None = None
        self._isolation = FaultIsolation()
        self._keep_books(Roster(limits))

    @property
    def num_in_flight(self) -> int:
        """Plans issued whose result was not applied yet."""
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot and will get more rows."""
        return self._roster.num_running

    @property
    def num_waiting(self) -> int:
        """Live sequences that hold none: never started, or preempted."""
        return len(self._roster.by_handle) - self._roster.num_running

    @property
    def num_live(self) -> int:
        """Sequences that have not had their answer: running or waiting."""
        return len(self._roster.by_handle)

    @property
    def num_started(self) -> int:
        """Live sequences that have held a slot: running or preempted."""
        return self._roster.num_started

    @property
    def num_used_tokens(self) -> int:
        """KV capacity, in tokens, of the pages that are neither free nor reclaimable."""
        return self._roster.leases.num_used * self.limits.page_size

    def add(self, request: Request, now: float) -> None:
        """Queue a request that arrived at `now` (seconds, any clock that never goes back).

        Raises `RequestError` naming the field if it can never run, `UnavailableError` if the queue is full.
        """
        if request.handle in self._roster.by_handle:
            raise RequestError(f"handle {request.handle} is in use", field="handle")
        if len(self._roster.waiting) >= self.limits.max_waiting_requests:
            raise UnavailableError(f"{len(self._roster.waiting)} requests are waiting already")
        prompt = read_prompt(request, self.limits, self._last_added)
        self._last_added = request
        self._roster.accept(Sequence.of(request, prompt, self.limits, now))

    def abort(self, handles: Iterable[int] | None, message: str) -> list[Delta]:
        """End requests now (None: all); returns their terminal deltas with all tokens not delivered yet. Unknown
        handles are ignored: they have had their answer."""
        deltas = self._end(handles, Finish("abort", message=message))
        self._counters.num_aborted += len(deltas)
        return deltas

    def fail(self, handles: Iterable[int] | None, error: ErrorInfo) -> list[Delta]:
        """As `abort`, with finish type "error"."""
        deltas = self._end(handles, Finish("error", message=error.message, error=error))
        self._counters.num_failed += len(deltas)
        return deltas

    def discard(self, handles: Iterable[int]) -> None:
        """Free requests that the front ended itself; there is no delta. Unknown handles are ignored."""
        for sequence in self._find(handles):
            self._counters.num_finished += 1
            try:
                self._roster.end(sequence)
            except BREACHES as breach:
                self._note(breach)
                self._roster.forget(sequence)
                self._restart()

    def expire(self, arrived_before: float, error: ErrorInfo) -> list[Delta]:
        """Fail the requests that arrived before that moment and never started."""
        old = self._roster.waiting.arrived_before(arrived_before)
        return self.fail([sequence.handle for sequence in old], error)

    def plan(self, *, admit_new: bool = True) -> StepPlan | None:
        """The next step, or None when there is nothing to do until a result or a request comes.

        `admit_new=False` serves only sequences that have started. The plan is in flight from here on: it must be
        executed, in order, and its result applied. After one of BREACHES call `recover`.
        """
        if len(self._in_flight) > self.limits.overlap_depth:
            return None
        if self._isolation.is_active:
            if self._in_flight:
                return None  # suspects run one step at a time
            self._roster.isolated = self._isolation.isolated()
        planned = self._planner.plan(self._num_plans, self.epoch, admit_new=admit_new)
        if planned is None:
            return None
        plan, rows, moves = planned
        self._num_plans += 1
        self._in_flight.append(InFlight(plan.step_id, self.version, self._version_index, self.epoch, rows, moves))
        return plan

    def apply(self, result: StepResult) -> list[Delta]:
        """Take in the result of the oldest plan in flight; returns the deltas it makes due.

        After one of BREACHES call `recover`.
        """
        step = self._in_flight.popleft()
        deltas: list[Delta] = []
        self._interrupted = step, deltas
        assert step.step_id == result.step_id, f"result {result.step_id} came for step {step.step_id}"
        cleared = self._sampling(step) if self._isolation.is_active else []
        self._applier.apply(step, result, deltas)
        if cleared:
            self._clear(cleared)
        self._interrupted = None
        return deltas

    def lose_step(self, cause: ErrorInfo, *, is_blamed: bool = True) -> list[Delta]:
        """The oldest plan in flight was not executed, and no result of those after it may be used: they built on it.

        Nothing that any of them computed or published is believed: everybody goes on from the tokens he has. Those who
        had a row in the plan run isolated from the others until it is known whose fault it was, if anybody's: his
        terminal delta, an error, is returned then. Without `is_blamed` nobody is suspected.
        """
        self._counters.num_failed_steps += 1
        step = self._in_flight[0]
        suspects = self._live_rows(step)
        self._restart()
        return self._narrow(suspects, cause, is_alone=len(step.rows.slots) == 1) if is_blamed else []

    def recover(self, breach: BaseException) -> list[Delta]:
        """`plan` or `apply` raised one of BREACHES: make new books from the tokens that everybody has.

        An interrupted `apply` ends the sequences of its step, whose tokens are in doubt. An interrupted `plan` puts
        those it served under suspicion. Returns the deltas due, those of the interrupted `apply` included; no plan is
        in flight afterwards.
        """
        cause = self._note(breach)
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is None:
            suspects = self._isolation.isolated()
            self._restart()
            first = self._roster.waiting.first()
            suspects = suspects or self._roster.preempted + ([first] if first is not None else [])
            return self._narrow(suspects, cause, is_alone=len(suspects) == 1)
        step, deltas = interrupted
        answered = {delta.handle for delta in deltas if delta.finish is not None}
        for sequence in self._live_rows(step):
            self._roster.forget(sequence)
            if sequence.handle not in answered:
                deltas.append(_error_delta(sequence, cause))
                self._counters.num_failed += 1
        self._restart()
        return deltas

    def set_weights(self, version: str, epoch: int) -> None:
        """Steps from now on run under other weights: tokens bear `version`, and no prefix of an older epoch matches.

        Only with no plan in flight; `epoch` must grow. Sequences still running keep their KV, which is never published,
        but those that sampled nothing since they entered their slot: they have nothing to keep, only part of what they
        know computed, and are computed again. So a prompt and its scores are always of one set of weights.
        """
        assert not self._in_flight, "weights change only with no step in flight"
        assert epoch > self.epoch, "an epoch is never used twice"
        table = self._roster.table
        for slot in self._roster.order().tolist():
            self._roster.leases.never_publish(slot)
            if table.num_known[slot] == table.num_entered[slot]:
                self._roster.preempt(slot)
        self._roster.drop_kept()
        for sequence in self._roster.by_handle.values():  # some may have been preempted before
            if sequence.state is State.PREEMPTED and len(sequence.token_ids) == sequence.num_prompt:
                sequence.start_again()
        self.version = version
        self.epoch = epoch
        self._version_index += 1

    def relabel(self, version: str) -> None:
        """Steps from now on bear another label for the same weights."""
        if version != self.version:
            self.version = version
            self._version_index += 1

    def recompute_running(self) -> None:
        """Running sequences drop their KV, keep their tokens, and are admitted again before any new one. After
        `set_weights` nothing of the old KV can match, so all of it is rebuilt."""
        for slot in self._roster.order().tolist():
            self._roster.preempt(slot)

    def flush_cache(self) -> int:
        """Free all unreferenced cached pages and unpublish the rest; returns the pages freed."""
        return self._roster.flush_cache()

    def metrics(self) -> dict[str, float]:
        """Counters since start, and gauges of now. free + used + cached pages = all but page 0."""
        leases = self._roster.leases
        counters: dict[str, float] = msgspec.structs.asdict(self._counters)
        if (offload := leases.offload) is not None:
            counters |= {
                "num_host_pages": offload.tier.num_held,
                "num_pages_saved": offload.num_saved,
                "num_pages_loaded": offload.num_loaded,
            }
        return counters | {
            "num_preemptions": self._roster.num_preemptions,
            "num_evicted_pages": leases.num_evicted_pages,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "num_free_pages": leases.pool.num_free,
            "num_cached_pages": leases.tree.num_evictable,
            "num_published_pages": leases.tree.num_pages,
            "num_prefix_nodes": leases.tree.num_nodes,
            "num_used_tokens": self.num_used_tokens,
            "max_total_num_tokens": self.limits.max_total_num_tokens,
        }

    def _find(self, handles: Iterable[int] | None) -> list[Sequence]:
        live = self._roster.by_handle
        if handles is None:
            return list(live.values())
        return [live[handle] for handle in dict.fromkeys(handles) if handle in live]

    def _end(self, handles: Iterable[int] | None, finish: Finish) -> list[Delta]:
        """Terminal deltas. A sequence that breaks the books while it ends keeps nobody else from his answer."""
        deltas: list[Delta] = []
        for sequence in self._find(handles):
            try:
                self._applier.finish(sequence, finish, deltas)
            except BREACHES as breach:
                cause = self._note(breach)
                if not deltas or deltas[-1].handle != sequence.handle:
                    deltas.append(_error_delta(sequence, cause))
                self._roster.forget(sequence)
                self._restart()
        return deltas

    def _live_rows(self, step: InFlight) -> list[Sequence]:
        """The sequences with a row in a step that have not been answered."""
        holders = map(self._roster.table.sequences.__getitem__, step.rows.slots.tolist())
        return [holder for holder in holders if holder is not None and holder.state is not State.ENDED]

    def _sampling(self, step: InFlight) -> list[Sequence]:
        """The sequences that a step takes to the end of their known tokens."""
        return list(map(self._roster.table.sequence, step.rows.slots[step.rows.samples].tolist()))

    def _clear(self, cleared: list[Sequence]) -> None:
        """These are suspects no longer. They make room for the others until the last is cleared."""
        self._isolation.clear(cleared)
        self._roster.isolated = self._isolation.isolated()
        if self._roster.isolated:
            for sequence in cleared:
                if sequence.state is State.RUNNING:
                    self._roster.preempt(sequence.slot)

    def _narrow(self, suspects: list[Sequence], cause: ErrorInfo, *, is_alone: bool) -> list[Delta]:
        culprit = self._isolation.narrow(suspects, is_alone=is_alone)
        if culprit is None:
            return []
        self._counters.num_isolated_failures += 1
        error = InternalError(f"steps fail with this request, with no other in them too: {cause.message}")
        return self.fail([culprit.handle], error.info())

    def _note(self, breach: BaseException) -> ErrorInfo:
        """Report a breach; returns it as an error."""
        self._counters.num_invariant_breaches += 1
        logger.error("an invariant of the scheduler is broken; it goes on with new books", exc_info=breach)
        return InternalError(f"an invariant of the scheduler is broken: {type(breach).__name__}: {breach}").info()

    def _restart(self) -> None:
        """New books: nothing is in flight or cached, and every sequence is computed again from the tokens it has."""
        self._in_flight.clear()
        self._keep_books(self._roster.rebuilt())

    def _keep_books(self, roster: Roster) -> None:
        self._roster = roster
        self._planner = StepPlanner(roster, self.limits, self._counters, self._clock)
        self._applier = ResultApplier(roster, self._counters, self._clock)


def _error_delta(sequence: Sequence, error: ErrorInfo) -> Delta:
    """The terminal delta of a sequence whose tokens are in doubt: it brings none."""
    return Delta(
        sequence.handle,
        finish=Finish("error", message=error.message, error=error),
        num_cached_tokens=sequence.num_cached_tokens,
        num_preemptions=sequence.num_preemptions,
    )
