"""The hot pass over logits: log-sum-exp of a row, and with it the Gumbel-max draw. Owns the CPU loops and scratch.

A row's result is a pure function of that row: rows are walked in blocks that fit the cache, whose column boundaries
depend on the vocabulary size alone, and every sum runs along one row in a fixed order. So no batch mate, row order or
thread count changes a bit of it.

Gumbel-max needs a logarithm of noise per token only in principle. With e = exp((logit - max) / T), which log-sum-exp
needs anyway, the winner is the token with the greatest e / E, E = -log1p(-v). As v <= E, e / v bounds the score of
every token from above without a logarithm; only the few tokens whose bound reaches the exact score of one of them are
scored exactly, in float64, as logit / T + gumbel. The answer is that of the full float64 computation.

Must not know slots, parameters or modes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.sampling.noise import TOKEN_MULTIPLIER, UInt32Array, exponential_of, gumbel_of, mix_in_place, noise_words
from headrace.types.request import Float32Array

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

BLOCK_ELEMENTS = 1 << 16
"""Elements walked at once: four such buffers fit a second-level cache, and hide what a numpy call costs."""

_PARALLEL_ELEMENTS = 1 << 19
_BOUND_SLACK = 1.0 - 1e-4
"""The float32 bound e / v errs by less than this in relative terms."""


class Reduced(NamedTuple):
    """Per row [n]: index (lowest among equals) and value of the greatest logit, and log(sum(exp((l - max) / T)))."""

    argmax: Int64Array
    maxima: Float64Array
    log_sums: Float64Array


class Drawn(NamedTuple):
    """token_ids [n] int64, and the reduction that gives their log-probabilities."""

    token_ids: Int64Array
    reduced: Reduced


class _Scratch:
    """Buffers of one worker thread."""

    def __init__(self, vocab_size: int) -> None:
        self.words = np.empty(BLOCK_ELEMENTS, np.uint32)
        self.shifted = np.empty(BLOCK_ELEMENTS, np.uint32)
        self.weights = np.empty(BLOCK_ELEMENTS, np.float32)
        self.bounds = np.empty(max(BLOCK_ELEMENTS, vocab_size), np.float32)


class RowPass:
    """Reductions and draws over float32 logits [*, vocab_size], on up to `num_threads` threads."""

    def __init__(self, vocab_size: int, num_threads: int = 1) -> None:
        self.vocab_size = vocab_size
        self._num_threads = num_threads
        self._scratch = [_Scratch(vocab_size) for _ in range(num_threads)]
        self._pool = (
            ThreadPoolExecutor(num_threads, thread_name_prefix="headrace-sampling") if num_threads > 1 else None
        )
        self._scaled_tokens = np.arange(vocab_size, dtype=np.uint32) * TOKEN_MULTIPLIER
        self._rows_per_block = max(1, BLOCK_ELEMENTS // vocab_size)

    def reduce(self, logits: Float32Array, rows: Int64Array, temperatures: Float64Array) -> Reduced:
        """Reduce logits[rows] / temperatures; `rows` and `temperatures` are [n], all temperatures > 0."""
        result = Reduced(np.empty(len(rows), np.int64), np.empty(len(rows)), np.empty(len(rows)))

        def work(part: slice, scratch: _Scratch) -> None:
            reduced = self._reduce(_take(logits, rows[part]), temperatures[part], scratch, None)
            result.argmax[part], result.maxima[part], result.log_sums[part] = reduced

        self._for_each_block(len(rows), work)
        return result

    def draw(self, logits: Float32Array, rows: Int64Array, temperatures: Float64Array, keys: UInt32Array) -> Drawn:
        """Draw a token from softmax(logits[rows] / temperatures) with the noise of keys [n, 2].

        A row with NaN or without a finite logit gives some id and NaN log-probabilities, and does not harm the others.
        """
        result = Reduced(np.empty(len(rows), np.int64), np.empty(len(rows)), np.empty(len(rows)))
        token_ids = np.empty(len(rows), np.int64)

        def work(part: slice, scratch: _Scratch) -> None:
            block = _take(logits, rows[part])
            reduced = self._reduce(block, temperatures[part], scratch, keys[part])
            result.argmax[part], result.maxima[part], result.log_sums[part] = reduced
            bounds = scratch.bounds[: block.size].reshape(block.shape)
            token_ids[part] = _winners(block, bounds, temperatures[part], keys[part])

        self._for_each_block(len(rows), work)
        return Drawn(token_ids, result)

    def _for_each_block(self, num_rows: int, work: Callable[[slice, _Scratch], None]) -> None:
        size = self._rows_per_block
        starts = range(0, num_rows, size)
        if self._pool is None or len(starts) < 2 or num_rows * self.vocab_size < _PARALLEL_ELEMENTS:
            for start in starts:
                work(slice(start, start + size), self._scratch[0])
            return
        share = -(-len(starts) // self._num_threads)

        def work_share(worker: int) -> None:
            for start in starts[worker * share : (worker + 1) * share]:
                work(slice(start, start + size), self._scratch[worker])

        list(self._pool.map(work_share, range(self._num_threads)))

    def _reduce(
        self, block: Float32Array, temperatures: Float64Array, scratch: _Scratch, keys: UInt32Array | None
    ) -> Reduced:
        """Reduce block [n, V]; with keys, also leave e / v of every token in scratch.bounds."""
        num_rows, size = block.shape
        bounds = scratch.bounds[: block.size].reshape(block.shape)
        argmax = block.argmax(axis=1)
        maxima = block[np.arange(num_rows), argmax]
        inverses = (1.0 / temperatures).astype(np.float32)[:, None]
        sums = np.zeros(num_rows)
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for start in range(0, size, BLOCK_ELEMENTS):
                columns = slice(start, min(start + BLOCK_ELEMENTS, size))
                weights = scratch.weights[: num_rows * (columns.stop - start)].reshape(num_rows, -1)
                np.subtract(block[:, columns], maxima[:, None], out=weights)
                np.multiply(weights, inverses, out=weights)
                np.exp(weights, out=weights)
                sums += weights.sum(axis=1)
                if keys is not None:
                    self._bound(weights, columns, keys, scratch, bounds[:, columns])
            return Reduced(argmax, maxima, np.log(sums))

    def _bound(
        self, weights: Float32Array, columns: slice, keys: UInt32Array, scratch: _Scratch, bounds: Float32Array
    ) -> None:
        """bounds = weights / v, in units of 2^32: no token's exact e / E is greater."""
        words = scratch.words[: weights.size].reshape(weights.shape)
        shifted = scratch.shifted[: weights.size].reshape(weights.shape)
        np.add(self._scaled_tokens[columns], keys[:, 0:1], out=words)
        mix_in_place(words, shifted)
        np.bitwise_xor(words, keys[:, 1:2], out=words)
        mix_in_place(words, shifted)
        uniform = shifted.view(np.float32)
        np.copyto(uniform, words, casting="unsafe")
        np.add(uniform, np.float32(0.5), out=uniform)
        np.divide(weights, uniform, out=bounds)


