"""A `StepPlan` as one flat int32 array: how it travels to other ranks. Owns the layout; must not know who sends.

Little-endian words, wider numbers as two. Version 3, in this order:

    header       `_HEADER`: mark and version, number of words in all, step id, epoch, waits_to_sample (0 or 1), and how
                 many slots, cells, rows, tokens, groups and moves follow
    new slots    one `_SLOT` each: numbers, floats with all 64 bits, and how long its lists are
    cells        page_slots, page_columns, page_ids
    rows         row_slots, row_starts, row_lengths, row_samples (0 or 1), then token_ids
    groups       prefix_groups, row by row
    moves        page_moves, row by row
    lists        slot by slot: token_ids, stop_token_ids, asked ids, ids with a bias, and those biases (two words each)

A number that does not fit its words is refused by `encode`, and by `decode` whatever is not, to the last word, what
`encode` makes: `PlanRefused`. Neither knows how many slots or pages a device has.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from headrace.types.plan import LAST_TOKEN, PlanRefused, SlotInit, StepPlan
from headrace.types.request import Int32Array, TokenSampling
from headrace.types.sampling_params import LogprobMode, LogprobOptions

_VERSION_3 = 0x48_52_50_03  # "HRP", 3
_MODES: tuple[LogprobMode, ...] = get_args(LogprobMode)
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_NUMBERS = ("slot", "num_prompt_tokens", "min_length", "num_output_ids_in_prompt", "num_top", "top_k", "max_kept")
_CODES = ("output_mode", "prompt_mode", "prompt_start", "routed_start")
_COUNTS = ("num_slots", "num_cells", "num_rows", "num_tokens", "num_groups", "num_moves")
_LENGTHS = ("num_token_ids", "num_stop_ids", "num_asked", "num_biased")
_HEADER = np.dtype(
    [("version", "<i4"), ("num_words", "<i4"), ("step_id", "<i8"), ("epoch", "<i8")]
    + [(name, "<i4") for name in ("waits_to_sample", *_COUNTS)]
)
_SLOT = np.dtype(
    [("seed", "<u8")]
    + [(name, "<i4") for name in (*_NUMBERS, *_CODES, *_LENGTHS)]
    + [(name, "<f8") for name in _FLOATS]
)
_HEADER_WORDS, _SLOT_WORDS = _HEADER.itemsize // 4, _SLOT.itemsize // 4


def encode(plan: StepPlan) -> Int32Array:
    """All of a plan. Raises `PlanRefused` for a number that has no place in the layout."""
    try:
        slots = np.array([_record(init) for init in plan.new_slots], _SLOT)
        samples = plan.row_samples.astype(np.int32)
        parts = [plan.page_slots, plan.page_columns, plan.page_ids, plan.row_slots, plan.row_starts, plan.row_lengths]
        parts += [samples, plan.token_ids, plan.prefix_groups.reshape(-1), plan.page_moves.reshape(-1)]
        parts += [part for init in plan.new_slots for part in _lists(init)]
        num_words = _HEADER_WORDS + _SLOT_WORDS * len(slots) + sum(map(len, parts))
        counted = plan.page_ids, plan.row_slots, plan.token_ids, plan.prefix_groups, plan.page_moves
        counts = len(slots), *map(len, counted)
        numbers = _VERSION_3, num_words, plan.step_id, plan.epoch, plan.waits_to_sample, *counts
        header = np.array(numbers, _HEADER)
    except OverflowError as error:
        raise PlanRefused(f"step {plan.step_id} has a number that is too great: {error}") from error
    return np.concatenate([_words(header), _words(slots), *parts])


def decode(words: Int32Array) -> StepPlan:
    """The plan that `encode` made these words of; its arrays are views of them. Raises `PlanRefused`."""
    _require(words.dtype == np.int32 and words.ndim == 1 and len(words) >= _HEADER_WORDS, "it is no array of words")
    header = _records(words[:_HEADER_WORDS], _HEADER)[0]
    _require(header["version"] == _VERSION_3, "it is of another version, or no plan")
    _require(header["num_words"] == len(words), f"it says {header['num_words']} words and has {len(words)}")
    num_slots, num_cells, num_rows, num_tokens, num_groups, num_moves = (int(header[name]) for name in _COUNTS)
    reader = _Reader(words, _HEADER_WORDS)
    slots = _records(reader.take(num_slots, _SLOT_WORDS), _SLOT)
    cells = reader.take(3, num_cells).reshape(3, -1)
    rows = reader.take(4, num_rows).reshape(4, -1)
    token_ids = reader.take(num_tokens)
    groups = reader.take(num_groups, 3).reshape(-1, 3)
    moves = reader.take(num_moves, 3).reshape(-1, 3)
    _require(min(part.min(initial=0) for part in (cells, rows, groups, moves)) >= 0, "a number is negative")
    _require(token_ids.min(initial=0) >= LAST_TOKEN, "a token is negative")
    _require(rows[2].all() and rows[2].sum(dtype=np.int64) == num_tokens, "its rows do not have its tokens")
    waits = int(header["waits_to_sample"])
    _require(max(rows[3].max(initial=0), moves[:, 0].max(initial=0)) <= 1 and waits in (0, 1), "a flag is not 0 or 1")
    inits = tuple(_init(record, reader) for record in slots)
    _require(reader.at == len(words), "words are left over")
    return StepPlan(
        int(header["step_id"]), int(header["epoch"]), inits, cells[0], cells[1], cells[2],
        rows[0], rows[1], rows[2], token_ids, rows[3].astype(np.bool_), groups, bool(waits), moves,
    )  # fmt: skip


class _Reader:
    """Takes words off the front, and refuses to go beyond the end."""

    def __init__(self, words: Int32Array, at: int) -> None:
        self.words = words
        self.at = at

    def take(self, count: int, size: int = 1) -> Int32Array:
        end = self.at + count * size
        _require(self.at <= end <= len(self.words), "it is cut off")
        self.at, found = end, self.words[self.at : end]
        return found


def _record(init: SlotInit) -> tuple[Any, ...]:
    sampling, options = init.sampling, init.logprobs
    return (
        *(init.seed, init.slot, init.num_prompt_tokens, init.min_length, init.num_output_ids_in_prompt),
        *(options.num_top, sampling.top_k, options.max_kept),
        *(_MODES.index(options.output_mode), _MODES.index(options.prompt_mode)),
        *(-1 if start is None else start for start in (options.prompt_start, options.routed_start)),
        *(len(init.token_ids), len(init.stop_token_ids), len(options.token_ids), len(sampling.logit_bias)),
        *(getattr(sampling, name) for name in _FLOATS),
    )


def _lists(init: SlotInit) -> list[Int32Array]:
    bias = init.sampling.logit_bias
    ids = init.stop_token_ids, init.logprobs.token_ids, [token for token, _ in bias]
    values = np.array([value for _, value in bias], "<f8")
    return [init.token_ids, *(np.array(each, np.int32) for each in ids), _words(values)]


def _init(record: Any, reader: _Reader) -> SlotInit:
    token_ids, stop_ids, asked, biased = (reader.take(int(record[name])) for name in _LENGTHS)
    values = _records(reader.take(len(biased), 2), np.dtype("<f8"))
    number = {name: record[name].item() for name in (*_NUMBERS, *_CODES)}
    *modes, start, routed_start = (number[name] for name in _CODES)
    least = min(start + 1, routed_start + 1, *(number[name] for name in _NUMBERS))
    _require(least >= 0, "a number of a slot is negative")
    _require(all(0 <= mode < len(_MODES) for mode in modes), f"there are no modes {modes}")
    floats = {name: float(record[name]) for name in _FLOATS}
    bias = tuple(zip(biased.tolist(), values.tolist(), strict=True))
    return SlotInit(
        slot=number["slot"],
        seed=int(record["seed"]),
        num_prompt_tokens=number["num_prompt_tokens"],
        token_ids=token_ids,
        sampling=TokenSampling(top_k=number["top_k"], logit_bias=bias, **floats),
        logprobs=LogprobOptions(
            output_mode=_MODES[modes[0]],
            prompt_mode=_MODES[modes[1]],
            prompt_start=None if start < 0 else start,
            num_top=number["num_top"],
            token_ids=tuple(asked.tolist()),
            max_kept=number["max_kept"],
            routed_start=None if routed_start < 0 else routed_start,
        ),
        stop_token_ids=tuple(stop_ids.tolist()),
        min_length=number["min_length"],
        num_output_ids_in_prompt=number["num_output_ids_in_prompt"],
    )


def _words(records: np.ndarray[Any, np.dtype[Any]]) -> Int32Array:
    return np.frombuffer(records.tobytes(), np.int32)


def _records(words: Int32Array, kind: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    return np.frombuffer(words.tobytes(), kind)


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise PlanRefused(f"what came is not a plan: {otherwise}")
