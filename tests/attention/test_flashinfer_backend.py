"""The flashinfer backend against the oracle, over wrappers that compute what FlashInfer documents of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.attention import (
    CAPABILITIES,
    CHOICES,
    AttentionInputs,
    AttentionShape,
    Heads,
    build_device_backend,
    refusals,
)
from headrace.attention.base import Bucket, DeviceTables, HeadNorms, StepRows
from headrace.attention.flashinfer import FlashInferAttention, Library, page_lists
from headrace.attention.reference import ReferenceAttention
from headrace.config import RopeSpec
from headrace.kernels import select_kernels
from headrace.kernels.paged_kv import KvGeometry, KvPool
from headrace.kernels.rope_tables import RotaryTables, rope_tables
from headrace.kernels.triton.work_cuts import FEW_PROGRAMS
from headrace.types.errors import ConfigError
from tests.kernels.oracles import ScaledShape
from tests.rounds import rounds

SHAPES = {
    "groups of 4": AttentionShape(8, 2, 64),
    "groups of 3": AttentionShape(3, 1, 64),
    "no groups": AttentionShape(2, 2, 64),
    "another scale": ScaledShape(8, 2, 64),
}
NUM_SLOTS, CONTEXT, NUM_LAYERS = 6, 90, 2
NO_GROUPS, NO_METADATA = np.zeros((0, 3), np.int32), np.zeros(0, np.int32)


@dataclass
class Plan:
    """What a wrapper was planned with, as host tensors."""

    query_firsts: Tensor
    firsts: Tensor
    page_ids: Tensor
    last_lengths: Tensor
    settings: dict[str, Any]


class FakeWrapper:
    """Planned rows against their pages; query i of a row of n over L positions sees those up to L - n + i."""

    def __init__(
        self, ran: list[tuple[str, int]], kind: str, workspace: Tensor, kv_layout: str, **settings: Any
    ) -> None:
        assert workspace.dtype == torch.uint8 and workspace.numel() >= 128 << 20 and kv_layout == "HND"
        self.kind = kind
        self.settings = settings
        self.planned: Plan | None = None
        self._ran = ran

    def plan(self, *indices: Tensor, **settings: Any) -> None:
        assert all(each.dtype == torch.int32 and each.ndim == 1 and each.is_contiguous() for each in indices)
        if self.kind == "decode":
            causal = True
            firsts, page_ids, last_lengths = indices
            query_firsts = torch.arange(len(last_lengths) + 1, dtype=torch.int32)
        else:
            causal = settings["causal"]
            query_firsts, firsts, page_ids, last_lengths = indices
        assert causal
        planned = Plan(query_firsts, firsts, page_ids, last_lengths, settings)
        page_size, last = settings["page_size"], planned.last_lengths
        assert len(planned.query_firsts) == len(planned.firsts) == len(last) + 1
        assert planned.query_firsts[0] == planned.firsts[0] == 0 and planned.firsts[-1] == len(planned.page_ids)
        assert ((last >= 1) & (last <= page_size)).all()
        assert torch.equal(settings["seq_lens"], (planned.firsts.diff() - 1) * page_size + last)
        self.planned = planned

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        plan = self.planned
        assert plan is not None and len(q) == plan.query_firsts[-1] and out.shape == q.shape and out.is_contiguous()
        settings, (keys, values) = plan.settings, paged_kv_cache
        assert q.dtype == out.dtype == settings["q_data_type"] and keys.dtype == settings["kv_data_type"]
        assert q.shape[1] == settings["num_qo_heads"]
        assert keys.shape[1:] == (settings["num_kv_heads"], settings["page_size"], q.shape[2]) == values.shape[1:]
        for row, length in enumerate(settings["seq_lens"].tolist()):
            pages = plan.page_ids[plan.firsts[row] : plan.firsts[row + 1]].long()
            k, v = (each[pages].transpose(1, 2).flatten(0, 1)[:length].double() for each in (keys, values))
            k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
            tokens = slice(int(plan.query_firsts[row]), int(plan.query_firsts[row + 1]))
            scores = torch.einsum("qhd,lhd->hql", q[tokens].double(), k) * settings["sm_scale"]
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(length - scores.shape[1])
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[tokens] = torch.einsum("hql,lhd->qhd", weights, v).to(out.dtype)
        self._ran.append((self.kind, len(plan.last_lengths)))
        return out


class FakeLibrary:
    """Makes the wrappers; `ran` has the kind and number of rows of each launch."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []
        self.made: list[FakeWrapper] = []
        self.library = Library(partial(self._make, "decode"), partial(self._make, "prefill"))

    def _make(self, kind: str, workspace: Tensor, kv_layout: str, **settings: Any) -> FakeWrapper:
        self.made.append(FakeWrapper(self.ran, kind, workspace, kv_layout, **settings))
        return self.made[-1]


