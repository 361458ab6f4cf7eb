"""A plan as the arrays of one packed forward. Owns the arithmetic of rows and positions; no loop over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.attention.base import AttentionInputs, Int64Array
from headrace.runner.slots import InputTable
from headrace.types.plan import LAST_TOKEN, SlotInit, StepPlan


@dataclass(frozen=True)
class ForwardBatch:
    """Everything one forward and its sampling need. R rows, T packed tokens, S rows that sample.

    token_ids [T]                 int64 tensor
    row_firsts [R]                index of each row's first packed token
    scored_rows                   rows whose prompt log-probabilities are wanted, each with its sequence
    sampled_rows [S]              rows that sample; `sampled_tokens` [S] (tensor) are their last packed tokens
    sampled_slots, sampled_positions [S]   slot and absolute position of each new token
    """

    attention: AttentionInputs
    token_ids: Tensor
    row_firsts: Int64Array
    scored_rows: list[tuple[int, SlotInit]]
    sampled_rows: Int64Array
    sampled_tokens: Tensor
    sampled_slots: Int64Array
    sampled_positions: Int64Array


def build_batch(plan: StepPlan, slots: InputTable, device: torch.device | None = None) -> ForwardBatch:
    """Lay the plan's rows out, tensors on `device`. `slots` has already been shown the plan."""
    row_slots, row_starts = plan.row_slots.astype(np.int64), plan.row_starts.astype(np.int64)
    row_lengths = plan.row_lengths.astype(np.int64)
    row_ends = np.cumsum(row_lengths)
    row_firsts = row_ends - row_lengths
    token_slots = np.repeat(row_slots, row_lengths)
    positions = np.arange(len(token_slots)) + np.repeat(row_starts - row_firsts, row_lengths)
    token_ids = np.where(plan.token_ids == LAST_TOKEN, slots.last_tokens[token_slots], plan.token_ids)
    sampled_rows = np.flatnonzero(plan.row_samples)
    rotated_at = torch.from_numpy(positions).to(device)
    attention = AttentionInputs(
        slots.page_table, row_slots, row_starts, row_lengths, positions, token_slots, rotated_at
    )
    return ForwardBatch(
        attention=attention,
        token_ids=torch.from_numpy(token_ids).to(device),
        row_firsts=row_firsts,
        scored_rows=slots.scored_rows(row_slots, row_starts),
        sampled_rows=sampled_rows,
        sampled_tokens=torch.from_numpy(row_ends[sampled_rows] - 1).to(device),
        sampled_slots=row_slots[sampled_rows],
        sampled_positions=(row_starts + row_lengths)[sampled_rows],
    )
