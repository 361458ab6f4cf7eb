"""A tiny deterministic model whose every KV entry remembers the weights it was computed by.

A position's KV depends on the weights, on its token, and on all KV before it; a next token and its log-probability
depend on the weights and on all KV before them. So one entry of the wrong weights, or of another sequence, changes
every value after it, and `Scorer` can score anything again from the tokens and the weights alone.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Collection, Generator, Sequence
from pathlib import Path

import numpy as np

from headrace.core.executor import CheckpointSlices, WeightGroup, Weights
from headrace.core.fake_executor import FreeWeights
from headrace.core.faults import StepError
from headrace.types.errors import CheckpointError, WeightUpdateError
from headrace.types.memory import MemoryTag, Restore
from headrace.types.messages import JoinGroup
from headrace.types.plan import LAST_TOKEN, PromptLogprobs, SamplePatch, SlotInit, StepPlan, StepResult
from headrace.weights.memory import Ticket

PAGE_SIZE = 4
_BITS = 20


def entry(serial: int, token: int, before: Sequence[int]) -> int:
    """The KV of a token computed by the weights numbered `serial` over the entries before it."""
    return hash((serial, token, *before))


def logprob(serial: int, entries: Sequence[int], token: int) -> float:
    """Of a token after these entries, exact in float32."""
    return -(hash((serial, token, *entries)) % (1 << _BITS)) / (1 << (_BITS - 3))


def sampled(serial: int, entries: Sequence[int], seed: int, vocab_size: int) -> int:
    """The token drawn after these entries, never 0."""
    return 1 + hash((serial, seed, *entries)) % (vocab_size - 1)


class Scorer:
    """Scores one sequence from its tokens alone; `serials` say which weights computed each KV entry."""

    def __init__(self, tokens: Sequence[int], serials: Sequence[int]) -> None:
        self._tokens = tokens
        self._entries: list[int] = []
        for token, serial in zip(tokens, serials, strict=False):
            self._entries.append(entry(serial, token, self._entries))

    def logprob(self, position: int, serial: int) -> float:
        """Of the token at `position`, by the weights numbered `serial`."""
        return logprob(serial, self._entries[:position], self._tokens[position])


class CountingWeights(FreeWeights):
    """Weights that are a number: how many updates there have been."""

    def __init__(self) -> None:
        self.serial = 0
        self.has_values = True

    def commit(self) -> Ticket:
        self.serial += 1
        self.has_values = True
        return super().commit()


class _Slot:
    def __init__(self, init: SlotInit) -> None:
        self.init = init
        self.tokens = init.token_ids.tolist()
        self.pages: list[int] = []


class RememberingExecutor:
    """Executes each plan when it is submitted. Some steps fail at random.

    `entered` has, by seed, the numbers of tokens known each time a sequence entered a slot. No KV that is older than
    `floor` may be attended to.
    """

    def __init__(self, vocab_size: int, num_pages: int, chance: random.Random, failure_rate: float) -> None:
        self.counting = CountingWeights()
        self.weights: Weights = self.counting
        self.entered: dict[int, list[int]] = {}
        self.floor = 0
        self.released: set[MemoryTag] = set()
        self._vocab_size = vocab_size
        self._chance = chance
        self._failure_rate = failure_rate
        self._slots: dict[int, _Slot] = {}
        self._kv: list[tuple[int, int]] = [(-1, 0)] * (num_pages * PAGE_SIZE)
        self._results: deque[StepResult | StepError] = deque()

    def submit(self, plan: StepPlan) -> None:
        lacking = self.released - {"cuda_graph"}
        assert not lacking and self.counting.has_values, f"a step runs without {lacking or 'weights'}"
        if any(isinstance(result, StepError) for result in self._results):
            self._results.append(StepError(plan.step_id, RuntimeError("a step before it failed")))
        elif self._chance.random() < self._failure_rate:
            self._results.append(StepError(plan.step_id, MemoryError("no room")))
        else:
            self._results.append(self._execute(plan))

    def sample(self, step_id: int, patch: SamplePatch | None = None) -> None:
        """No plan waits for it."""

    def collect(self) -> StepResult:
        result = self._results.popleft()
        if isinstance(result, StepError):
            raise result
        return result

    def examine(self, fault: BaseException) -> None:
        """No fault is the device's."""

    def counters(self) -> dict[str, float]:
        return {}

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        raise CheckpointError(f"{folder}: this executor has no weights", field="path")

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        """What it remembers is forgotten with its memory."""
        assert not self._results, "memory is released under a step"
        yield
        self.released.update(tags)
        if "kv_cache" in tags:
            self._kv = [(-1, 0)] * len(self._kv)
        if "weights" in tags:
            self.counting.has_values = False

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        yield
        self.released.difference_update(tags)
        if "weights" in tags:
            self.counting.has_values = restore != "await"

    def attend(self) -> float:
        return math.inf

    def join_group(self, terms: JoinGroup, seconds: float) -> WeightGroup:
        raise WeightUpdateError("this executor has no weights", field="group_name")

    def close(self) -> None:
        self._results.clear()

    def _execute(self, plan: StepPlan) -> StepResult:
        for init in plan.new_slots:
            self._slots[init.slot] = _Slot(init)
            self.entered.setdefault(init.seed, []).append(len(init.token_ids))
        for slot, column, page in zip(plan.page_slots, plan.page_columns, plan.page_ids, strict=True):
            assert column == len(self._slots[slot].pages)
            self._slots[slot].pages.append(int(page))
        rows = list(zip(plan.row_slots.tolist(), plan.row_starts.tolist(), plan.row_lengths.tolist(), strict=True))
        offset = 0
        for slot, start, length in rows:
            self._write(self._slots[slot], start, plan.token_ids[offset : offset + length].tolist())
            offset += length
        tokens: list[int] = []
        logprobs: list[float] = []
        scored: dict[int, PromptLogprobs] = {}
        for row, (slot_id, start, length) in enumerate(rows):
            slot, end = self._slots[slot_id], start + length
            entries = self._read(slot, end)
            first = slot.init.logprobs.prompt_start
            if first is not None:
                positions = range(max(start + 1, first), min(end + 1, slot.init.num_prompt_tokens))
                values = [logprob(self.counting.serial, entries[:at], slot.tokens[at]) for at in positions]
                if values:
                    scored[row] = PromptLogprobs(positions.start, np.array(values, np.float32))
            if plan.row_samples[row]:
                tokens.append(sampled(self.counting.serial, entries, slot.init.seed, self._vocab_size))
                logprobs.append(logprob(self.counting.serial, entries, tokens[-1]))
                slot.tokens[end:] = [tokens[-1]]
        return StepResult(
            plan.step_id,
            np.array(tokens, np.int32).reshape(-1, 1),
            np.array(logprobs, np.float32).reshape(-1, 1),
            np.ones(len(tokens), np.int32),
            prompt_logprobs=scored,
        )

    def _write(self, slot: _Slot, start: int, token_ids: list[int]) -> None:
        entries = self._read(slot, start)
        for position, token in enumerate(token_ids, start):
            token = slot.tokens[position] if token == LAST_TOKEN else token
            entries.append(entry(self.counting.serial, token, entries))
            self._kv[self._cell(slot, position)] = self.counting.serial, entries[-1]

    def _read(self, slot: _Slot, end: int) -> list[int]:
        found = [self._kv[self._cell(slot, position)] for position in range(end)]
        assert all(serial >= self.floor for serial, _ in found), "KV was kept that was to be computed again"
        return [value for _, value in found]

    @staticmethod
    def _cell(slot: _Slot, position: int) -> int:
        return slot.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