def _take(logits: Float32Array, rows: Int64Array) -> Float32Array:
    """logits[rows], without a copy when the rows are neighbours."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and (len(rows) < 3 or bool((np.diff(rows) == 1).all())):
        return logits[first : last + 1]
    return logits[rows]


def _winners(block: Float32Array, bounds: Float32Array, temperatures: Float64Array, keys: UInt32Array) -> Int64Array:
    """The exact Gumbel-max winner of each row of block [n, V], given upper bounds of every token's score."""
    num_rows = len(block)
    best: Int64Array = bounds.argmax(axis=1)
    words = noise_words(keys, best[:, None])[:, 0]
    exact_over_bound = (words.astype(np.float64) + 0.5) * 2.0**-32 / exponential_of(words)
    reach = (bounds[np.arange(num_rows), best] * exact_over_bound * _BOUND_SLACK).astype(np.float32)
    # One flat index: numpy finds those far faster than pairs.
    rows, ids = np.divmod(np.flatnonzero(bounds >= reach[:, None]), bounds.shape[1])
    # From one logit of the row on: a large one divided by a small temperature would leave no bits for the noise.
    with np.errstate(invalid="ignore"):
        logits = block[rows, ids].astype(np.float64) - block[rows, best[rows]]
    scores = logits / temperatures[rows] + gumbel_of(noise_words(keys[rows], ids[:, None])[:, 0])
    order = np.lexsort((ids, -scores, rows))
    first = order[np.flatnonzero(np.diff(rows[order], prepend=-1))]
    best[rows[first]] = ids[first]
    return best
