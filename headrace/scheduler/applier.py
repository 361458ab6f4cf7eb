"""Takes the result of a step into the sequences, and says what is new about each as a `Delta`.

Owns the token-level end of a request: stop ids and length. Tokens sampled for a sequence that has had its answer are
dropped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from headrace.cache.offload import StepMoves
from headrace.scheduler.counters import Counters
from headrace.scheduler.plan_builder import Rows
from headrace.scheduler.prompt_scores import PromptScores
from headrace.scheduler.roster import Roster
from headrace.scheduler.running_table import BoolArray, IndexArray, RunningTable
from headrace.scheduler.sequence import Sequence
from headrace.types.errors import NonFiniteError, RequestError
from headrace.types.plan import StepResult
from headrace.types.request import Delta, Finish, Int32Array, RoutedPart, TokenExtras

_NOT_FINITE = NonFiniteError("the model's logits for this request are NaN or infinite: its weights or a sum overflowed")


class InFlight(NamedTuple):
    """A plan that was issued and whose result has not come, with the version its tokens will bear."""

    step_id: int
    version: str
    version_index: int
    epoch: int
    rows: Rows
    moves: StepMoves | None = None


class ResultApplier:
    """Applies results, in plan order, to the sequences of a roster."""

    def __init__(self, roster: Roster, counters: Counters, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._clock = clock
        self._counters = counters
        self._brought_several = False

    def apply(self, step: InFlight, result: StepResult, deltas: list[Delta]) -> None:
        """Take in one result, and append the deltas it makes due, terminal ones included, in row order."""
        table, slots = self._roster.table, step.rows.slots
        if step.moves is not None:
            offload = self._roster.leases.offload
            assert offload is not None, "pages moved without a place to go"
            offload.land(step.moves)
        table.num_in_flight[slots] -= 1  # this step was the last to hold those back that are leaving
        leaving = ~table.is_running[slots] & (table.num_in_flight[slots] == 0)
        sampled = slots[step.rows.samples]
        assert len(sampled) == len(result.token_ids), "a result has a token for each sampling row"
        are_finite = math.isfinite(np.vdot(result.logprobs, result.logprobs))  # a sum with what is not finite is not
        if not are_finite or result.prompt_logprobs:
            self._end_nonfinite(step, sampled, result, deltas)
        if result.prompt_logprobs:
            self._take_prompt_scores(step, result)
        if result.routed:
            self._take_routed(step, result)
        if len(sampled):
            self._take_tokens(step, sampled, result, deltas)
            self._deliver_due(sampled, deltas)
        if len(sampled) < len(slots):
            self._finish_scored(step, slots[~step.rows.samples], deltas)
        if leaving.any():
            self._roster.retire(slots[leaving].tolist())

    def delta(self, sequence: Sequence, finish: Finish | None = None) -> Delta:
        """What is new about a sequence since its last delta, which counts as delivered from now on."""
        table, slot = self._roster.table, sequence.slot
        num_prompt, first = sequence.num_prompt, sequence.num_prompt + sequence.num_delivered
        if slot >= 0:
            first, known = int(table.num_delivered[slot]), int(table.num_known[slot])
            token_ids, logprobs = table.token_ids[slot, first:known], table.logprobs[slot, first:known]
            table.num_delivered[slot] = known
        else:
            known = len(sequence.token_ids)
            token_ids, logprobs = sequence.token_ids[first:], sequence.logprobs[sequence.num_delivered :]
            sequence.num_delivered = known - num_prompt
        prompt_logprobs, prompt_extras = b"", TokenExtras()
        if sequence.prompt_scores is not None and not sequence.is_prompt_delivered:
            prompt_logprobs, prompt_extras = self._prompt_part(sequence, sequence.prompt_scores, finish)
        routed = RoutedPart()
        if sequence.routed is not None and (known > num_prompt or finish is not None):
            routed = sequence.routed.take(known - 1)  # the last token is not computed
        first, last = first - num_prompt, known - num_prompt
        spans, span_epochs = sequence.spans(first, last)
        return Delta(
            handle=sequence.handle,
            token_ids=token_ids.astype("<i4", copy=False).tobytes(),
            logprobs=logprobs.astype("<f4", copy=False).tobytes(),
            spans=spans,
            finish=finish,
            num_cached_tokens=sequence.num_cached_tokens,
            num_preemptions=sequence.num_preemptions,
            extras=TokenExtras() if sequence.extras is None else sequence.extras.pack(first, last),
            prompt_logprobs=prompt_logprobs,
            prompt_extras=prompt_extras,
            span_epochs=span_epochs,
            prompt_spans=tuple(sequence.prompt_spans) if prompt_logprobs or finish is not None else (),
            times=(sequence.started, sequence.first_token) if finish is not None or not first else (),
            routed=routed,
        )

    def finish(self, sequence: Sequence, finish: Finish, deltas: list[Delta]) -> None:
        """End a sequence, after appending its terminal delta."""
        deltas.append(self.delta(sequence, finish))
        self._roster.end(sequence)

    def _end_nonfinite(self, step: InFlight, sampled: IndexArray, result: StepResult, deltas: list[Delta]) -> None:
        """End the sequences for which this step computed no numbers, before it adds anything to them.

        A sampled token has a finite log-probability; one of a prompt may be -inf, where the distribution that was asked
        for excludes it. What they left in the cache may be no number either: nobody shall find it.
        """
        scored = result.prompt_logprobs.items()
        slots = [int(step.rows.slots[row]) for row, scores in scored if np.isnan(scores.logprobs).any()]
        is_token = np.arange(result.logprobs.shape[1]) < result.num_tokens[:, None]
        slots += sampled[(is_token & ~np.isfinite(result.logprobs)).any(axis=1)].tolist()
        table = self._roster.table
        ending = [slot for slot in dict.fromkeys(slots) if table.accepts[slot]]
        if not ending:
            return
        error = _NOT_FINITE.info()
        for slot in ending:
            self._counters.num_nonfinite += 1
            self._counters.num_failed += 1
            self.finish(table.sequence(slot), Finish("error", message=error.message, error=error), deltas)
        self._roster.flush_cache()

    @staticmethod
    def _prompt_part(sequence: Sequence, scores: PromptScores, finish: Finish | None) -> tuple[bytes, TokenExtras]:
        """Prompt log-probabilities, once: when all are known, or as they are when the request ends early."""
        if not scores.is_complete and (finish is None or not scores.has_any):
            return b"", TokenExtras()
        sequence.is_prompt_delivered = True
        return scores.pack()

    def _take_prompt_scores(self, step: InFlight, result: StepResult) -> None:
        for row, scored in result.prompt_logprobs.items():
            slot = int(step.rows.slots[row])
            if self._roster.table.accepts[slot]:
                sequence = self._roster.table.sequence(slot)
                scores = sequence.prompt_scores
                assert scores is not None, "a row was scored that did not ask for it"
                scores.add(scored)
                sequence.mark_prompt(scores.next_position, step.version)

    def _take_routed(self, step: InFlight, result: StepResult) -> None:
        table = self._roster.table
        for row, routed in result.routed.items():
            slot = int(step.rows.slots[row])
            if table.accepts[slot]:
                sequence = table.sequence(slot)
                assert sequence.routed is not None, "a row was told its experts that did not ask"
                sequence.routed.add(routed, replaces=int(table.num_known[slot]) == sequence.num_prompt)

    def _take_tokens(self, step: InFlight, slots: IndexArray, result: StepResult, deltas: list[Delta]) -> None:
        """Accept up to k tokens per row, column by column, so that a token after the end of its sequence is dropped.

        So is a token of a position that is known: a step before brought several, and this one was issued before that.
        """
        table, width = self._roster.table, result.token_ids.shape[1]
        self._brought_several |= width > 1
        positions = table.num_known[slots]
        if self._brought_several:  # else a sequence that takes a token knows those before it, and no more
            positions = (step.rows.starts + step.rows.lengths)[step.rows.samples]
        for column in range(width):
            has_token = result.num_tokens > column
            takes = has_token & table.accepts[slots]
            if self._brought_several:
                takes &= positions >= table.num_known[slots]
            rows: BoolArray | slice = slice(None)
            if not takes.all():
                rows = takes
                self._counters.num_overshoot_tokens += int(np.count_nonzero(has_token) - np.count_nonzero(takes))
                if column == 0:
                    self._start_over(slots[~has_token & (positions == table.num_known[slots])])
            self._take_column(step, result, column, rows, slots[rows], positions[rows], deltas)
            positions = positions + 1
        if width > 1:  # those that no step in flight was issued for have no KV: the next one computes them as known
            table.num_expected[slots] = np.maximum(table.num_expected[slots], table.num_known[slots])

    def _start_over(self, slots: IndexArray) -> None:
        """A step brought no token where the next one was due: what steps in flight compute behind it is void, and its
        sequence goes on from the tokens it has, in another slot."""
        table = self._roster.table
        table.accepts[slots] = False
        for slot in slots[table.is_running[slots]].tolist():
            self._roster.preempt(slot)

    def _take_column(
        self,
        step: InFlight,
        result: StepResult,
        column: int,
        rows: BoolArray | slice,
        slots: IndexArray,
        positions: IndexArray,
        deltas: list[Delta],
    ) -> None:
        """Accept one token of each of these rows, and append the terminal deltas of those that end with it."""
        table = self._roster.table
        token_ids = result.token_ids[rows, column]
        self._mark_version(step, slots, positions)
        table.token_ids[slots, positions] = token_ids
        table.logprobs[slots, positions] = result.logprobs[rows, column]
        table.num_known[slots] = positions + 1
        self._counters.num_generated_tokens += len(slots)
        if result.extras:
            self._end_overfull(self._take_extras(step, result, column, rows), deltas)
        stopped = _find_stops(table, slots, positions, token_ids)
        is_last = stopped | (positions + 1 >= table.max_length[slots])
        ended = np.flatnonzero(is_last & table.accepts[slots] if result.extras else is_last)
        self._counters.num_finished += len(ended)
        for index in ended.tolist():
            finish = Finish("stop", int(token_ids[index])) if stopped[index] else Finish("length")
            self.finish(table.sequence(int(slots[index])), finish, deltas)

    def _mark_version(self, step: InFlight, slots: IndexArray, positions: IndexArray) -> None:
        """Open a span in the sequences whose last token was of another version."""
        table = self._roster.table
        changed = np.flatnonzero(table.version[slots] != step.version_index)
        for index in changed.tolist():
            sequence = table.sequence(int(slots[index]))
            num_output = int(positions[index]) - sequence.num_prompt
            sequence.version_index = step.version_index
            sequence.version_starts.append((num_output, step.version, step.epoch))
            if num_output == 0:
                sequence.first_token = self._clock()
                if sequence.prompt_scores is not None:
                    sequence.mark_prompt(sequence.num_prompt, step.version)
        if len(changed):
            table.version[slots[changed]] = step.version_index

    def _take_extras(self, step: InFlight, result: StepResult, column: int, rows: BoolArray | slice) -> list[Sequence]:
        """Take what else was asked of the tokens just taken. Returns the sequences with more kept ids than they may
        have."""
        table, overfull = self._roster.table, list[Sequence]()
        taking = set(np.flatnonzero(step.rows.samples)[rows].tolist())
        for row in taking.intersection(result.extras):
            slot, values = int(step.rows.slots[row]), result.extras[row]
            sequence = table.sequence(slot)
            if sequence.extras is not None:
                token = int(table.num_known[slot]) - sequence.num_prompt - 1  # the one just taken
                sequence.extras.write(token, values, column, column + 1)
                if sequence.extras.num_kept > sequence.request.logprobs.max_kept:
                    overfull.append(sequence)
        return overfull

    def _end_overfull(self, overfull: list[Sequence], deltas: list[Delta]) -> None:
        for sequence in overfull:
            self._counters.num_failed += 1
            error = _too_many_kept(sequence.request.logprobs.max_kept).info()
            self.finish(sequence, Finish("error", message=error.message, error=error), deltas)

    def _deliver_due(self, slots: IndexArray, deltas: list[Delta]) -> None:
        """Non-terminal deltas of the streaming sequences that have enough new tokens."""
        table = self._roster.table
        every = table.deliver_every[slots]
        due = (every > 0) & table.accepts[slots] & (table.num_known[slots] - table.num_delivered[slots] >= every)
        for slot in slots[due].tolist():
            deltas.append(self.delta(table.sequence(slot)))

    def _finish_scored(self, step: InFlight, slots: IndexArray, deltas: list[Delta]) -> None:
        """End the sequences that wanted no token and whose prompt is computed."""
        table = self._roster.table
        is_done = table.accepts[slots] & (table.num_in_flight[slots] == 0)
        is_done &= table.num_scheduled[slots] >= table.compute_length[slots]
        is_done &= table.max_length[slots] == table.num_prompt[slots]
        for slot in slots[is_done].tolist():
            sequence = table.sequence(slot)
            sequence.mark_prompt(sequence.num_prompt, step.version)
            self.finish(sequence, Finish("length"), deltas)
            self._counters.num_finished += 1


def _too_many_kept(most: int) -> RequestError:
    message = (
        f"the tokens that could have been drawn were asked for, and are more than {most}, the most of this sample: "
        "give a lower top_p, a top_k, or fewer samples in a call"
    )
    return RequestError(message, field="sampling_params.top_p")


def _find_stops(table: RunningTable, slots: IndexArray, positions: IndexArray, token_ids: Int32Array) -> BoolArray:
    """Which of these new tokens are stop ids of their sequence, past its minimum length; bool like `slots`."""
    stopped = (table.stop_ids[slots] == token_ids[:, None]).any(axis=1)
    if table.many_stops:
        for index, slot in enumerate(slots.tolist()):
            if slot in table.many_stops and int(token_ids[index]) in table.many_stops[slot]:
                stopped[index] = True
    found: BoolArray = stopped & (positions >= table.min_length[slots])
    return found
