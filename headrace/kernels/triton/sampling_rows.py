"""One pass over a step's logits: the sampled or greedy token of every row and its log-probability.

Owns the two kernels of that pass. The vocabulary is cut into blocks at fixed columns: the first kernel leaves per block
the greatest logit, the sum of exponentials and the best candidate, the second reduces a row's blocks in order. A row's
result is a function of that row alone, whatever the batch. The greatest logit of each block and the normaliser of each
row stay in the workspace, where `top_rows` finds them. Ranks that share the vocabulary in whole blocks walk each their
own, and all reduce what all have found: the same bits as of whole rows.

Two rows of logits are told apart: the token is *drawn* from what logits processors left (`drawn`), its log-probability
may be *stated* of that or of the model's (`stated`). Without processors they are the same memory, read once.

Noise words are those of `headrace.sampling.noise`, bit for bit, keyed on the device by (seed, position, token). Scores
and sums are float32, where the CPU's are float64: two tokens whose scores lie within about 1e-6 of each other may
change places. Sources: Philox, Salmon et al. (SC 2011); lowbias32, Chris Wellons (public domain).

Legend: S rows, V vocabulary, B blocks of a row, N ranks.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.fast_math import fast_exp, fast_log2, fast_reciprocal
from headrace.kernels.triton.last_tokens import LastTokens, count_tokens
from headrace.kernels.triton.logits_processors import ProcessedRows, drawn_row, load_logits, slot_and_copy, stated_row
from headrace.kernels.triton.row_survey import BLOCK
from headrace.kernels.triton.slot_params import (
    DIVISOR,
    LOGPROBS_OF,
    OF_MODEL,
    OF_POINT,
    OF_SAMPLED,
    TEMPERATURE,
    load_param,
)

_GREATEST, _TOTAL, _SCORE, _BASE, _LOGIT, _TOKEN = (tl.constexpr(word) for word in range(6))
"""What the first kernel leaves of a block: the token as an int32's bits, and what is stated of it."""
PARTIAL_WORDS = tl.constexpr(6)
_SLACK = tl.constexpr(1.0 - 1e-5)  # what the rounding of a bound and of a score can come to
_LANES = 512  # columns at a time


@triton.jit
def philox_keys(seed_low, seed_high, position):
    """k0 and k1 of Philox4x32-10 with counter (position, 0, 0, 0): positions stay below 2^31."""
    a = position.to(tl.uint32)
    b = a * 0
    c = a * 0
    d = a * 0
    key0 = seed_low.to(tl.uint32, bitcast=True)
    key1 = seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        left = a.to(tl.uint64) * 0xD2511F53
        right = c.to(tl.uint64) * 0xCD9E8D57
        a = (right >> 32).to(tl.uint32) ^ b ^ key0
        c = (left >> 32).to(tl.uint32) ^ d ^ key1
        b = right.to(tl.uint32)
        d = left.to(tl.uint32)
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return a, b


@triton.jit
def _mix(x):
    """lowbias32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def noise_words(tokens, key0, key1):
    """As `headrace.sampling.noise.noise_words`."""
    return _mix(_mix(tokens.to(tl.uint32) * 0x9E3779B1 + key0) ^ key1)


@triton.jit
def _uniform(words):
    """v = (word + 0.5) 2^-32."""
    return (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _exponential(words):
    """-log1p(-v): by a series where v is small, which is where most draws are won."""
    v = _uniform(words)
    series = v * (1.0 + v * (0.5 + v * (0.33333334 + v * (0.25 + v * (0.2 + v * 0.16666667)))))
    return tl.where(v < 0.1, series, -0.6931471805599453 * fast_log2(tl.maximum(1.0 - v, 2.9802322387695312e-08)))


@triton.jit
def _best_of_lanes(scores, columns, LIMIT: tl.constexpr):
    """The greatest score and its column, the lowest among equals."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, columns, LIMIT - 1), 0)


