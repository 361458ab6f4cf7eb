"""The flashinfer backend against our own kernels on the same pool, and an engine on it against one on ours.

The first test of each head size and dtype builds kernels, for up to a minute and a half where no folder holds them.
"""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace import Generation
from headrace.attention import AttentionShape, build_device_backend
from headrace.attention.base import Bucket, DeviceAttention, DeviceTables, HeadNorms, StepRows
from headrace.config import RopeSpec
from headrace.kernels.paged_kv import KvGeometry, KvPool
from headrace.kernels.rope_tables import rope_tables
from headrace.types.request import Int32Array
from tests.gpu.builders import DEVICE, Checkpoints, Starter, check_greedy, greedy, num_same, random_ids

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the package's own imports warn of
    pytest.importorskip("flashinfer", exc_type=ImportError)

pytestmark = pytest.mark.timeout(540)

NUM_SLOTS, CONTEXT, PAGE_SIZE, MAX_TOKENS = 40, 2500, 16, 1024
NO_GROUPS = np.zeros((0, 3), np.int32)
PARITY = 2e-2
"""Of the norm of bfloat16 outputs: both round the same inputs, weights and results."""
FP8_PARITY = 3e-2
"""One multiplies 8-bit keys as they are, the other may round products differently."""
BFLOAT16_TOLERANCE = 0.2
"""The most a bfloat16 log-probability may differ from the float32 model's, and so the gap of two near-equal tokens."""

Rows = tuple[Int32Array, Int32Array, Int32Array]


