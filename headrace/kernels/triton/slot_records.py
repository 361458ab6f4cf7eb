"""Slot records: what a sequence's slot needs on the device before its first step, as the step buffer carries it.

Owns the layout and the kernel that writes the device's tables: int32 [SLOT_WORDS], word 0 the slot (below 0: nothing),
then the float32 bits of its parameters (`sample_rows` says which), then the seed's low and high word.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.threshold_search import ROW_WORDS

SLOT_WORDS = 1 + ROW_WORDS + 2


@triton.jit(do_not_specialize_on_alignment=["records_ptr"])
def _write_kernel(records_ptr, params_ptr, seeds_ptr, WORDS: tl.constexpr):
    record_ptr = records_ptr + tl.program_id(0) * (WORDS + 3)
    slot = tl.load(record_ptr)
    if slot < 0:
        return
    words = tl.arange(0, WORDS)
    tl.store(params_ptr + slot * WORDS + words, tl.load(record_ptr + 1 + words).to(tl.float32, bitcast=True))
    pair = tl.arange(0, 2)
    tl.store(seeds_ptr + 2 * slot + pair, tl.load(record_ptr + 1 + WORDS + pair))


def write_records(records_NW: Tensor, slot_params: Tensor, slot_seeds: Tensor) -> None:
    """Scatter records [n, SLOT_WORDS] into the tables `sample_rows` reads; slots are distinct."""
    assert records_NW.is_contiguous() and records_NW.shape[1] == SLOT_WORDS
    _write_kernel[(len(records_NW),)](records_NW, slot_params, slot_seeds, WORDS=ROW_WORDS, num_warps=1)


def make_record(slot: int, params: npt.NDArray[np.float32], seed_words: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """One record, from float32 [ROW_WORDS] and int32 [2]."""
    return np.concatenate((np.array([slot], np.int32), params.view(np.int32), seed_words))
