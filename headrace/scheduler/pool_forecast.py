"""Whether the pool will hold those that run, and one more, until they end: a sequence grows by a token a step, so what
is free now is not free later. Owns the forecast of one moment. Knows neither leases nor requests; counts tokens.

The pool is fullest just before an end. So the most that is held with one more sequence is the greatest of what is held
at each end before its own, and at its own: two look-ups in sums over the ends, of which nobody is looked at twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


class PoolForecast:
    """Sequences that hold `held` tokens now and end in `left` steps, int64 [n] each, in `num_tokens` of room."""

    def __init__(self, held: Int64Array, left: Int64Array, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        by_end = np.argsort(left, kind="stable")
        self._held, self._left = held[by_end], left[by_end]
        # `held_after[i]` is what all but the first i ends hold now; `most_at_ends[i]` the most that is held at one of
        # the first i ends, with one more that holds nothing now.
        num = len(left)
        self._held_after = np.append(np.cumsum(self._held[::-1])[::-1], 0)
        at_end = self._held_after[:-1] + np.arange(num + 1, 1, -1) * self._left
        self._most_at_ends = np.maximum.accumulate(np.append(0, at_end))

    def fits(self, held: Int64Array, left: Int64Array) -> npt.NDArray[np.bool_]:
        """Whether one of these, int64 [m] each, may run too, for each of them alone, bool [m]. A sequence that is alone
        fits if it does by itself."""
        ends_before = np.searchsorted(self._left, left, side="right")
        at_ends = self._most_at_ends[ends_before] + held
        at_own = self._held_after[ends_before] + held + (len(self._left) - ends_before + 1) * left
        return np.maximum(at_ends, at_own) <= self._num_tokens

    def with_one(self, held: int, left: int) -> PoolForecast:
        """The same with one more sequence."""
        return PoolForecast(np.append(self._held, held), np.append(self._left, left), self._num_tokens)
