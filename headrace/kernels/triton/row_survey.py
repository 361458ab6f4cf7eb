"""What a first look at a row of logits leaves for the search for its nucleus. Owns the layout, and which rows have it.

A row is cut into groups of neighbours, and they are dealt to blocks: what is common has neighbouring ids, and so no
block has all of it. Of each group the greatest value is kept; of each block the greatest, and what all of it weighs:
the sum of exp((x - greatest) / T). That is of the logits which the row's token is drawn from, and `logits_processors`
writes it while it has the row at hand.

Legend: R rows, B blocks, G groups of a block.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.config.shares import VOCABULARY_BLOCK
from headrace.kernels.triton.fast_math import fast_exp
from headrace.kernels.triton.slot_params import MIN_P, TEMPERATURE, TOP_K, TOP_P, load_param

BLOCK = VOCABULARY_BLOCK
GROUP = 64
"""Neighbours of which the greatest is kept."""

_GROUPS = tl.constexpr(BLOCK // GROUP)
_GROUP = tl.constexpr(GROUP)


@dataclass(frozen=True)
class RowSurvey:
    """maxima float32 [R, B, G], and peaks float32 [R, B, 2]: a block's greatest value and its weight."""

    maxima_RBG: Tensor
    peaks_RB2: Tensor

    @classmethod
    def make(cls, max_rows: int, vocab_size: int, device: torch.device) -> RowSurvey:
        """Allocate for `max_rows` rows of `vocab_size` logits."""
        num_blocks = triton.cdiv(vocab_size, BLOCK)
        shapes = (max_rows, num_blocks, BLOCK // GROUP), (max_rows, num_blocks, 2)
        return cls(*(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes))


@triton.jit
def is_surveyed(params_ptr, slot, VOCAB: tl.constexpr):
    """Whether a row's threshold is found from its survey: top-p or min-p act, top-k does not."""
    top_k = load_param(params_ptr, slot, TOP_K)
    truncates = (load_param(params_ptr, slot, TOP_P) < 1.0) | (load_param(params_ptr, slot, MIN_P) > float("-inf"))
    has_top_k = (top_k > 0.0) & (top_k < VOCAB)
    return truncates & (load_param(params_ptr, slot, TEMPERATURE) > 0.0) & (has_top_k == 0)


@triton.jit
def token_of(block, group, lane, NUM_BLOCKS: tl.constexpr):
    """Of one of a block's groups."""
    return (group * NUM_BLOCKS + block) * _GROUP + lane


@triton.jit
def block_of(token, NUM_BLOCKS: tl.constexpr):
    """That a token's group was dealt to."""
    return token // _GROUP % NUM_BLOCKS


@triton.jit
def group_of(token, NUM_BLOCKS: tl.constexpr):
    """A token's group, as the maxima of a row are numbered."""
    return block_of(token, NUM_BLOCKS) * _GROUPS + token // _GROUP // NUM_BLOCKS


@triton.jit
def weigh(x, top, inverse):
    """What softmax gives values, in units of that of `top`; NaN and -inf weigh nothing."""
    return tl.where(x > float("-inf"), fast_exp((x - top) * inverse), 0.0)


@triton.jit
def leave_survey(x_GN, maxima_ptr, peaks_ptr, block_of_all, inverse):
    """Keep what is wanted of one block [GROUPS, GROUP], the number of which among those of all rows is given."""
    maxima = tl.max(x_GN, 1)
    tl.store(maxima_ptr + block_of_all * _GROUPS + tl.arange(0, _GROUPS), maxima)
    peak = tl.max(maxima, 0)
    base = tl.where((peak > float("-inf")) & (peak < float("inf")), peak, 0.0)
    tl.store(peaks_ptr + 2 * block_of_all, peak)
    tl.store(peaks_ptr + 2 * block_of_all + 1, tl.sum(tl.sum(weigh(x_GN, base, inverse), 1), 0))