class Case:
    """One random pool and page table, and steps over it that do not depend on one another."""

    def __init__(self, shape: AttentionShape, kv_dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape = shape
        self.random = np.random.default_rng(shape.head_dim)
        num_columns = -(-CONTEXT // PAGE_SIZE)
        pages = self.random.permutation(np.arange(1, NUM_SLOTS * num_columns + 1)).astype(np.int32)
        self.page_table = pages.reshape(NUM_SLOTS, num_columns)
        geometry = KvGeometry(1, pages.size + 1, shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
        self.pool = KvPool(geometry, kv_dtype, DEVICE)
        for values in (self.pool.keys[0], self.pool.values[0]):
            values[shape.num_kv_heads * PAGE_SIZE :] = self.normal(*values[shape.num_kv_heads * PAGE_SIZE :].shape)
        self.rotary = rope_tables(RopeSpec(), shape.head_dim, CONTEXT, torch.bfloat16, DEVICE)
        self.norms = HeadNorms(self.normal(shape.head_dim), self.normal(shape.head_dim), 1e-6)

    def normal(self, *shape: int) -> Tensor:
        """bfloat16."""
        return torch.from_numpy(self.random.standard_normal(shape, np.float32)).to(DEVICE, torch.bfloat16)

    def backend(self, name: str) -> DeviceAttention:
        return build_device_backend(
            name, "fast", self.shape, self.pool, self.rotary, torch.bfloat16, max_tokens=MAX_TOKENS
        )

    def rows(self, kind: str) -> Rows:
        """Slots, starts and lengths: of one token each, of several, both in the order of a plan, or in any order."""
        count = int(self.random.integers(2, NUM_SLOTS))
        slots = self.random.permutation(NUM_SLOTS)[:count].astype(np.int32)
        lengths = self.random.choice((1, 2, 3, 17, 40), count).astype(np.int32)
        if kind == "decode":
            lengths[:] = 1
        elif kind == "prompts":
            lengths[lengths == 1] = 60
        elif kind == "plan":
            lengths = np.sort(lengths)
            lengths[: count // 2] = 1
        keep = np.cumsum(lengths) <= MAX_TOKENS
        slots, lengths = slots[keep], lengths[keep]
        starts = self.random.integers(0, CONTEXT - lengths).astype(np.int32)
        if kind == "prompts":
            starts[::2] = 0
        return slots, starts, lengths

    def run(self, backend: DeviceAttention, rows: Rows, qkv: Tensor) -> Tensor:
        """Enqueue one step, padded to the tokens of `qkv`; nothing waits for the device."""
        slots, starts, lengths = rows
        num_tokens = int(lengths.sum())
        bucket = Bucket(len(qkv), min(len(qkv), NUM_SLOTS), is_decode=False)
        metadata = np.zeros(backend.metadata_size, np.int32)
        backend.fill(metadata, StepRows(slots, starts, lengths, NO_GROUPS, self.page_table), bucket)
        positions = np.zeros(len(qkv), np.int32)
        positions[:num_tokens] = np.arange(num_tokens) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        table_rows = np.full(len(qkv), -1, np.int32)
        table_rows[:num_tokens] = np.repeat(slots, lengths)
        device = [
            torch.from_numpy(each).pin_memory().to(DEVICE, non_blocking=True)
            for each in (self.page_table, positions, table_rows, metadata)
        ]
        return backend.steps(DeviceTables(*device), bucket)[0].run(0, qkv, self.norms)[:num_tokens]

    def check(self, tolerance: float) -> None:
        """Steps of every kind, enqueued without waiting behind a device that is busy: the pinned memory that one step
        is planned in may not be used again before the device has read it."""
        steps = [self.rows(kind) for kind in ("decode", "prompts", "plan", "any") * 3]
        width = (self.shape.num_heads + 2 * self.shape.num_kv_heads) * self.shape.head_dim
        projected = [self.normal(int(rows[2].sum()) + 5, width) for rows in steps]
        outputs: list[list[Tensor]] = []
        before = [values.clone() for values in (self.pool.keys[0], self.pool.values[0])]
        pools = []
        for name in ("triton", "flashinfer"):
            backend = self.backend(name)
            self.pool.keys[0].copy_(before[0])
            self.pool.values[0].copy_(before[1])
            outputs.append([])
            for rows, qkv in zip(steps, projected, strict=True):
                torch.cuda._sleep(2_000_000)
                outputs[-1].append(self.run(backend, rows, qkv.clone()))
            pools.append([values.clone() for values in (self.pool.keys[0], self.pool.values[0])])
        for expected, found in zip(*outputs, strict=True):
            assert found.isfinite().all()
            assert float((found.double() - expected.double()).norm() / expected.double().norm()) < tolerance
        assert all(torch.equal(*(each.view(torch.uint8) for each in pair)) for pair in zip(*pools, strict=True))


SHAPES = {
    "groups of 4": AttentionShape(16, 4, 128),
    "groups of 2": AttentionShape(16, 8, 128),
    "groups of 7": AttentionShape(14, 2, 128),
    "groups of 16": AttentionShape(32, 2, 128),
    "heads of 64": AttentionShape(8, 2, 64),
    "heads of 256": AttentionShape(8, 2, 256),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_random_steps_are_those_of_our_own_kernels(shape: str) -> None:
    Case(SHAPES[shape]).check(PARITY)


@pytest.mark.parametrize("shape", ["groups of 4", "groups of 2"])
def test_keys_and_values_in_fp8(shape: str) -> None:
    Case(SHAPES[shape], torch.float8_e4m3fn).check(FP8_PARITY)


def test_an_engine_takes_the_same_greedy_tokens(checkpoints: Checkpoints, start: Starter) -> None:
    """Every token is the float32 model's up to near-ties on both engines, and most sequences are the same."""
    checkpoint = checkpoints.get("qwen3", dtype=torch.bfloat16)
    choose = random.Random(5)
    prompts = [random_ids(choose, length) for length in (1, 2, 9, 30, 130, 700, 1500)]
    shared = random_ids(choose, 160)
    prompts += [shared + random_ids(choose, length) for length in (1, 1, 40)]
    found: dict[str, list[Generation]] = {}
    for name in ("triton", "flashinfer"):
        engine = start(checkpoint, attention_backend=name, start_timeout=500.0)
        assert engine.resolved.attention_backend == name
        for _ in range(2):  # the second time from the prefix cache
            found[name] = engine.generate(input_ids=prompts, sampling_params=greedy(48))
            for prompt, piece in zip(prompts, found[name], strict=True):
                check_greedy(checkpoint, prompt, piece, BFLOAT16_TOLERANCE)
        assert engine.metrics()["num_compiled_after_ready"] == 0
        engine.shutdown()
    pairs = zip(found["triton"], found["flashinfer"], strict=True)
    same = sum(num_same(one.token_ids, other.token_ids) for one, other in pairs)
    assert same > 0.5 * 48 * len(prompts)