@triton.jit
def _greatest_logits(
    stated_ptr, drawn_ptr, first, LIMIT: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    ARE_APART: tl.constexpr,
):  # fmt: skip
    """The block's greatest logit of both rows."""
    lanes = tl.arange(0, LANES)
    stated = tl.full([LANES], float("-inf"), tl.float32)
    drawn = stated
    for start in tl.range(0, BLOCK_V, LANES, loop_unroll_factor=2):
        columns = first + start + lanes
        stated = tl.maximum(stated, load_logits(stated_ptr, columns, LIMIT))
        if ARE_APART:
            drawn = tl.maximum(drawn, load_logits(drawn_ptr, columns, LIMIT))
    greatest = tl.max(stated, 0)
    drawn_greatest = greatest
    if ARE_APART:
        drawn_greatest = tl.max(drawn, 0)
    return greatest, drawn_greatest


@triton.jit
def _weigh_and_score(
    stated_ptr, drawn_ptr, first, base, drawn_base, divisor, temperature, inverse, key0, key1, stated_threshold,
    threshold, FIRST: tl.constexpr, LIMIT: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr, ARE_APART: tl.constexpr,
):  # fmt: skip
    """Per lane [LANES]: the sum of exp((l - base) / divisor) of what is stated; of what is drawn the best score, the
    second best, and the best one's column. At T = 0 a score is the logit; else an upper bound of exp((l - base) / T) /
    E with E the token's exponential noise: the greatest of those is the Gumbel-max winner, as it is the greatest
    l / T - log(E). With v uniform and E = -log1p(-v) >= v, exp(...) / v is such a bound, and needs no logarithm."""
    lanes = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float32)
    bests = tl.full([LANES], float("-inf"), tl.float32)
    seconds = bests
    winners = tl.full([LANES], -1, tl.int32)
    for start in tl.range(0, BLOCK_V, LANES, loop_unroll_factor=2):
        columns = first + start + lanes
        stated = load_logits(stated_ptr, columns, LIMIT)
        weights = fast_exp((stated - base) * (1.0 / divisor))
        sums += tl.where(stated < stated_threshold, 0.0, weights)  # NaN stays NaN
        logits = stated
        if ARE_APART:
            logits = load_logits(drawn_ptr, columns, LIMIT)
        scores = logits
        if temperature > 0.0:
            if ARE_APART:
                weights = fast_exp((logits - drawn_base) * inverse)
            else:
                if temperature != divisor:
                    weights = fast_exp((logits - drawn_base) * inverse)
            words = noise_words(FIRST + columns, key0, key1)
            scores = weights * fast_reciprocal(_uniform(words))
        if HAS_THRESHOLDS:
            scores = tl.where(logits >= threshold, scores, float("-inf"))
        is_better = scores > bests
        seconds = tl.maximum(seconds, tl.where(is_better, bests, scores))
        bests, winners = tl.where(is_better, scores, bests), tl.where(is_better, columns, winners)
    return tl.sum(sums, 0), bests, seconds, winners