class Case:
    """The backend and the oracle, each over a pool of its own, and sequences that grow in both."""

    def __init__(
        self,
        shape: AttentionShape,
        page_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype = torch.float32,
        has_norms: bool = False,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.random = np.random.default_rng(page_size)
        self.generator = torch.Generator().manual_seed(page_size)
        num_columns = -(-CONTEXT // page_size)
        pages = self.random.permutation(np.arange(1, NUM_SLOTS * num_columns + 1)).astype(np.int32)
        self.page_table = pages.reshape(NUM_SLOTS, num_columns)
        geometry = KvGeometry(NUM_LAYERS, pages.size + 1, shape.num_kv_heads, page_size, shape.head_dim)
        self.pool, self.oracle_pool = KvPool(geometry, kv_dtype), KvPool(geometry, kv_dtype)
        self.rotary = rope_tables(RopeSpec(theta=1e4), shape.head_dim, CONTEXT, dtype)
        weights = torch.rand(2, shape.head_dim, generator=self.generator) + 0.5
        self.norms = HeadNorms(weights[0], weights[1], 1e-6) if has_norms else None
        self.fake = FakeLibrary()
        self.backend = FlashInferAttention(shape, self.pool, self.rotary, dtype, self.fake.library)
        self.oracle = ReferenceAttention(Heads(shape, select_kernels("reference"), self.rotary), self.oracle_pool)
        self.known = self.random.integers(0, CONTEXT // 2, NUM_SLOTS)
        self._store_known()
        self.fake.ran.clear()

    def _store_known(self) -> None:
        """Random keys and values on every page but page 0, whether a sequence is there yet or not."""
        first = self.pool.geometry.num_kv_heads * self.pool.geometry.page_size
        for layer in range(NUM_LAYERS):
            for ours, theirs in ((self.pool.keys, self.oracle_pool.keys), (self.pool.values, self.oracle_pool.values)):
                ours[layer][first:] = torch.randn(ours[layer][first:].shape, generator=self.generator)
                theirs[layer].copy_(ours[layer])

    def qkv(self, num_tokens: int) -> Tensor:
        width = (self.shape.num_heads + 2 * self.shape.num_kv_heads) * self.shape.head_dim
        return torch.randn(num_tokens, width, generator=self.generator).to(self.dtype)

    def tables(self, positions: np.ndarray[Any, Any], slots: np.ndarray[Any, Any], padding: int) -> DeviceTables:
        at = torch.from_numpy(np.pad(positions, (0, padding)).astype(np.int32))
        rows = torch.from_numpy(np.pad(slots, (0, padding), constant_values=-1).astype(np.int32))
        return DeviceTables(torch.from_numpy(self.page_table), at, rows, torch.zeros(0, dtype=torch.int32))

    def check(self, rows: list[tuple[int, int]], padding: int = 0, tolerance: float = 1e-5) -> None:
        """One step of rows (slot, number of new tokens), in this order: outputs and pools are the oracle's."""
        slots, lengths = (np.array(each, np.int32) for each in zip(*rows, strict=True))
        starts = self.known[slots].astype(np.int32)
        self.known[slots] += lengths
        firsts = np.cumsum(lengths) - lengths
        num_tokens = int(lengths.sum())
        positions = (np.arange(num_tokens) + np.repeat(starts - firsts, lengths)).astype(np.int64)
        token_slots = np.repeat(slots, lengths).astype(np.int64)
        bucket = Bucket(num_tokens + padding, len(rows) + padding, is_decode=False)
        tables = self.tables(positions, token_slots, padding)
        assert self.backend.fill(NO_METADATA, StepRows(slots, starts, lengths, NO_GROUPS, self.page_table), bucket) == 0
        (step,) = self.backend.steps(tables, bucket)
        row_slots, row_starts, row_lengths = (each.astype(np.int64) for each in (slots, starts, lengths))
        expected_step = self.oracle.plan(
            AttentionInputs(
                tables.page_table,
                row_slots,
                row_starts,
                row_lengths,
                positions,
                token_slots,
                torch.from_numpy(positions),
            )  # fmt: skip
        )
        for layer in range(NUM_LAYERS):
            qkv = self.qkv(num_tokens + padding)
            expected = expected_step.run(layer, qkv[:num_tokens].clone(), self.norms)
            found = step.run(layer, qkv, self.norms)
            assert found.shape == (num_tokens + padding, expected.shape[1]) and found.dtype == self.dtype
            torch.testing.assert_close(found[:num_tokens], expected, atol=tolerance, rtol=0)
            torch.testing.assert_close(self.pool.keys[layer], self.oracle_pool.keys[layer], atol=tolerance, rtol=1e-3)
            torch.testing.assert_close(self.pool.values[layer], self.oracle_pool.values[layer], atol=0, rtol=0)

    def random_rows(self) -> list[tuple[int, int]]:
        """Any of the slots in any order, one new token or several."""
        slots = self.random.permutation(NUM_SLOTS)[: self.random.integers(1, NUM_SLOTS + 1)]
        return [(int(slot), int(self.random.choice((1, 1, 2, 4)))) for slot in slots]


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("heads", SHAPES)
def test_random_steps_equal_the_oracle(heads: str, page_size: int) -> None:
    case = Case(SHAPES[heads], page_size, has_norms=page_size == 16)
    for _ in range(rounds(2)):
        case.check(case.random_rows())


def test_steps_in_the_order_of_plans() -> None:
    case = Case(SHAPES["groups of 4"], 16)
    case.check([(4, 2), (0, 17), (2, 1)])
    assert case.fake.ran == [("prefill", 3)] * NUM_LAYERS, "a row of one token behind chunks stays there"
    case.fake.ran.clear()
    case.check([(2, 1), (0, 1), (4, 1)])
    assert case.fake.ran == [("decode", 3)] * NUM_LAYERS
    case.fake.ran.clear()
    case.check([(4, 1), (2, 1), (3, 8), (5, 2)])
    assert case.fake.ran == [("decode", 2), ("prefill", 2)] * NUM_LAYERS
    case.fake.ran.clear()
    case.check([(0, 2), (4, 1), (3, 3), (2, 1)])
    assert case.fake.ran == [("prefill", 4)] * NUM_LAYERS


def test_padding_reads_and_writes_nothing() -> None:
    case = Case(SHAPES["groups of 3"], 16)
    case.check([(1, 6), (0, 3)], padding=9)
    case.check([(0, 1), (1, 1)], padding=6)
    case.check([(1, 1), (5, 4)], padding=1)
    page = case.pool.geometry.num_kv_heads * case.pool.geometry.page_size
    assert not any(values[:page].any() for values in (*case.pool.keys, *case.pool.values)), "page 0 stays zero"


def test_a_step_before_any_plan_is_padding() -> None:
    """As at a start, where launches are run for what they compile and the memory they take."""
    case = Case(SHAPES["groups of 4"], 16)
    nobody = np.zeros(0, np.int64)
    found = case.backend.steps(case.tables(nobody, nobody, 5), Bucket(5, 5, is_decode=True))[0].run(
        0, case.qkv(5), None
    )
    assert found.shape == (5, 8 * 64) and case.fake.ran == []
    assert torch.equal(case.pool.keys[0], case.oracle_pool.keys[0])


def test_both_kernels_are_built_before_the_first_step() -> None:
    fake = FakeLibrary()
    case = Case(SHAPES["groups of 4"], 16)
    FlashInferAttention(case.shape, case.pool, case.rotary, torch.float32, fake.library)
    assert {kind for kind, _ in fake.ran} == {"decode", "prefill"}


@pytest.mark.parametrize(("heads", "expected"), [("groups of 4", True), ("groups of 3", False), ("no groups", False)])
def test_wide_groups_decode_on_tensor_cores(heads: str, expected: bool) -> None:
    """Groups that the other kernel does not know are among the wide ones."""
    found = {wrapper.kind: wrapper.settings for wrapper in Case(SHAPES[heads], 16).fake.made}
    assert found == {"decode": {"use_tensor_cores": expected}, "prefill": {}}


def test_a_pool_narrower_than_the_queries() -> None:
    case = Case(SHAPES["groups of 4"], 16, kv_dtype=torch.float16)
    for rows in ([(0, 5), (1, 3)], [(0, 1), (1, 1), (2, 4)]):
        case.check(rows, tolerance=1e-3)


def test_page_lists_are_those_of_a_loop() -> None:
    random = np.random.default_rng(0)
    for page_size in (1, 7, 16):
        table = random.integers(1, 1000, (9, 40), dtype=np.int32)
        slots, lengths = random.permutation(9)[:7].astype(np.int64), random.integers(1, 40 * page_size + 1, 7)
        found = page_lists(table, slots, lengths, page_size)
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            pages = found.page_ids[found.firsts[row] : found.firsts[row + 1]]
            assert pages.tolist() == [table[slot, at // page_size] for at in range(0, length, page_size)]
            assert (len(pages) - 1) * page_size + found.last_lengths[row] == length == found.lengths[row]
        assert {values.dtype for values in vars(found).values()} == {np.dtype(np.int32)}


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SHAPES["groups of 4"], 16)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match="pip install flashinfer-python") as caught:
        FlashInferAttention(case.shape, case.pool, case.rotary, torch.bfloat16)
    assert caught.value.field == "attention_backend"


CAPABLE: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "numerics": "fast",
    "page_size": 16,
    "head_dim": 128,
}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, None),
        ({"head_dim": 64, "page_size": 1}, None),
        ({"numerics": "invariant"}, "invariant"),
        ({"dtype": "float32"}, "float32"),
        ({"device": "cpu"}, "not cpu"),
        ({"head_dim": 96}, "96"),
        ({"head_dim": 192}, "192"),
    ],
)
def test_what_it_runs_is_data(settings: dict[str, Any], why: str | None) -> None:
    found = refusals(**(CAPABLE | settings)).get("flashinfer")
    assert found is None if why is None else why in (found or "")
    assert not CAPABILITIES["flashinfer"].captures and CAPABILITIES["triton"].captures


def test_queries_and_pools_must_go_together() -> None:
    shape, rotary = SHAPES["groups of 4"], RotaryTables(torch.zeros(4, 64), torch.zeros(4, 64))
    geometry = KvGeometry(1, 2, 2, 16, 64)
    for pool_dtype, refused in ((torch.float8_e4m3fn, False), (torch.float16, True)):
        pool = KvPool(geometry, pool_dtype)
        if refused:
            with pytest.raises(ConfigError, match="float32 over float16"):
                build_device_backend("triton", "fast", shape, pool, rotary, torch.float32, 16)
        else:
            build_device_backend("triton", "fast", shape, pool, rotary, torch.float32, 16)
    with pytest.raises(ConfigError, match="flashinfer"):
        build_device_backend("flashinfer", "fast", shape, KvPool(geometry, torch.float16), rotary, torch.float16, 16)


def test_choices_of_auto_are_backends_with_a_reason() -> None:
    for choice in CHOICES:
        backend = choice.kernel.split(":")[0]
        assert backend in CAPABILITIES and "cuda" in CAPABILITIES[backend].devices
        assert choice.why and all(isinstance(each, str) for each in choice)
    assert f"up to {FEW_PROGRAMS} " in CHOICES[0].batch_size
