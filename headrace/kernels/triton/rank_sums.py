"""Sums over ranks whose devices write to each other's memory: one launch on each, and no other hop (one-shot, pushed).

Every rank writes what it has into a slot of each other's memory, then a flag; and reads its own slots as soon as the
flags are there. A launch has always as many programs, each with a number of its own of the launches it was in: that is
what flags say, and its parity which of two slots is used. A slot is free again: a rank that is in launch e has waited
for a flag of e - 1 of each other, which then had ended e - 2, the last one to use the slot.

Legend: N ranks, B programs, X width.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.dependent_launch import launch_options

BLOCK = 4096
"""Elements that a program takes at once."""

_WARPS = 8


@dataclass(frozen=True, eq=False)
class RankMemory:
    """The memory that launches of one kind use, on one rank.

    slots       int64 [N], where each rank's memory begins here: [2, N] slots of `slot_bytes`, by the rank that writes
    flags       int64 [N], where each rank's flags begin here: int32 [N, B], by the rank that writes
    num_launches  int32 [B], of this rank's programs
    stop        int32 [1] that the host can write to: once it is not 0 no flag is waited for
    """

    slots: Tensor
    flags: Tensor
    num_launches: Tensor
    stop: Tensor
    slot_bytes: int


def sum_over_ranks(
    memory: RankMemory,
    rank: int,
    values: Tensor,
    out: Tensor,
    bias_X: Tensor | None = None,
    *,
    adds: bool,
    pdl: bool = False,
    pushes: bool = True,
    takes: bool = True,
) -> None:
    """out = the sum of all ranks' values, or out += that sum, and then += bias; of the same bits on all ranks.

    Summed in float32 from rank 0 on, and rounded to their dtype after the sum and after each addition. All are
    contiguous, of one shape [*, X] and dtype, and fit into a slot. `pushes` and `takes`: only that half, in tests.
    """
    num_elements, num_blocks = values.numel(), memory.num_launches.numel()
    _sum_kernel[(num_blocks,)](
        values, out, bias_X, memory.slots, memory.flags, memory.num_launches, memory.stop, num_elements,
        values.shape[-1], memory.slot_bytes // values.element_size(),
        RANK=rank, RANKS=memory.slots.numel(), PROGRAMS=num_blocks, ADDS=adds, HAS_BIAS=bias_X is not None,
        PUSHES=pushes, TAKES=takes, ON_DEVICE=values.is_cuda, BLOCK=BLOCK, PDL=pdl,
        num_warps=_WARPS, **launch_options(pdl),
    )  # fmt: skip


@triton.jit
def _slot(slots, rank, launch, source, slot_elements, RANKS: tl.constexpr, dtype: tl.constexpr):
    """Where a rank finds what another one writes in this launch."""
    start = tl.multiple_of(tl.load(slots + rank).to(tl.pointer_type(dtype)), 16)
    return start + ((launch & 1) * RANKS + source).to(tl.int64) * slot_elements


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
def _sum_kernel(
    values_ptr, out_ptr, bias_ptr, slots, flags, num_launches, stop, num_elements, width, slot_elements,
    RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, ADDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PUSHES: tl.constexpr, TAKES: tl.constexpr, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    program = tl.program_id(0)
    launch = tl.load(num_launches + program) + 1
    size = tl.cdiv(tl.cdiv(num_elements, BLOCK), PROGRAMS) * BLOCK
    first = program * size
    end = tl.minimum(first + size, num_elements)
    if PUSHES:  # noqa: SIM102 (known when this is built)
        if first < end:
            for start in range(first, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                value = tl.load(values_ptr + at, mask=at < end)
                for rank in tl.static_range(RANKS):
                    if rank != RANK:
                        slot = _slot(slots, rank, launch, RANK, slot_elements, RANKS, dtype)
                        tl.store(slot + at, value, mask=at < end)
            tl.debug_barrier()  # one thread writes the flag, of what all have written
            for rank in tl.static_range(RANKS):
                if rank != RANK:
                    _raise_flag(_flag(flags, rank, RANK, PROGRAMS), launch, ON_DEVICE)
    if TAKES:
        if first < end:
            for rank in tl.static_range(RANKS):
                if rank != RANK:
                    flag = _flag(flags, RANK, rank, PROGRAMS)
                    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                    num_looks = 0
                    is_over = 0
                    while (seen - launch < 0) & (is_over == 0):  # of numbers that may have begun anew
                        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                        num_looks += 1
                        # The host is far away.
                        is_over = tl.load(stop, mask=num_looks % 1024 == 0, other=0, volatile=True)
            tl.debug_barrier()
            for start in range(first, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                total = tl.zeros([BLOCK], tl.float32)
                for rank in tl.static_range(RANKS):
                    if rank == RANK:
                        value = tl.load(values_ptr + at, mask=at < end, other=0.0)
                    else:
                        slot = _slot(slots, RANK, launch, rank, slot_elements, RANKS, dtype)
                        value = tl.load(slot + at, mask=at < end, other=0.0, cache_modifier=".cg")
                    total += value.to(tl.float32)
                total = total.to(dtype)
                if ADDS:
                    before = tl.load(out_ptr + at, mask=at < end, other=0.0)
                    total = (before.to(tl.float32) + total.to(tl.float32)).to(dtype)
                if HAS_BIAS:
                    bias = tl.load(bias_ptr + at % width, mask=at < end, other=0.0)
                    total = (total.to(tl.float32) + bias.to(tl.float32)).to(dtype)
                tl.store(out_ptr + at, total, mask=at < end)
        tl.store(num_launches + program, launch)
