"""What the sampler remembers of each slot: parameters in arrays indexed by slot, seen tokens only where penalties act.

Owns per-slot sampling state and the logits processors (`process_row`). Must not know batches or draws.

Order of the processors: logit bias and the mask of stop ids (while the new token's position is below `min_length`),
repetition penalty, presence and frequency penalties; then temperature; then top-k, top-p, min-p as one threshold.
A positive logit of a seen token is divided by the repetition penalty, another one multiplied (prompt and output tokens
count); presence and frequency are subtracted for output tokens only, as presence + frequency * count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headrace.sampling.thresholds import NOTHING_DROPPED, truncation_threshold
from headrace.types.plan import SlotInit
from headrace.types.request import Float32Array, TokenSampling
from headrace.types.sampling_params import GREEDY_TEMPERATURE, LogprobMode

Int64Array = npt.NDArray[np.int64]

RAW, TEMPERATURE, SAMPLED = 0, 1, 2
_MODE_CODES: dict[LogprobMode, int] = {"raw": RAW, "temperature": TEMPERATURE, "sampled": SAMPLED}


class SeenTokens:
    """The distinct tokens of one sequence and how often each was generated."""

    def __init__(self, vocab_size: int, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]) -> None:
        self._output_counts = np.zeros(vocab_size, np.int32)
        np.add.at(self._output_counts, output, 1)
        self._is_seen = np.zeros(vocab_size, np.bool_)
        self._is_seen[prompt] = True
        self._is_seen[output] = True
        ids = np.flatnonzero(self._is_seen)
        self._num_ids = len(ids)
        self._ids = np.concatenate((ids, np.zeros(max(64, len(ids)), np.int64)))

    def add(self, token_id: int) -> None:
        self._output_counts[token_id] += 1
        if self._is_seen[token_id]:
            return
        self._is_seen[token_id] = True
        if self._num_ids == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
        self._ids[self._num_ids] = token_id
        self._num_ids += 1

    def penalise(self, row: Float32Array, sampling: TokenSampling) -> None:
        """Apply the three penalties to row [V] in place."""
        ids = self._ids[: self._num_ids]
        values = row[ids]
        if sampling.repetition_penalty != 1.0:
            penalty = np.float32(sampling.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        counts = self._output_counts[ids].astype(np.float32)
        values = values - counts * np.float32(sampling.frequency_penalty)
        row[ids] = values - (counts > 0) * np.float32(sampling.presence_penalty)


class SamplingSlots:
    """Sampling state of all slots. The arrays are [max_slots]; a slot is written by `enter` and read by index.

    temperatures   float64; 0 is greedy
    seeds          uint64
    output_modes   int8: RAW, TEMPERATURE or SAMPLED
    is_processed   bool: something beside the temperature acts on the logits at every position
    min_lengths    int64: stop ids are masked below this absolute position
    wants_extras   bool: of the sampled tokens
    inits          the `SlotInit` each slot was entered with
    seen           the tokens of the slots whose penalties act
    """

    def __init__(self, vocab_size: int, max_slots: int) -> None:
        self.vocab_size = vocab_size
        self.temperatures = np.ones(max_slots)
        self.seeds = np.zeros(max_slots, np.uint64)
        self.output_modes = np.zeros(max_slots, np.int8)
        self.is_processed = np.zeros(max_slots, np.bool_)
        self.min_lengths = np.zeros(max_slots, np.int64)
        self.wants_extras = np.zeros(max_slots, np.bool_)
        self.inits: list[SlotInit | None] = [None] * max_slots
        self.seen: dict[int, SeenTokens] = {}
        self._bias: dict[int, tuple[Int64Array, Float32Array]] = {}
        self._last_bias: tuple[TokenSampling, tuple[Int64Array, Float32Array]] | None = None
        self._stop_ids: dict[int, Int64Array] = {}

    def enter(self, init: SlotInit) -> None:
        """A sequence takes `init.slot`, in place of whatever was there."""
        slot, sampling = init.slot, init.sampling
        self.temperatures[slot] = sampling.temperature if sampling.temperature >= GREEDY_TEMPERATURE else 0.0
        self.seeds[slot] = init.seed
        self.output_modes[slot] = _MODE_CODES[init.logprobs.output_mode]
        has_penalties = sampling.has_penalties
        self.is_processed[slot] = sampling.truncates or has_penalties or bool(sampling.logit_bias)
        self.min_lengths[slot] = init.min_length
        self.wants_extras[slot] = init.logprobs.wants_output_extras
        self.inits[slot] = init
        for table in (self.seen, self._bias, self._stop_ids):
            table.pop(slot, None)
        if has_penalties:
            tokens, first_output = init.token_ids, init.first_output
            self.seen[slot] = SeenTokens(self.vocab_size, tokens[:first_output], tokens[first_output:])
        if sampling.logit_bias:
            self._bias[slot] = self._bias_of(sampling)
        if init.min_length > len(init.token_ids):
            self._stop_ids[slot] = np.array([t for t in init.stop_token_ids if t < self.vocab_size], np.int64)

    def init_of(self, slot: int) -> SlotInit:
        init = self.inits[slot]
        assert init is not None, f"slot {slot} was never entered"
        return init

    def add_tokens(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        for slot, token_id in zip(slots, token_ids, strict=True):
            seen = self.seen.get(slot)
            if seen:
                seen.add(token_id)

    def process_row(self, row: Float32Array, slot: int, position: int) -> None:
        """Turn the model's logits [V] into those the new token at `position` is drawn from, but for 1 / T, in place."""
        sampling = self.init_of(slot).sampling
        self._add_bias(row, slot)
        if position < self.min_lengths[slot] and slot in self._stop_ids:
            stop_ids = self._stop_ids[slot]
            masked = row[stop_ids] < np.inf  # what is not finite stays in sight: the row has to come out as NaN
            row[stop_ids[masked]] = -np.inf
        seen = self.seen.get(slot)
        if seen:
            seen.penalise(row, sampling)
        self._truncate(row, sampling)

    def process_scored_row(self, row: Float32Array, slot: int) -> None:
        """As `process_row` for a prompt position: without penalties and stop-id mask, which depend on the output."""
        self._add_bias(row, slot)
        self._truncate(row, self.init_of(slot).sampling)

    def _bias_of(self, sampling: TokenSampling) -> tuple[Int64Array, Float32Array]:
        """Ids and values. Samples that share their parameters enter one after the other, and share these arrays."""
        if self._last_bias is None or self._last_bias[0] is not sampling:
            pairs = [(token, value) for token, value in sampling.logit_bias if token < self.vocab_size]
            ids, values = np.array([t for t, _ in pairs], np.int64), np.array([v for _, v in pairs], np.float32)
            self._last_bias = sampling, (ids, values)
        return self._last_bias[1]

    def _add_bias(self, row: Float32Array, slot: int) -> None:
        if slot in self._bias:
            ids, values = self._bias[slot]
            row[ids] += values

    def _truncate(self, row: Float32Array, sampling: TokenSampling) -> None:
        """Drop what top-k, top-p and min-p drop. Greedy rows take the greatest logit, which none of them drops."""
        if sampling.temperature < GREEDY_TEMPERATURE:
            return
        threshold = truncation_threshold(row, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        if threshold != NOTHING_DROPPED:
            row[row < threshold] = -np.inf
