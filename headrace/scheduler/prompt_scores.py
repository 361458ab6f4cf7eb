"""Prompt log-probabilities of one request as they come in, chunk by chunk. Owns which positions are known."""

from __future__ import annotations

import numpy as np

from headrace.scheduler.position_extras import PositionExtras
from headrace.types.plan import PromptLogprobs
from headrace.types.request import TokenExtras
from headrace.types.sampling_params import LogprobOptions


class PromptScores:
    """Values of prompt positions `start`.. of a prompt of `num_prompt` tokens; position 0 never has one.

    `next_position` is the first that is still to be scored; `num_prompt` when all are. `options` say what else is kept
    of each position.
    """

    def __init__(self, start: int, num_prompt: int, options: LogprobOptions) -> None:
        self.start = start
        self.num_prompt = num_prompt
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Forget every value, to score again."""
        self.next_position = max(self.start, 1)
        self._logprobs = np.full(self.num_prompt - self.start, np.nan, dtype=np.float32)
        self._extras = PositionExtras(self._options) if self._options.wants_extras else None

    @property
    def is_complete(self) -> bool:
        return self.next_position >= self.num_prompt

    @property
    def has_any(self) -> bool:
        """True when at least one position was scored, or none ever can be."""
        return self.is_complete or self.next_position > max(self.start, 1)

    def add(self, scored: PromptLogprobs) -> None:
        """Take the values of positions `scored.first`..; those before `start` are ignored."""
        end = scored.first + len(scored.logprobs)
        assert scored.first <= self.next_position, "prompt positions were skipped"
        first = max(self.start, scored.first)
        skip = first - scored.first
        self._logprobs[first - self.start : end - self.start] = scored.logprobs[skip:]
        if self._extras is not None and scored.extras is not None and first < end:
            self._extras.write(first - self.start, scored.extras, skip, end - scored.first)
        self.next_position = max(self.next_position, end)

    def pack(self) -> tuple[bytes, TokenExtras]:
        """The values for a `Delta`: float32 bytes, NaN where a position has none, and extras if they were asked."""
        extras = TokenExtras() if self._extras is None else self._extras.pack(0, len(self._logprobs))
        return self._logprobs.astype("<f4").tobytes(), extras
