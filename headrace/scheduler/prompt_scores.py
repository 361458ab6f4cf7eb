"""Prompt log-probabilities of one request as they come in, chunk by chunk. Owns which positions are known."""

from __future__ import annotations

import numpy as np

from headrace.types.plan import PositionLogprobs, PromptLogprobs
from headrace.types.request import TokenExtras


def position_extras(values: PositionLogprobs, index: int) -> TokenExtras:
    """The further log-probabilities of one position, as they travel in a `Delta`."""
    return TokenExtras(
        np.asarray(values.top_ids[index], dtype="<i4").tobytes(),
        np.asarray(values.top_logprobs[index], dtype="<f4").tobytes(),
        np.asarray(values.asked_logprobs[index], dtype="<f4").tobytes(),
    )


class PromptScores:
    """Values of prompt positions `start`.. of a prompt of `num_prompt` tokens; position 0 never has one.

    `next_position` is the first that is still to be scored; `num_prompt` when all are.
    """

    def __init__(self, start: int, num_prompt: int, *, wants_extras: bool) -> None:
        self.start = start
        self.num_prompt = num_prompt
        self._wants_extras = wants_extras
        self.reset()

    def reset(self) -> None:
        """Forget every value, to score again."""
        self.next_position = max(self.start, 1)
        self._logprobs = np.full(self.num_prompt - self.start, np.nan, dtype=np.float32)
        self._extras = [TokenExtras()] * len(self._logprobs) if self._wants_extras else []

    @property
    def is_complete(self) -> bool:
        """True when no position is left to score."""
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
        if self._wants_extras and scored.extras is not None:
            for position in range(first, end):
                self._extras[position - self.start] = position_extras(scored.extras, position - scored.first)
        self.next_position = max(self.next_position, end)

    def pack(self) -> tuple[bytes, tuple[TokenExtras, ...]]:
        """The values for a `Delta`: float32 bytes, NaN where a position has none, and extras if they were asked."""
        return self._logprobs.astype("<f4").tobytes(), tuple(self._extras)