@triton.jit
def _score_exactly(
    drawn_ptr, first, base, inverse, key0, key1, threshold, FIRST: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, HAS_THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """The block's best score and its column, every score exact."""
    lanes = tl.arange(0, LANES)
    bests = tl.full([LANES], float("-inf"), tl.float32)
    winners = tl.full([LANES], -1, tl.int32)
    for start in tl.range(0, BLOCK_V, LANES):
        columns = first + start + lanes
        logits = load_logits(drawn_ptr, columns, LIMIT)
        words = noise_words(FIRST + columns, key0, key1)
        scores = fast_exp((logits - base) * inverse) * fast_reciprocal(_exponential(words))
        if HAS_THRESHOLDS:
            scores = tl.where(logits >= threshold, scores, float("-inf"))
        is_better = scores > bests
        bests, winners = tl.where(is_better, scores, bests), tl.where(is_better, columns, winners)
    return _best_of_lanes(bests, winners, LIMIT)


@triton.jit
def _walk_block(
    stated_ptr, drawn_ptr, first, divisor, temperature, key0, key1, stated_threshold, threshold,
    FIRST: tl.constexpr, LIMIT: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr, ARE_APART: tl.constexpr,
):  # fmt: skip
    """The greatest logit of what is stated and the sum of weights relative to it; of what is drawn the greatest logit
    (or 0), the best score, relative to that, and its column. ARE_APART: the two are different memory."""
    greatest, drawn_greatest = _greatest_logits(stated_ptr, drawn_ptr, first, LIMIT, BLOCK_V, LANES, ARE_APART)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    drawn_base = tl.where(drawn_greatest == float("-inf"), 0.0, drawn_greatest)
    inverse = 1.0 / tl.where(temperature > 0.0, temperature, 1.0)
    total, bests, seconds, winners = _weigh_and_score(
        stated_ptr, drawn_ptr, first, base, drawn_base, divisor, temperature, inverse, key0, key1, stated_threshold,
        threshold, FIRST, LIMIT, BLOCK_V, LANES, HAS_THRESHOLDS, ARE_APART,
    )  # fmt: skip
    best, column = _best_of_lanes(bests, winners, LIMIT)
    if temperature > 0.0:
        rival = tl.max(tl.where(winners == column, seconds, bests), 0)
        word = noise_words(FIRST + column, key0, key1)
        best *= _uniform(word) * fast_reciprocal(_exponential(word))  # from its bound to its score
        if rival >= best * _SLACK:  # rarely: another's bound reaches the best score
            best, column = _score_exactly(
                drawn_ptr, first, drawn_base, inverse, key0, key1, threshold, FIRST, LIMIT, BLOCK_V, LANES,
                HAS_THRESHOLDS,
            )  # fmt: skip
        best = tl.where(best > 0.0, tl.log(tl.maximum(best, 1e-37)), float("-inf"))
    return greatest, total, drawn_base, best, column


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr", "copy_of_ptr"])
def _blocks_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, params_ptr, slots_ptr, seeds_ptr, positions_ptr, thresholds_ptr, partial_ptr,
    VOCAB: tl.constexpr, FIRST: tl.constexpr, LIMIT: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr, HAS_COPIES: tl.constexpr,
):  # fmt: skip
    """One (block, row), LANES columns at a time, so that little is held at once. The block is walked twice: for its
    greatest logit, then for everything relative to that; a third time where the bounds do not tell who won. Column 0 is
    token FIRST, and from LIMIT on there are none."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    slot, copy = slot_and_copy(slots_ptr, copy_of_ptr, row, HAS_COPIES)
    if slot < 0:
        return
    temperature = load_param(params_ptr, slot, TEMPERATURE)
    divisor = load_param(params_ptr, slot, DIVISOR)
    logprobs_of = load_param(params_ptr, slot, LOGPROBS_OF)
    seed_ptr = seeds_ptr + 2 * slot
    key0, key1 = philox_keys(tl.load(seed_ptr), tl.load(seed_ptr + 1), tl.load(positions_ptr + row))
    threshold = float("-inf")
    stated_threshold = float("-inf")
    if HAS_THRESHOLDS:
        threshold = tl.load(thresholds_ptr + row)
        stated_threshold = tl.where(logprobs_of == OF_SAMPLED, threshold, stated_threshold)
    drawn_ptr = drawn_row(logits_ptr, copies_ptr, row, copy, VOCAB, HAS_COPIES)
    stated_ptr = stated_row(logits_ptr, copies_ptr, row, copy, logprobs_of, VOCAB, HAS_COPIES)
    first = block * BLOCK_V

    if HAS_COPIES and (copy >= 0) & (logprobs_of == OF_MODEL):
        greatest, total, drawn_base, best, column = _walk_block(
            stated_ptr, drawn_ptr, first, divisor, temperature, key0, key1, stated_threshold, threshold,
            FIRST, LIMIT, BLOCK_V, LANES, HAS_THRESHOLDS, True,
        )  # fmt: skip
    else:
        greatest, total, drawn_base, best, column = _walk_block(
            drawn_ptr, drawn_ptr, first, divisor, temperature, key0, key1, stated_threshold, threshold,
            FIRST, LIMIT, BLOCK_V, LANES, HAS_THRESHOLDS, False,
        )  # fmt: skip
    column = tl.minimum(tl.maximum(column, first), LIMIT - 1)  # some token, should all be NaN
    partial_ptr += PARTIAL_WORDS * (row * tl.cdiv(VOCAB, BLOCK_V) + block)
    tl.store(partial_ptr + _GREATEST, greatest)
    tl.store(partial_ptr + _TOTAL, total)
    tl.store(partial_ptr + _SCORE, best)
    tl.store(partial_ptr + _BASE, drawn_base)
    tl.store(partial_ptr + _LOGIT, tl.load(stated_ptr + column).to(tl.float32))
    tl.store(partial_ptr + _TOKEN, (FIRST + column).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "copy_of_ptr", "tokens_ptr", "logprobs_ptr", "last_ptr"])
def _reduce_kernel(
    params_ptr, slots_ptr, partial_ptr, norms_ptr, tokens_ptr, logprobs_ptr, last_ptr, processors_ptr, counts_ptr,
    SHARE_BLOCKS: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, HAS_LAST: tl.constexpr,
    VOCAB: tl.constexpr,
):  # fmt: skip
    """One row: the best of its blocks' candidates, and what log-probabilities are reckoned with. Each rank's
    SHARE_BLOCKS of all rows lie together."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = load_param(params_ptr, slot, TEMPERATURE)
    inverse = 1.0 / load_param(params_ptr, slot, DIVISOR)
    logprobs_of = load_param(params_ptr, slot, LOGPROBS_OF)
    blocks = tl.arange(0, BLOCKS)
    mask = blocks < NUM_BLOCKS
    share_rows = blocks // SHARE_BLOCKS * tl.num_programs(0) + row
    source = partial_ptr + (share_rows * SHARE_BLOCKS + blocks % SHARE_BLOCKS) * PARTIAL_WORDS
    greatest = tl.load(source + _GREATEST, mask=mask, other=float("-inf"))
    totals = tl.load(source + _TOTAL, mask=mask, other=0.0)
    scores = tl.load(source + _SCORE, mask=mask, other=float("-inf"))
    is_score = scores > float("-inf")  # neither an empty block nor NaN
    scores = tl.where(is_score, scores, float("-inf"))
    if temperature > 0.0:  # a block's score is relative to its base
        bases = tl.load(source + _BASE, mask=mask, other=0.0)
        highest = tl.max(tl.where(is_score, bases, float("-inf")), 0)
        scores = tl.where(is_score, (bases - highest) * (1.0 / temperature) + scores, float("-inf"))
    _, winner = tl.max(scores, 0, return_indices=True)
    is_winner = blocks == tl.minimum(winner, NUM_BLOCKS - 1)
    logit = tl.sum(tl.where(is_winner, tl.load(source + _LOGIT, mask=mask, other=0.0), 0.0), 0)
    tokens = tl.load(source + _TOKEN, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    token = tl.sum(tl.where(is_winner, tokens, 0), 0)
    top = tl.max(greatest, 0)
    log_total = tl.log(tl.sum(tl.where(totals == 0.0, 0.0, totals * tl.exp((greatest - top) * inverse)), 0))
    logprob = (logit - top) * inverse - log_total
    is_point = logprobs_of == OF_POINT
    zero = log_total - log_total  # NaN for a row that is not finite, whatever it is asked for
    tl.store(norms_ptr + 2 * row, tl.where(is_point, 0.0, top))
    tl.store(norms_ptr + 2 * row + 1, tl.where(is_point, zero, log_total))
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, tl.where(is_point, zero, logprob))
    if HAS_LAST:
        tl.store(last_ptr + slot, token)
        count_tokens(token, slot, slot >= 0, params_ptr, processors_ptr, counts_ptr, VOCAB)


