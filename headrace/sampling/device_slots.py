"""What the device sampler keeps per slot: tables on the device, and on the host what decides how a step is sampled.

Owns the tables, what is written to them when a sequence enters, and the numbers a slot's parameters are made of. Must
not know batches or draws. Copies to the device are enqueued from pinned memory; nothing here waits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.kernels.triton import slot_params as columns
from headrace.kernels.triton.logits_processors import (
    PROCESSORS_SIZE,
    count_seen,
    fill_counts,
    pack_processors,
)
from headrace.kernels.triton.slot_params import NUM_PARAMS, make_record
from headrace.types.plan import SlotInit
from headrace.types.request import Float32Array, Int32Array, TokenSampling
from headrace.types.sampling_params import GREEDY_TEMPERATURE, MAX_LOGPROB_TOKEN_IDS, LogprobMode, LogprobOptions

BoolArray = npt.NDArray[np.bool_]


class DeviceSlots:
    """Tables of `max_slots` slots.

    On the device: params float32 [slots, NUM_PARAMS] and seeds int32 [slots, 2], which records write; last_tokens int32
    [slots]; processors int32 [slots, PROCESSORS_SIZE] and counts int16 [slots, V] (see `logits_processors`), asked_ids
    int32 [slots, *], which `enter` writes where a sequence has use for them.

    On the host, per slot: is_truncated (top-k, top-p or min-p act), is_processed (bias or penalties act), min_lengths
    (stop ids are masked below this position), num_top, num_asked, and wants_kept (which tokens it could have been).
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self.params = torch.zeros(max_slots, NUM_PARAMS, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(max_slots, 2, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_slots, dtype=torch.int32, device=device)
        self.processors = torch.zeros(max_slots, PROCESSORS_SIZE, dtype=torch.int32, device=device)
        self.counts = torch.zeros(max_slots, vocab_size, dtype=torch.int16, device=device)
        self.asked_ids = torch.zeros(max_slots, MAX_LOGPROB_TOKEN_IDS, dtype=torch.int32, device=device)
        self.is_truncated = np.zeros(max_slots, np.bool_)
        self.is_processed = np.zeros(max_slots, np.bool_)
        self.min_lengths = np.zeros(max_slots, np.int64)
        self.num_top = np.zeros(max_slots, np.int32)
        self.num_asked = np.zeros(max_slots, np.int32)
        self.wants_kept = np.zeros(max_slots, np.bool_)
        self._requests: list[tuple[TokenSampling, LogprobOptions] | None] = [None] * max_slots

    def enter(self, init: SlotInit) -> Int32Array:
        """A sequence takes `init.slot`, in place of whatever was there. Returns the slot's record."""
        slot, sampling, options = init.slot, init.sampling, init.logprobs
        stop_ids = tuple(token for token in init.stop_token_ids if token < self.vocab_size)
        is_masked = init.min_length > len(init.token_ids) and bool(stop_ids)
        params = slot_params(sampling, options, options.output_mode, self.vocab_size)
        self.is_truncated[slot] = params[columns.TEMPERATURE] > 0.0 and sampling.truncates
        self.is_processed[slot] = sampling.has_penalties or bool(sampling.logit_bias)
        self.min_lengths[slot] = init.min_length if is_masked else 0
        self.num_top[slot], self.num_asked[slot] = params[columns.NUM_TOP], params[columns.NUM_ASKED]
        self.wants_kept[slot] = options.max_kept > 0
        self._requests[slot] = sampling, options
        if self.is_processed[slot] or is_masked:
            params[columns.PROCESSORS] = (columns.PROCESSED if self.is_processed[slot] else columns.MASKED).value
            self._write_processors(init, stop_ids if is_masked else ())
        if options.token_ids:
            self._write_row(self.asked_ids[slot], np.array(options.token_ids, np.int32))
        return make_record(slot, params, init.seed)

    def request_of(self, slot: int) -> tuple[TokenSampling, LogprobOptions]:
        """What the slot's sequence asked for."""
        request = self._requests[slot]
        assert request is not None, f"slot {slot} was never entered"
        return request

    def are_processed(self, slots: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]) -> BoolArray:
        """Which rows a logits processor acts on."""
        result: BoolArray = self.is_processed[slots] | (positions < self.min_lengths[slots])
        return result

    def want_extras(self, slots: npt.NDArray[np.integer]) -> BoolArray:
        """Which rows need more than their own token's log-probability."""
        result: BoolArray = (self.num_top[slots] + self.num_asked[slots] > 0) | self.wants_kept[slots]
        return result

    def upload(self, values: npt.NDArray[np.generic]) -> Tensor:
        """A copy on the device, enqueued."""
        return self._pinned(values).to(self._device, non_blocking=True, copy=True)

    def warm(self) -> None:
        """Use what `enter` uses on the device, before any sequence has entered."""
        fill_counts(self.counts[0], self.upload(np.zeros((2, 1), np.int32)))
        self._write_row(self.asked_ids[0], np.zeros(1, np.int32))

    def _write_processors(self, init: SlotInit, stop_ids: tuple[int, ...]) -> None:
        sampling = init.sampling
        penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        bias = tuple((token, value) for token, value in sampling.logit_bias if token < self.vocab_size)
        self._write_row(self.processors[init.slot], pack_processors(penalties, bias, stop_ids, init.min_length))
        if sampling.has_penalties:
            seen = count_seen(init.token_ids[: init.first_output], init.token_ids[init.first_output :])
            fill_counts(self.counts[init.slot], self.upload(np.stack(seen)))

    def _write_row(self, row: Tensor, values: Int32Array) -> None:
        row[: len(values)].copy_(self._pinned(values), non_blocking=True)

    def _pinned(self, values: npt.NDArray[np.generic]) -> Tensor:
        host = torch.from_numpy(values)
        return host.pin_memory() if self._device.type == "cuda" else host


def slot_params(sampling: TokenSampling, options: LogprobOptions, mode: LogprobMode, vocab_size: int) -> Float32Array:
    """The parameters that the sampling kernels read for log-probabilities of `mode`: float32 [NUM_PARAMS]."""
    temperature = sampling.temperature if sampling.temperature >= GREEDY_TEMPERATURE else 0.0
    of = columns.OF_MODEL
    if mode == "sampled":
        of = columns.OF_SAMPLED if temperature else columns.OF_POINT
    params = np.zeros(NUM_PARAMS, np.float32)
    params[columns.TEMPERATURE] = temperature
    params[columns.DIVISOR] = temperature if temperature and mode != "raw" else 1.0
    params[columns.LOGPROBS_OF] = of.value
    params[columns.NUM_TOP] = min(options.num_top, vocab_size)
    params[columns.TOP_K], params[columns.TOP_P] = sampling.top_k, sampling.top_p
    params[columns.MIN_P] = temperature * math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf
    params[columns.NUM_ASKED] = len(options.token_ids)
    return params
