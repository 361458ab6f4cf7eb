"""One step as a value: what the scheduler decided, and what came of it. No state, no tensors of a device.

A `StepPlan` is a diff against a table of slots that every rank mirrors. A slot holds one running sequence: its page
row, its sampling state, and its last token. A plan first enters new slots, then writes page-table cells, then names the
rows of one packed forward. Plans execute in the order they were issued; results carry their step id.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.types.request import Float32Array, Int16Array, Int32Array, TokenSampling
from headrace.types.sampling_params import LogprobOptions

LAST_TOKEN = -1
"""In `StepPlan.token_ids`: the token that this slot sampled for the row's position, not known to the scheduler yet.

With one token a row and step it is the last one sampled. A step that samples several may bring tokens of positions that
steps in flight sample too: of a position sampled twice the first token counts, on the device as in the scheduler. A
step may sample none: what comes of rows in flight behind it is dropped, and the slot is entered again.
"""


NO_MOVES: Int32Array = np.empty((0, 3), np.int32)
_NOTHING_KEPT: Int32Array = np.empty(0, np.int32)


class PlanRefused(ValueError):
    """What was to be executed is no plan that it could be: nothing of it was."""


class StepDisturbed(RuntimeError):
    """What a step computed is in doubt, through no fault of device or rows: computed again, it will be right."""


class RankLost(RuntimeError):
    """Another of the ranks that execute a plan together is gone, or did not answer in time: they are out of step."""


class SlotInit(msgspec.Struct, frozen=True):
    """A sequence enters a slot, in place of whatever the slot held.

    `token_ids` (int32) are all tokens known on entry: the prompt, and for a sequence that was preempted its output so
    far; penalties count from them, those from `first_output` on as output. Stop ids are masked out of the logits while
    the new token's absolute position is below `min_length`.
    """

    slot: int
    seed: int
    num_prompt_tokens: int
    token_ids: Int32Array
    sampling: TokenSampling
    logprobs: LogprobOptions
    stop_token_ids: tuple[int, ...]
    min_length: int
    num_output_ids_in_prompt: int = 0

    @property
    def first_output(self) -> int:
        """The absolute position of the first token that is output, of this request or of the one that it resumes."""
        return self.num_prompt_tokens - self.num_output_ids_in_prompt

    def scored_positions(self, start: int, length: int) -> range:
        """Prompt positions that are to be scored and that a row of `length` tokens from `start` on predicts."""
        first = self.logprobs.prompt_start
        end = start + length + 1
        return range(0) if first is None else range(max(start + 1, first), min(end, self.num_prompt_tokens))


class StepPlan(msgspec.Struct, frozen=True):
    """What one step computes. Arrays are int32 unless stated; r rows, t tokens, p page-table writes.

    new_slots           sequences entering slots
    page_slots/page_columns/page_ids [p]   page_table[slot, column] = page id
    row_slots [r]       the slot of each row; a slot has at most one row per plan
    row_starts [r]      absolute position of the row's first token; everything before it is already in the KV pages
    row_lengths [r]     tokens computed for this row, >= 1; they sum to t
    token_ids [t]       packed tokens of all rows; LAST_TOKEN stands for the slot's last sampled token
    row_samples [r]     bool: the row reaches the end of its known tokens, so a token is sampled after it, at absolute
                        position row_starts + row_lengths
    prefix_groups [g,3] (first_row, num_rows, num_pages): adjacent rows sharing their leading pages; may be ignored
    waits_to_sample     bool: sampling is issued apart, with what is known only then; else with the forward
    page_moves [m,3]    (direction, page, host page): KV pages that are copied to the host's memory (0) or from it (1)
                        while the step runs, after all that earlier plans do. The step neither writes these pages nor
                        reads those that come; its result is there when they are
    """

    step_id: int
    epoch: int
    new_slots: tuple[SlotInit, ...]
    page_slots: Int32Array
    page_columns: Int32Array
    page_ids: Int32Array
    row_slots: Int32Array
    row_starts: Int32Array
    row_lengths: Int32Array
    token_ids: Int32Array
    row_samples: npt.NDArray[np.bool_]
    prefix_groups: Int32Array
    waits_to_sample: bool = False
    page_moves: Int32Array = NO_MOVES


class SamplePatch(msgspec.Struct, frozen=True):
    """What was decided of a step while its forward ran: the tokens that some of its rows may sample.

    rows [m]            int32: of the rows that sample, by their order in the result; distinct
    masks [m,w]         int32, w words for V tokens: bit i of word j stands for token 32 j + i. At least one of each row
                        is set. What is not has no probability, before any other processor
    """

    rows: Int32Array
    masks: Int32Array

    def within(self, rows: range) -> SamplePatch:
        """What it says of these, numbered from the first of them."""
        chosen = (self.rows >= rows.start) & (self.rows < rows.stop)
        return SamplePatch(self.rows[chosen] - np.int32(rows.start), self.masks[chosen])


class PositionLogprobs(msgspec.Struct, frozen=True):
    """What else was asked of m positions: top ids and their log-probabilities [m, num_top], those of asked ids
    [m, num_asked]; and the ids that could have been drawn, position after position in ascending order, with their
    number at each [m]. Both are empty where they were not asked for."""

    top_ids: Int32Array
    top_logprobs: Float32Array
    asked_logprobs: Float32Array
    kept_ids: Int32Array = _NOTHING_KEPT
    kept_counts: Int32Array = _NOTHING_KEPT

    def kept_between(self, first: int, last: int) -> Int32Array:
        """The kept ids of positions first..last-1."""
        start = int(self.kept_counts[:first].sum())
        return self.kept_ids[start : start + int(self.kept_counts[first:last].sum())]


class RoutedRow(msgspec.Struct, frozen=True):
    """The experts that the tokens at absolute positions first..first+m-1 of a sequence were given to: int16 [m, layers,
    experts per token], the most probable first; 0 in layers that have none.

    A sequence that enters a slot is told all from where it asked on: what it found computed was kept with the pages.
    """

    first: int
    experts: Int16Array


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt tokens at absolute positions first..first+m-1 that a row just scored.

    `extras` is None unless the request asked for top or given ids; then it has the same m positions.
    """

    first: int
    logprobs: Float32Array
    extras: PositionLogprobs | None = None


class StepResult(msgspec.Struct, frozen=True):
    """What one step produced. s is the number of True in the plan's `row_samples`; entries are in row order.

    token_ids [s, k] int32 and logprobs [s, k] float32 hold `num_tokens` [s] valid tokens each, 0 to k (k is 1 without
    speculation, never 0), at consecutive positions from row_starts + row_lengths on. `extras` maps a row index to its
    sampled positions' further log-probabilities, `prompt_logprobs` a row index to the prompt positions scored by it,
    `routed` one to the experts of positions computed by then; all hold only rows that asked.
    """

    step_id: int
    token_ids: Int32Array
    logprobs: Float32Array
    num_tokens: Int32Array
    extras: dict[int, PositionLogprobs] = {}
    prompt_logprobs: dict[int, PromptLogprobs] = {}
    routed: dict[int, RoutedRow] = {}