@dataclass(frozen=True)
class SamplingWorkspace:
    """Results of one pass over at most `max_rows` rows [R], in B blocks each.

    partial_RBW   float32 [R, B, PARTIAL_WORDS]; word 0 is the greatest logit of the block, of what the log-probability
                  is of
    norms_R2      float32 (top, log_total): a logit x has log-probability (x - top) / divisor - log_total; 0, 0 where
                  all of the probability is on the token itself; a row with NaN or +inf, or all -inf, has a log_total
                  that makes every one NaN
    """

    partial_RBW: Tensor
    norms_R2: Tensor

    @classmethod
    def make(cls, max_rows: int, vocab_size: int, device: torch.device) -> SamplingWorkspace:
        """Allocate for `max_rows` rows of `vocab_size` logits."""
        num_blocks = triton.cdiv(vocab_size, BLOCK)
        return cls(
            torch.empty(max_rows, num_blocks, PARTIAL_WORDS.value, dtype=torch.float32, device=device),
            torch.empty(max_rows, 2, dtype=torch.float32, device=device),
        )

    def room(self, num_rows: int, num_columns: int) -> Tensor:
        """For what `walk_rows` leaves of these rows: [S, B, PARTIAL_WORDS]."""
        num_blocks, words = triton.cdiv(num_columns, BLOCK), PARTIAL_WORDS.value
        return self.partial_RBW.view(-1)[: num_rows * num_blocks * words].view(num_rows, num_blocks, words)


