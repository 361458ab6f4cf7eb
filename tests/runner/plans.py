"""Fabricates step plans without a scheduler: deterministic, with pages leased in shuffled order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headrace.types.plan import LAST_TOKEN, SlotInit, StepPlan
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions


@dataclass
class Sequence:
    """One sequence in its slot: tokens known (LAST_TOKEN where only the device knows), tokens computed, pages held."""

    slot: int
    tokens: list[int]
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)


class PlanBuilder:
    """Keeps what a scheduler would: slots, pages, and how far each sequence is."""

    def __init__(self, *, page_size: int, num_pages: int, seed: int = 0) -> None:
        self.page_size = page_size
        self._free = [int(page) for page in np.random.default_rng(seed).permutation(np.arange(1, num_pages))]
        self._sequences: dict[int, Sequence] = {}
        self._new: list[SlotInit] = []
        self._writes: list[tuple[int, int, int]] = []
        self._step_id = 0

    def enter(
        self,
        slot: int,
        tokens: list[int],
        *,
        share: tuple[int, int] | None = None,
        sampling: TokenSampling = TokenSampling(),  # noqa: B008
        logprobs: LogprobOptions = LogprobOptions(),  # noqa: B008
        seed: int = 0,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """A sequence enters a slot. `share` = (other slot, n): its first n tokens use the other's pages."""
        sequence = Sequence(slot, list(tokens))
        if share is not None:
            other, num_shared = share
            assert num_shared % self.page_size == 0 and num_shared < len(tokens)
            for column, page in enumerate(self._sequences[other].pages[: num_shared // self.page_size]):
                sequence.pages.append(page)
                self._writes.append((slot, column, page))
            sequence.num_computed = num_shared
        self._sequences[slot] = sequence
        num_prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        ids = np.array(tokens, dtype=np.int32)
        self._new.append(SlotInit(slot, seed, num_prompt, ids, sampling, logprobs, (), 0))

    def remaining(self, slot: int) -> int:
        """Known tokens not computed yet."""
        sequence = self._sequences[slot]
        return len(sequence.tokens) - sequence.num_computed

    def append(self, slot: int, token: int = LAST_TOKEN) -> None:
        """One more known token, or the one the slot sampled last."""
        self._sequences[slot].tokens.append(token)

    def step(self, rows: list[tuple[int, int]]) -> StepPlan:
        """A plan that gives each slot of `rows` that many tokens, in this order."""
        token_ids: list[int] = []
        starts, samples = [], []
        for slot, length in rows:
            sequence = self._sequences[slot]
            starts.append(sequence.num_computed)
            token_ids += sequence.tokens[sequence.num_computed : sequence.num_computed + length]
            sequence.num_computed += length
            samples.append(sequence.num_computed == len(sequence.tokens))
            while len(sequence.pages) * self.page_size < sequence.num_computed:
                self._writes.append((slot, len(sequence.pages), self._free.pop()))
                sequence.pages.append(self._writes[-1][2])
        writes = _int32(self._writes).reshape(-1, 3)
        plan = StepPlan(
            self._step_id, 0, tuple(self._new), writes[:, 0], writes[:, 1], writes[:, 2],
            _int32([slot for slot, _ in rows]), _int32(starts), _int32([length for _, length in rows]),
            _int32(token_ids), np.array(samples, dtype=np.bool_), np.zeros((0, 3), np.int32),
        )  # fmt: skip
        self._new, self._writes, self._step_id = [], [], self._step_id + 1
        return plan


def _int32(values: object) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)
