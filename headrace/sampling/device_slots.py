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

from headrace.kernels.triton.sampling_rows import seed_words
from headrace.kernels.triton.shaped_rows import HEADER_WORDS, SHAPING_WORDS, count_seen, fill_counts, pack_shaping
from headrace.kernels.triton.slot_records import make_record
from headrace.kernels.triton.threshold_search import ROW_WORDS
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import GREEDY_TEMPERATURE, MAX_LOGPROB_TOKEN_IDS, LogprobMode, LogprobOptions

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

OF_MODEL, OF_KEPT, OF_TOKEN = 0.0, 1.0, 2.0
"""What a row's log-probability is of: the model's distribution, what is kept of the reshaped one, the token alone."""


class DeviceSlots:
    """Tables of `max_slots` slots.

    On the device: params float32 [slots, ROW_WORDS] and seeds int32 [slots, 2], which records write; last_tokens int32
    [slots]; shaping int32 [slots, SHAPING_WORDS] and counts int16 [slots, V] (see `shaped_rows`), asked_ids int32
    [slots, *], which `enter` writes where a sequence has use for them.

    On the host, per slot: is_kept (top-k, top-p or min-p act), is_reshaped (bias or penalties act), min_lengths (stop
    ids are masked below this position), num_top and num_asked.
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self.params = torch.zeros(max_slots, ROW_WORDS, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(max_slots, 2, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_slots, dtype=torch.int32, device=device)
        self.shaping = torch.zeros(max_slots, SHAPING_WORDS, dtype=torch.int32, device=device)
        self.counts = torch.zeros(max_slots, vocab_size, dtype=torch.int16, device=device)
        self.asked_ids = torch.zeros(max_slots, MAX_LOGPROB_TOKEN_IDS, dtype=torch.int32, device=device)
        self.is_kept = np.zeros(max_slots, np.bool_)
        self.is_reshaped = np.zeros(max_slots, np.bool_)
        self.min_lengths = np.zeros(max_slots, np.int64)
        self.num_top = np.zeros(max_slots, np.int32)
        self.num_asked = np.zeros(max_slots, np.int32)
        self._requests: list[tuple[TokenSampling, LogprobOptions] | None] = [None] * max_slots

    def enter(self, init: SlotInit) -> Int32Array:
        """A sequence takes `init.slot`, in place of whatever was there. Returns the slot's record."""
        slot, sampling, options = init.slot, init.sampling, init.logprobs
        stop_ids = tuple(token for token in init.stop_token_ids if token < self.vocab_size)
        is_masked = init.min_length > len(init.token_ids) and bool(stop_ids)
        params = slot_params(sampling, options, options.output_mode, self.vocab_size)
        self.is_kept[slot] = params[0] > 0.0 and _keeps(sampling)
        self.is_reshaped[slot] = sampling.has_penalties or bool(sampling.logit_bias)
        self.min_lengths[slot] = init.min_length if is_masked else 0
        self.num_top[slot], self.num_asked[slot] = params[3], params[7]
        self._requests[slot] = sampling, options
        if self.is_reshaped[slot] or is_masked:
            self._write_shaping(init, stop_ids if is_masked else ())
        if options.token_ids:
            self._write_row(self.asked_ids[slot], np.array(options.token_ids, np.int32))
        return make_record(slot, params, seed_words(np.array([init.seed], np.uint64))[0])

    def request_of(self, slot: int) -> tuple[TokenSampling, LogprobOptions]:
        """What the slot's sequence asked for."""
        request = self._requests[slot]
        assert request is not None, f"slot {slot} was never entered"
        return request

    def are_shaped(self, slots: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]) -> BoolArray:
        """Which rows are drawn from reshaped logits, before anything is dropped of them."""
        result: BoolArray = self.is_reshaped[slots] | (positions < self.min_lengths[slots])
        return result

    def clear_shaping(self, slots: npt.NDArray[np.integer]) -> None:
        """The words of those that nothing reshapes say so: they may be left from who was in the slot before."""
        stale = slots[~self.is_reshaped[slots] & (self.min_lengths[slots] == 0)]
        if len(stale):
            self.shaping[:, :HEADER_WORDS].index_fill_(0, self.upload(stale.astype(np.int64)), 0)

    def want_extras(self, slots: npt.NDArray[np.integer]) -> BoolArray:
        """Which rows need more than their own token's log-probability."""
        result: BoolArray = (self.num_top[slots] + self.num_asked[slots]) > 0
        return result

    def upload(self, values: npt.NDArray[np.generic]) -> Tensor:
        """A copy on the device, enqueued."""
        host = torch.from_numpy(values)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host.clone()

    def warm(self) -> None:
        """Use what `enter` uses on the device, before any sequence has entered."""
        fill_counts(self.counts[0], self.upload(np.zeros((2, 1), np.int32)))
        self._write_row(self.asked_ids[0], np.zeros(1, np.int32))

    def _write_shaping(self, init: SlotInit, stop_ids: tuple[int, ...]) -> None:
        sampling = init.sampling
        penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        bias = tuple((token, value) for token, value in sampling.logit_bias if token < self.vocab_size)
        self._write_row(self.shaping[init.slot], pack_shaping(penalties, bias, stop_ids, init.min_length))
        if sampling.has_penalties:
            seen = count_seen(init.token_ids[: init.first_output], init.token_ids[init.first_output :])
            fill_counts(self.counts[init.slot], self.upload(np.stack(seen)))

    def _write_row(self, row: Tensor, values: Int32Array) -> None:
        host = torch.from_numpy(values)
        row[: len(values)].copy_(host.pin_memory() if self._device.type == "cuda" else host, non_blocking=True)


def _keeps(sampling: TokenSampling) -> bool:
    return bool(sampling.top_k) or sampling.top_p < 1.0 or sampling.min_p > 0.0


def slot_params(sampling: TokenSampling, options: LogprobOptions, mode: LogprobMode, vocab_size: int) -> Float32Array:
    """The float32 words that the sampling kernels read for log-probabilities of `mode`; `sample_rows` says which."""
    temperature = sampling.temperature if sampling.temperature >= GREEDY_TEMPERATURE else 0.0
    kind = OF_MODEL
    if mode == "sampled":
        kind = OF_KEPT if temperature else OF_TOKEN
    words = np.zeros(ROW_WORDS, np.float32)
    words[0] = temperature
    words[1] = temperature if temperature and mode != "raw" else 1.0
    words[2] = kind
    words[3] = min(options.num_top, vocab_size)
    words[4:6] = sampling.top_k, sampling.top_p
    words[6] = temperature * math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf
    words[7] = len(options.token_ids)
    return words
