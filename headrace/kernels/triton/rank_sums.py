"""Sums over ranks whose devices write to each other's memory: one launch on each, and no other hop (one-shot, pushed).

Every rank writes what it has into an inbox in each other's memory, and reads its own inboxes once the others' values
are there. Small sums are written in words of 8 bytes, of which half says of which launch it is: whoever reads a word
sees whether it has come. Of large ones a flag follows, once all is written. A launch whose programs have whole rows can
leave the RMS norm of what it made too.

A launch has always as many programs, each with a number of its own of the launches it was in: that is what words and
flags say, and its parity which of two inboxes is used. That is free again: a rank that is in launch e has waited for
something that each other wrote in e - 1, and so after the end of e - 2, the last one to use the inbox.

Legend: N ranks, B programs, X width.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.dependent_launch import launch_options, take_turn
from headrace.kernels.triton.row_operations import norm_warps, normed_row

BLOCK = 4096
"""Elements that a program takes at once."""

WORDS = 512
"""That a program takes, all at once; a word holds 4 bytes of values."""

WORD_BYTES = 8
_WARPS = 8
_WORDS_PER_WARP = 128
_LOOKS = tl.constexpr(1024)
"""At what another rank writes, between two at what the host does, which is far away."""


@dataclass(frozen=True, eq=False)
class RankMemory:
    """The memory that launches of one kind use, on one rank.

    inboxes     int64 [N], where each rank's memory begins here: [2, N] inboxes of `inbox_bytes`, by who writes
    flags       int64 [N], where each rank's flags begin here: int32 [N, B], by who writes; None: sums go by words
    num_launches  int32 [B], of this rank's programs
    stop        int32 [1] that the host can write to: once it is not 0 nothing is waited for
    """

    inboxes: Tensor
    flags: Tensor | None
    num_launches: Tensor
    stop: Tensor
    inbox_bytes: int

    @property
    def max_bytes(self) -> int:
        """Of the values of one sum."""
        return self.inbox_bytes if self.flags is not None else self.num_launches.numel() * WORDS * 4

    def norms(self, num_rows: int) -> bool:
        """Whether a launch can norm as many rows of what it sums."""
        return self.flags is not None or num_rows <= self.num_launches.numel()


class SumNorm(NamedTuple):
    """`out_TX` = the RMS norm of the sum: weight [X], and what is added to the mean square. Of sums that end with
    a flag it has the bits of `row_operations.rms_norm`; by words the squares are added in another order."""

    weight_X: Tensor
    eps: float
    out_TX: Tensor


def sum_over_ranks(
    memory: RankMemory,
    rank: int,
    values: Tensor,
    out: Tensor,
    bias_X: Tensor | None = None,
    norm: SumNorm | None = None,
    *,
    adds: bool,
    pdl: bool = False,
    pushes: bool = True,
    takes: bool = True,
) -> None:
    """out = the sum of all ranks' values, or out += that sum, and then += bias; of the same bits on all ranks.

    Summed in float32 from rank 0 on, and rounded to their dtype after the sum and after each addition. All are
    contiguous, of one shape [T, X] and dtype, X is even, and they fit into an inbox. `norm`: as `RankMemory.norms`.
    `pushes` and `takes`: only that half, in tests.
    """
    num_blocks, size, width = memory.num_launches.numel(), values.element_size(), values.shape[-1]
    norm_X, eps, normed = norm or (None, 0.0, None)
    outputs = out, bias_X, norm_X, normed, eps
    common = {
        "RANK": rank, "RANKS": memory.inboxes.numel(), "ADDS": adds, "HAS_BIAS": bias_X is not None,
        "HAS_NORM": norm is not None, "PUSHES": pushes, "TAKES": takes, "PDL": pdl, **launch_options(pdl),
    }  # fmt: skip
    if memory.flags is None:
        row_words = width * size // 4
        span = WORDS if norm is None else row_words
        block = triton.next_power_of_2(span)
        _word_kernel[(num_blocks,)](
            values, *outputs, memory.inboxes, memory.num_launches, memory.stop, values.nbytes // 4, row_words,
            memory.inbox_bytes // WORD_BYTES, SPAN=span, BLOCK=block,
            num_warps=max(1, min(16, block // _WORDS_PER_WARP)), **common,
        )  # fmt: skip
        return
    span = BLOCK if norm is None else width
    block = triton.next_power_of_2(span)
    _flag_kernel[(num_blocks,)](
        values, *outputs, memory.inboxes, memory.flags, memory.num_launches, memory.stop, values.numel(), width,
        memory.inbox_bytes // size, PROGRAMS=num_blocks, ON_DEVICE=values.is_cuda, SPAN=span,
        BLOCK=block, num_warps=_WARPS if norm is None else norm_warps(block), **common,
    )  # fmt: skip


@triton.jit
def _inbox(inboxes, rank, launch, source, inbox_size, RANKS: tl.constexpr, dtype: tl.constexpr):
    """Where a rank finds what another one writes in this launch."""
    start = tl.multiple_of(tl.load(inboxes + rank).to(tl.pointer_type(dtype)), 16)
    return start + ((launch & 1) * RANKS + source).to(tl.int64) * inbox_size


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The two values of a word, in float32; of float32 it is one, and the other is 0."""
    if dtype.primitive_bitwidth == 32:
        low, high = word.to(dtype, bitcast=True), tl.zeros_like(word).to(tl.float32)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _word(low, high, dtype: tl.constexpr):
    """The word of two values, rounded."""
    if dtype.primitive_bitwidth == 32:
        word = low.to(tl.int32, bitcast=True)
    else:
        word = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word |= high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return word