class VocabularyShare(NamedTuple):
    """What the columns of logits are: so many tokens from `first` on; columns beyond those are padding."""

    first: int
    num_tokens: int


def walk_rows(
    logits_SV: Tensor,
    share: VocabularyShare,
    slots_S: Tensor,
    positions_S: Tensor,
    slot_params: Tensor,
    slot_seeds: Tensor,
    thresholds_S: Tensor | None,
    partial_SBW: Tensor,
    processed: ProcessedRows | None = None,
) -> None:
    """Leave what `reduce_rows` needs of these columns of a step's logits, of which `share` begins with a block; the
    rest as in `sample_rows`."""
    assert logits_SV.is_contiguous() and share.first % BLOCK == 0
    num_rows, num_columns = logits_SV.shape
    copies, copy_of = (logits_SV, slots_S) if processed is None else (processed.copies_SV, processed.copy_of_S)
    _blocks_kernel[(partial_SBW.shape[1], num_rows)](
        logits_SV, copies, copy_of, slot_params, slots_S, slot_seeds, positions_S,
        slot_params if thresholds_S is None else thresholds_S, partial_SBW, VOCAB=num_columns, FIRST=share.first,
        LIMIT=share.num_tokens, BLOCK_V=BLOCK, LANES=_LANES, HAS_THRESHOLDS=thresholds_S is not None,
        HAS_COPIES=processed is not None, num_warps=4,
    )  # fmt: skip


def reduce_rows(
    partial_NSBW: Tensor,
    slots_S: Tensor,
    slot_params: Tensor,
    norms_R2: Tensor,
    tokens_S: Tensor,
    logprobs_S: Tensor,
    last: LastTokens | None,
) -> None:
    """As `sample_rows`, of what `walk_rows` left of each rank's columns, by rank: contiguous."""
    assert partial_NSBW.is_contiguous()
    num_shares, num_rows, share_blocks, _ = partial_NSBW.shape
    num_blocks = num_shares * share_blocks
    last_tokens, processors, counts, vocab_size = tokens_S, tokens_S, tokens_S, 0
    if last is not None:
        last_tokens, processors, counts = last.tokens, last.tables.processors, last.tables.counts
        vocab_size = counts.shape[1]
    _reduce_kernel[(num_rows,)](
        slot_params, slots_S, partial_NSBW, norms_R2, tokens_S, logprobs_S, last_tokens, processors, counts,
        SHARE_BLOCKS=share_blocks, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        HAS_LAST=last is not None, VOCAB=vocab_size, num_warps=1,
    )  # fmt: skip


def sample_rows(
    logits_SV: Tensor,
    slots_S: Tensor,
    positions_S: Tensor,
    slot_params: Tensor,
    slot_seeds: Tensor,
    thresholds_S: Tensor | None,
    workspace: SamplingWorkspace,
    tokens_S: Tensor,
    logprobs_S: Tensor,
    last: LastTokens | None,
    processed: ProcessedRows | None = None,
) -> None:
    """Sample one token per row.

    logits_SV     any float dtype, contiguous; not changed
    slots_S       int32; a row whose slot is below 0 is skipped
    positions_S   int32, absolute positions of the new tokens
    slot_params, slot_seeds   as `slot_params` has them
    thresholds_S  float32: least logit that may be drawn, or None
    tokens_S, logprobs_S   int32 and float32, written; of a row with NaN or +inf, or all -inf, some token and NaN
    last          where the slots' tokens are left and counted, or None
    processed     rows to draw from processed copies instead (logits are float32 then); log-probabilities of the model
                  stay those of logits_SV
    """
    num_rows, vocab_size = logits_SV.shape
    partial_SBW, whole = workspace.room(num_rows, vocab_size), VocabularyShare(0, vocab_size)
    walk_rows(
        logits_SV, whole, slots_S, positions_S, slot_params, slot_seeds, thresholds_S, partial_SBW, processed
    )  # fmt: skip
    reduce_rows(partial_SBW[None], slots_S, slot_params, workspace.norms_R2, tokens_S, logprobs_S, last)
