"""What slots keep of the tokens they sampled: the last one, and how often each was, where penalties act.

All of it stays on the device, as the host does not know the tokens yet. The sampling pass leaves its own; what was
sampled elsewhere is left by a launch.

Legend: S rows, V vocabulary.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.logits_processors import HAS_PENALTIES, MAX_COUNT, SLOT_WORDS, SlotProcessors
from headrace.kernels.triton.slot_params import PROCESSED, PROCESSORS, UNPROCESSED, param_ptr


class LastTokens(NamedTuple):
    """Where slots keep what was sampled: tokens int32 [slots] for the next step, and counts where penalties act."""

    tokens: Tensor
    tables: SlotProcessors


@triton.jit
def count_tokens(tokens, slots, mask, params_ptr, processors_ptr, counts_ptr, VOCAB: tl.constexpr):
    """Count what these slots have just sampled, where penalties act. Slots are distinct."""
    kind = tl.load(param_ptr(params_ptr, slots, PROCESSORS), mask=mask, other=UNPROCESSED)
    mask &= kind == PROCESSED
    has_penalties = tl.load(processors_ptr + slots.to(tl.int64) * SLOT_WORDS + HAS_PENALTIES, mask=mask, other=0)
    mask &= has_penalties != 0
    count_ptr = counts_ptr + slots.to(tl.int64) * VOCAB + tokens
    count = tl.load(count_ptr, mask=mask, other=0).to(tl.int32) & 0xFFFF
    tl.store(count_ptr, tl.minimum(tl.maximum(count, 1) + 1, MAX_COUNT).to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["tokens_ptr", "slots_ptr"])
def _leave_kernel(
    tokens_ptr, slots_ptr, last_ptr, params_ptr, processors_ptr, counts_ptr, num_rows,
    VOCAB: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    tokens = tl.load(tokens_ptr + rows, mask=slots >= 0, other=0)
    tl.store(last_ptr + slots, tokens, mask=slots >= 0)
    count_tokens(tokens, slots, slots >= 0, params_ptr, processors_ptr, counts_ptr, VOCAB)


def leave_tokens(tokens_S: Tensor, slots_S: Tensor, slot_params: Tensor, last: LastTokens) -> None:
    """What these rows have sampled (int32) is what their slots sampled last; a slot below 0 is skipped."""
    tables = last.tables
    _leave_kernel[(triton.cdiv(len(slots_S), 256),)](
        tokens_S, slots_S, last.tokens, slot_params, tables.processors, tables.counts, len(slots_S),
        VOCAB=tables.counts.shape[1], BLOCK_S=256,
    )  # fmt: skip