@triton.jit
def _added(word, other, dtype: tl.constexpr):
    low, high = _halves(word, dtype)
    other_low, other_high = _halves(other, dtype)
    return _word(low + other_low, high + other_high, dtype)


@triton.jit
def _normed(word, weight, eps, SPAN: tl.constexpr, dtype: tl.constexpr):
    """The words of a row, normed and weighed, rounded in between."""
    low, high = _halves(word, dtype)
    WIDTH: tl.constexpr = SPAN * 32 // dtype.primitive_bitwidth
    scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / WIDTH + eps)
    low, high = _halves(_word(low * scale, high * scale, dtype), dtype)
    weight_low, weight_high = _halves(weight, dtype)
    return _word(low * weight_low, high * weight_high, dtype)


@triton.jit
def _word_kernel(
    values_ptr, out_ptr, bias_ptr, norm_ptr, normed_ptr, eps, inboxes, num_launches, stop, num_words, width,
    inbox_words,
    RANK: tl.constexpr, RANKS: tl.constexpr, ADDS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    PUSHES: tl.constexpr, TAKES: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    take_turn(PDL)
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    words_ptr, sums_ptr = values_ptr.to(tl.pointer_type(tl.int32)), out_ptr.to(tl.pointer_type(tl.int32))
    program = tl.program_id(0)
    launch = tl.load(num_launches + program) + 1
    columns = tl.arange(0, BLOCK)
    at = program * SPAN + columns
    mask = (columns < SPAN) & (at < num_words)
    if program * SPAN < num_words:
        own = tl.load(words_ptr + at, mask=mask, other=0)
        if PUSHES:
            tagged = (launch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
            for rank in tl.static_range(RANKS):
                if rank != RANK:
                    tl.store(_inbox(inboxes, rank, launch, RANK, inbox_words, RANKS, tl.int64) + at, tagged, mask=mask)
            tl.debug_barrier()  # it is on its way before anything is waited for
        if TAKES:
            before = own
            if ADDS:  # while the others' are on their way
                before = tl.load(sums_ptr + at, mask=mask, other=0)
            low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for rank in tl.static_range(RANKS):
                word = own
                if rank != RANK:
                    inbox = _inbox(inboxes, RANK, launch, rank, inbox_words, RANKS, tl.int64)
                    found = tl.load(inbox + at, mask=mask, other=0, volatile=True)
                    num_looks = 0
                    is_over = 0
                    num_missing = tl.sum(((found >> 32).to(tl.int32) != launch).to(tl.int32) * mask.to(tl.int32), 0)
                    while (num_missing > 0) & (is_over == 0):
                        found = tl.load(inbox + at, mask=mask, other=0, volatile=True)
                        num_missing = tl.sum(((found >> 32).to(tl.int32) != launch).to(tl.int32) * mask.to(tl.int32), 0)
                        num_looks += 1
                        is_over = tl.load(stop, mask=num_looks % _LOOKS == 0, other=0, volatile=True)
                    word = found.to(tl.int32)
                low_part, high_part = _halves(word, dtype)
                low += low_part
                high += high_part
            total = _word(low, high, dtype)
            if ADDS:
                total = _added(before, total, dtype)
            if HAS_BIAS:
                bias = tl.load(bias_ptr.to(tl.pointer_type(tl.int32)) + at % width, mask=mask, other=0)
                total = _added(total, bias, dtype)
            tl.store(sums_ptr + at, total, mask=mask)
            if HAS_NORM:
                weight = tl.load(norm_ptr.to(tl.pointer_type(tl.int32)) + columns, mask=mask, other=0)
                normed = _normed(total, weight, eps, SPAN, dtype)
                tl.store(normed_ptr.to(tl.pointer_type(tl.int32)) + at, normed, mask=mask)
    if TAKES:
        tl.store(num_launches + program, launch)


@triton.jit
def _flag(flags, rank, source, PROGRAMS: tl.constexpr):
    return tl.load(flags + rank).to(tl.pointer_type(tl.int32)) + source * PROGRAMS + tl.program_id(0)


@triton.jit
def _raise_flag(flag, launch, ON_DEVICE: tl.constexpr):
    """What this program has written before is there for whoever sees it. A store: not every link has atomics."""
    if ON_DEVICE:
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
            " @first st.release.sys.global.u32 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [flag.to(tl.int64), launch], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.atomic_xchg(flag, launch, sem="release", scope="sys")


@triton.jit
def _await_flag(flag, launch, stop, LOOKS: tl.constexpr, ON_DEVICE: tl.constexpr):
    """What another program wrote before its flag is there afterwards. One thread looks, and does not write: where many
    programs do so by atomics the flag itself does not come through."""
    if ON_DEVICE:
        tl.inline_asm_elementwise(
            "{ .reg .pred is; .reg .u32 thread, over; .reg .s32 looks, ahead; mov.s32 looks, 0; mov.u32 thread, %tid.x;"
            " setp.ne.u32 is, thread, 0; @is bra done;"
            " look: ld.acquire.sys.global.s32 ahead, [$1]; sub.s32 ahead, ahead, $2;"  # numbers may have begun anew
            " setp.ge.s32 is, ahead, 0; @is bra done;"
            " add.s32 looks, looks, 1; setp.lt.s32 is, looks, $4; @is bra look; mov.s32 looks, 0;"
            " ld.volatile.global.u32 over, [$3]; setp.eq.u32 is, over, 0; @is bra look;"
            " done: mov.u32 $0, 0; }",
            "=r,l,r,l,r", [flag.to(tl.int64), launch, stop.to(tl.int64), LOOKS], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _flag_kernel(
    values_ptr, out_ptr, bias_ptr, norm_ptr, normed_ptr, eps, inboxes, flags, num_launches, stop, num_elements, width,
    inbox_elements,
    RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, ADDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, PUSHES: tl.constexpr, TAKES: tl.constexpr, ON_DEVICE: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    take_turn(PDL)
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    program = tl.program_id(0)
    launch = tl.load(num_launches + program) + 1
    size = tl.cdiv(tl.cdiv(num_elements, SPAN), PROGRAMS) * SPAN
    first = program * size
    end = tl.minimum(first + size, num_elements)
    columns = tl.arange(0, BLOCK)
    if first < end:
        if PUSHES:
            for start in range(first, end, SPAN):
                at = start + columns
                mask = (columns < SPAN) & (at < end)
                value = tl.load(values_ptr + at, mask=mask)
                for rank in tl.static_range(RANKS):
                    if rank != RANK:
                        inbox = _inbox(inboxes, rank, launch, RANK, inbox_elements, RANKS, dtype)
                        tl.store(inbox + at, value, mask=mask)
            tl.debug_barrier()  # one thread raises the flag, of what all have written
            for rank in tl.static_range(RANKS):
                if rank != RANK:
                    _raise_flag(_flag(flags, rank, RANK, PROGRAMS), launch, ON_DEVICE)
        if TAKES:
            for rank in tl.static_range(RANKS):
                if rank != RANK:
                    _await_flag(_flag(flags, RANK, rank, PROGRAMS), launch, stop, _LOOKS, ON_DEVICE)
            tl.debug_barrier()
            for start in range(first, end, SPAN):
                at = start + columns
                mask = (columns < SPAN) & (at < end)
                total = tl.zeros([BLOCK], tl.float32)
                for rank in tl.static_range(RANKS):
                    if rank == RANK:
                        value = tl.load(values_ptr + at, mask=mask, other=0.0)
                    else:
                        inbox = _inbox(inboxes, RANK, launch, rank, inbox_elements, RANKS, dtype)
                        value = tl.load(inbox + at, mask=mask, other=0.0, cache_modifier=".cg")
                    total += value.to(tl.float32)
                total = total.to(dtype)
                if ADDS:
                    before = tl.load(out_ptr + at, mask=mask, other=0.0)
                    total = (before.to(tl.float32) + total.to(tl.float32)).to(dtype)
                if HAS_BIAS:
                    bias = tl.load(bias_ptr + at % width, mask=mask, other=0.0)
                    total = (total.to(tl.float32) + bias.to(tl.float32)).to(dtype)
                tl.store(out_ptr + at, total, mask=mask)
                if HAS_NORM:
                    weight = tl.load(norm_ptr + columns, mask=mask, other=0.0).to(tl.float32)
                    tl.store(normed_ptr + at, normed_row(total.to(tl.float32), weight, eps, SPAN, dtype), mask=mask)
    if TAKES:
        tl.store(num_launches + program, launch)
