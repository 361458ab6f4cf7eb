"""Reading log-probabilities off distributions: of given tokens, the most probable ids, asked ids. Owns their order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from headrace.sampling.noise import Float64Array
from headrace.sampling.row_pass import Int64Array, Reduced, RowPass
from headrace.sampling.thresholds import kth_greatest
from headrace.types.plan import PositionLogprobs
from headrace.types.request import Float32Array
from headrace.types.sampling_params import LogprobOptions


class Distribution(NamedTuple):
    """n distributions softmax(logits[rows] / divisors): logits [*, V], rows and divisors [n], and their reductions."""

    logits: Float32Array
    rows: Int64Array
    divisors: Float64Array
    reduced: Reduced

    @classmethod
    def of(cls, logits: Float32Array, rows: Int64Array, divisors: Float64Array, row_pass: RowPass) -> Distribution:
        """Reduce logits[rows] / divisors."""
        return cls(logits, rows, divisors, row_pass.reduce(logits, rows, divisors))

    @classmethod
    def point(cls, token_ids: Int64Array, vocab_size: int, log_sums: Float64Array) -> Distribution:
        """All of the mass on token_ids [n]: what a greedy row is drawn from. Where `log_sums` [n], of what they were
        picked from, is not finite, every log-probability is NaN."""
        rows = np.arange(len(token_ids))
        logits = np.full((len(rows), vocab_size), -np.inf, np.float32)
        logits[rows, token_ids] = 0.0
        zeros = np.where(np.isfinite(log_sums), 0.0, np.nan)
        return cls(logits, rows, np.ones(len(rows)), Reduced(token_ids, zeros, zeros))

    def take(self, chosen: Int64Array) -> Distribution:
        reduced = Reduced(self.reduced.argmax[chosen], self.reduced.maxima[chosen], self.reduced.log_sums[chosen])
        return Distribution(self.logits, self.rows[chosen], self.divisors[chosen], reduced)

    def logprobs(self, token_ids: Int64Array) -> Float32Array:
        """Log-probabilities of token_ids [n] or [n, k], one row of ids per distribution; the same shape."""
        columns = token_ids if token_ids.ndim == 2 else token_ids[:, None]
        with np.errstate(invalid="ignore", over="ignore"):  # -inf where float32 ends
            scaled = (self.logits[self.rows[:, None], columns] - self.reduced.maxima[:, None]) / self.divisors[:, None]
            values = (scaled - self.reduced.log_sums[:, None]).astype(np.float32)
        return values.reshape(token_ids.shape)

    def extras(self, options: LogprobOptions) -> PositionLogprobs:
        """What `options` asks of the n distributions.

        Top ids come greatest first, the lowest id first among equals, and are at most V. An asked id outside the
        vocabulary, like a token no longer in the distribution, has log-probability -inf.
        """
        top = np.stack([top_ids(self.logits[row], options.num_top) for row in self.rows])
        asked = np.tile(np.array(options.token_ids, np.int64), (len(self.rows), 1))
        is_known = asked < self.logits.shape[1]
        asked_logprobs = self.logprobs(np.where(is_known, asked, 0))
        return PositionLogprobs(
            top_ids=top.astype(np.int32),
            top_logprobs=self.logprobs(top),
            asked_logprobs=np.where(is_known, asked_logprobs, np.float32(-np.inf)),
        )


def top_ids(row: Float32Array, num_top: int) -> Int64Array:
    """The ids of the `num_top` greatest values of row [V] (at most V), greatest first, lowest id first among equals.

    A row with NaN gives ids in no promised order.
    """
    num_top = min(num_top, len(row))
    if num_top == 0:
        return np.empty(0, np.int64)
    least = kth_greatest(row, num_top)
    above = np.flatnonzero(row > least)
    ids = np.concatenate((above, np.flatnonzero(row == least)[: num_top - len(above)]))
    if len(ids) < num_top:
        return np.arange(num_top)
    return ids[np.lexsort((ids, -row[ids]))]
