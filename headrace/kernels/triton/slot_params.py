"""What the sampling kernels know of a slot: its parameters and its seed, and the record that brings both to the device.

Parameters are float32 [slots, NUM_PARAMS], in the columns named here. A record is int32 [RECORD_SIZE]: the slot (below
0: nothing to write), the float32 bits of its parameters, the seed's low and high word; the step buffer carries it.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from torch import Tensor

from headrace.types.request import Float32Array, Int32Array

NUM_PARAMS = 9
TEMPERATURE = tl.constexpr(0)  # T; 0 is greedy
DIVISOR = tl.constexpr(1)  # of logits in log-probabilities: T or 1
LOGPROBS_OF = tl.constexpr(2)  # OF_MODEL, OF_SAMPLED or OF_POINT
NUM_TOP = tl.constexpr(3)  # most probable ids wanted
TOP_K = tl.constexpr(4)  # 0 is off
TOP_P = tl.constexpr(5)  # 1 is off
MIN_P = tl.constexpr(6)  # T log(min_p); -inf is off
NUM_ASKED = tl.constexpr(7)  # ids whose log-probabilities are wanted
PROCESSORS = tl.constexpr(8)  # UNPROCESSED, PROCESSED or MASKED

OF_MODEL = tl.constexpr(0)  # log-probabilities of the model's own distribution
OF_SAMPLED = tl.constexpr(1)  # of the one drawn from: after logits processors, top-k, top-p and min-p
OF_POINT = tl.constexpr(2)  # of all mass on the token itself: sampled greedily

UNPROCESSED = tl.constexpr(0)  # no logits processor acts: the slot's table of them means nothing
PROCESSED = tl.constexpr(1)  # bias or penalties do
MASKED = tl.constexpr(2)  # the mask of stop ids alone does, as long as it lasts

RECORD_SIZE = 1 + NUM_PARAMS + 2
_NUM_PARAMS = tl.constexpr(NUM_PARAMS)
_PARAM_LANES = tl.constexpr(triton.next_power_of_2(NUM_PARAMS))
_RECORD_SIZE = tl.constexpr(RECORD_SIZE)


@triton.jit
def param_ptr(params_ptr, slot, column: tl.constexpr):
    """Where one parameter of a slot is."""
    return params_ptr + slot * _NUM_PARAMS + column


@triton.jit
def load_param(params_ptr, slot, column: tl.constexpr):
    """One parameter of a slot."""
    return tl.load(param_ptr(params_ptr, slot, column))


@triton.jit(do_not_specialize_on_alignment=["records_ptr"])
def _write_kernel(records_ptr, params_ptr, seeds_ptr):
    record_ptr = records_ptr + tl.program_id(0) * _RECORD_SIZE
    slot = tl.load(record_ptr)
    if slot < 0:
        return
    columns = tl.arange(0, _PARAM_LANES)
    mask = columns < _NUM_PARAMS
    words = tl.load(record_ptr + 1 + columns, mask=mask, other=0)
    tl.store(params_ptr + slot * _NUM_PARAMS + columns, words.to(tl.float32, bitcast=True), mask=mask)
    pair = tl.arange(0, 2)
    tl.store(seeds_ptr + 2 * slot + pair, tl.load(record_ptr + 1 + _NUM_PARAMS + pair))


def write_records(records_NR: Tensor, slot_params: Tensor, slot_seeds: Tensor) -> None:
    """Scatter records [n, RECORD_SIZE] into the tables [slots, NUM_PARAMS] and int32 [slots, 2]; slots are distinct."""
    assert records_NR.is_contiguous() and records_NR.shape[1] == RECORD_SIZE
    _write_kernel[(len(records_NR),)](records_NR, slot_params, slot_seeds, num_warps=1)


def make_record(slot: int, params: Float32Array, seed: int) -> Int32Array:
    """One record, from float32 [NUM_PARAMS]."""
    return np.concatenate(([np.int32(slot)], params.view(np.int32), seed_words(np.array([seed], np.uint64))[0]))


def seed_words(seeds: npt.NDArray[np.uint64]) -> Int32Array:
    """Seeds [n] as rows of the table of seeds, int32 [n, 2]: low and high word."""
    return np.ascontiguousarray(seeds, dtype="<u8").view("<i4").reshape(-1, 2)
