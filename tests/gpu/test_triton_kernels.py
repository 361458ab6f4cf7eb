"""What the Triton kernels promise on a device: bits that depend on no batch mate, launches that overlap, graphs."""
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.linear_rows import multiply_row
from headrace.kernels.triton.ordered_products import MatrixTile, matrix_tile, multiply_tiles
from headrace.kernels.triton.paged_attention import PagedAttention
from headrace.kernels.triton.row_operations import rms_norm, rope_and_store, silu_and_mul
from headrace.kernels.triton.sampling_rows import SamplingWorkspace, sample_rows
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits
from tests.kernels.oracles import reference_attention, reference_linear

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
FLOAT8 = torch.float8_e4m3fn
LIMITS = WorkLimits(max_tokens=4096, max_items=8192, max_partials=8192)
PAGE, DIM = 16, 128
NO_GROUPS = np.zeros((0, 3), np.int32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(4096, 1024), (1024, 3072), (24576, 4096), (4096, 12288)])
def test_products_have_the_same_bits_at_any_number_of_rows(num_outputs: int, num_inputs: int) -> None:
    x, weight = random(2048, num_inputs), random(num_outputs, num_inputs)
    whole = torch.full((2048, num_outputs), float("nan"), device=DEVICE, dtype=BF16)
    multiply_tiles(x, weight, None, whole)
    assert error(whole[:64], reference_linear(x[:64], weight, None)) < 1e-2
    tiles: set[MatrixTile] = set()
    for num_rows in (1, 2, 8, 16, 17, 32, 33, 64, 100, 128, 129, 200, 256, 300, 512, 1000):
        tiles.add(matrix_tile(num_rows, num_outputs, BF16, fetches=True))
        rows = torch.randperm(2048, device=DEVICE)[:num_rows]
        for pdl in (False, True):
            found = torch.empty(num_rows, num_outputs, device=DEVICE, dtype=BF16)
            multiply_tiles(x[rows], weight, None, found, pdl=pdl)
            assert torch.equal(found, whole[rows]), f"{num_rows} rows, pdl {pdl}"
    every = {matrix_tile(num_rows, num_outputs, BF16, fetches=True) for num_rows in range(1, 2049)}
    picked = tiles | {matrix_tile(2048, num_outputs, BF16, fetches=True)}
    assert picked == every, "the sizes above try every tile that is picked"
    for kept in {matrix_tile(num_rows, num_outputs, BF16) for num_rows in (33, 128, 512, 2048)}:
        multiply_tiles(x, weight, None, found_whole := torch.empty_like(whole), tile=kept)
        assert torch.equal(found_whole, whole), "loads of the program's own"


class Pages:
    """Eight groups of eight sequences that share 600 positions of up to 2500."""

    def __init__(self, heads: int, fixed: int | None, pdl: bool = False, pool_dtype: torch.dtype = BF16) -> None:
        self.heads, self.fixed = heads, fixed
        table = torch.randperm(64 * 160, device=DEVICE).view(64, 160) + 1
        for first in range(0, 64, 8):
            table[first : first + 8, :37] = table[first, :37]
        self.table = table.int()
        pools = [random((64 * 160 + 1) * 8 * PAGE, DIM) for _ in range(2)]
        for pool in pools:
            pool[: 8 * PAGE] = 0.0
        self.keys, self.values = (pool.to(pool_dtype) for pool in pools)
        self.groups = np.array([(first, 8, 37) for first in range(0, 64, 8)], np.int32)
        shape = AttentionShape(heads, 8, DIM)
        self.attention = PagedAttention(shape, PAGE, LIMITS, BF16, DEVICE, fixed, kv_dtype=pool_dtype, pdl=pdl)
        self.planner = AttentionPlanner(LIMITS, self.attention.tile_sizes, PAGE, 8, fixed)

    def run(
        self, rows: list[tuple[int, int, int]], q: Tensor, groups: np.ndarray, bounds: LaunchBounds | None = None
    ) -> Tensor:
        """With `bounds` as a captured launch would, else with no more programs than items."""
        buffer = np.full(LIMITS.size, 7, np.int32)
        arrays = np.array(rows, np.int64).T
        summary = self.planner.fill(buffer, arrays[0], arrays[1], arrays[2], groups, bounds)
        held = bounds or LaunchBounds(summary.num_decode, summary.num_prefill, len(q))
        out = torch.full_like(q, float("nan"))
        metadata = torch.from_numpy(buffer).to(DEVICE)
        self.attention.run(q, self.keys, self.values, self.table, metadata, out, held)
        return out


EVERY_POOL = [(8, BF16), (16, BF16), (32, BF16), (64, BF16), (16, FLOAT8), (32, FLOAT8)]


@pytest.mark.parametrize(("heads", "pool_dtype"), EVERY_POOL)
def test_attention_bits_depend_on_the_token_alone(heads: int, pool_dtype: torch.dtype) -> None:
    pages = Pages(heads, fixed=512, pool_dtype=pool_dtype)
    rows = [(row, 600 + 29 * row, 1) for row in range(64)]
    q = random(64, heads, DIM)
    expected = pages.run(rows, q, NO_GROUPS)
    sample = [(rows[row][0], rows[row][1], 1) for row in (0, 31, 63)]
    oracle = reference_attention(q[[0, 31, 63]], pages.keys, pages.values, pages.table, sample, 8, PAGE)
    assert error(expected[[0, 31, 63]], oracle) < 1e-2
    assert torch.equal(pages.run(rows, q, pages.groups), expected), "prefix groups"
    assert torch.equal(pages.run(rows, q, NO_GROUPS, LaunchBounds(70, 0, 64)), expected), "contexts left whole"
    for row in (0, 17, 63):
        assert torch.equal(pages.run([rows[row]], q[row : row + 1], NO_GROUPS)[0], expected[row]), "alone"


@pytest.mark.parametrize(("heads", "pool_dtype"), EVERY_POOL)
def test_a_prompt_gets_the_bits_of_single_steps(heads: int, pool_dtype: torch.dtype) -> None:
    pages = Pages(heads, fixed=512, pool_dtype=pool_dtype)
    q = random(700, heads, DIM)
    prompt = pages.run([(3, 500, 700)], q, NO_GROUPS)
    for first, length in ((0, 1), (11, 1), (12, 1), (523, 1), (699, 1), (100, 3), (100, 400)):
        found = pages.run([(3, 500 + first, length)], q[first : first + length], NO_GROUPS)
        assert torch.equal(found, prompt[first : first + length]), (first, length)


@pytest.mark.parametrize(("heads", "pool_dtype"), [(16, BF16), (32, BF16), (16, FLOAT8), (32, FLOAT8)])
def test_fast_attention_against_the_oracle(heads: int, pool_dtype: torch.dtype) -> None:
    pages = Pages(heads, fixed=None, pool_dtype=pool_dtype)
    rows = [*[(row, 600 + 20 * row, 1) for row in range(40)], (50, 0, 333), (51, 1500, 64), (52, 700, 5)]
    num_tokens = sum(length for *_, length in rows)
    q = random(num_tokens, heads, DIM)
    oracle = reference_attention(q, pages.keys, pages.values, pages.table, rows, 8, PAGE)
    for groups in (NO_GROUPS, pages.groups[:5]):
        assert error(pages.run(rows, q, groups), oracle) < 1e-2
    few = [(row, 600 + 20 * row, 1) for row in range(3)]
    bounds = pages.planner.bounds(4, 4, is_decode=True)
    oracle = reference_attention(q[:3], pages.keys, pages.values, pages.table, few, 8, PAGE)
    assert error(pages.run(few, torch.cat([q[:3], q[:1]]), NO_GROUPS, bounds)[:3], oracle) < 1e-2


@pytest.mark.parametrize("num_rows", [1, 300])
def test_float8_pools_hold_what_others_hold_rounded(num_rows: int) -> None:
    shape = AttentionShape(16, 8, DIM)
    qkv = random(num_rows, 32 * DIM) * torch.logspace(-3, 3, num_rows, device=DEVICE)[:, None].to(BF16)
    cos, sin, norms = (
        torch.rand(600, DIM, device=DEVICE),
        torch.rand(600, DIM, device=DEVICE),
        (random(DIM), random(DIM)),
    )
    table = (torch.randperm(num_rows * 40, device=DEVICE).view(num_rows, 40) + 1).int()
    positions = torch.arange(num_rows, dtype=torch.int32, device=DEVICE) * 2
    rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    results = []
    for dtype in (BF16, FLOAT8):
        pools = [torch.zeros((num_rows * 40 + 1) * 8 * PAGE, DIM, device=DEVICE).to(dtype) for _ in range(2)]
        q = torch.zeros(num_rows, 16, DIM, device=DEVICE, dtype=BF16)
        rope_and_store(qkv, None, norms, 1e-6, cos, sin, positions, rows, table, shape, PAGE, q, pools[0], pools[1])
        results.append(pools)
    for wide, packed in zip(*results, strict=True):
        expected = wide.float().clamp(-448, 448).to(FLOAT8)
        assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8)) and bool(wide.any())


class Steps:
    """Random steps of a few sizes through every kernel here that a step of an engine launches."""

    def __init__(self, pool_dtype: torch.dtype, fixed: int | None) -> None:
        self.pages = Pages(16, fixed, pool_dtype=pool_dtype)
        self.random = np.random.default_rng(0)
        self.cos = torch.rand(4096, DIM, device=DEVICE)

    def run(self, num_rows: int, num_tokens: int, *, is_decode: bool) -> None:
        """One step of at most this size, padded to it."""
        pages = self.pages
        bounds = pages.planner.bounds(num_rows, num_tokens, is_decode=is_decode)
        rows = int(self.random.integers(1, num_rows + 1))
        lengths = np.ones(rows, np.int64)
        if not is_decode:
            lengths += self.random.multinomial(int(self.random.integers(num_tokens - rows + 1)), np.ones(rows) / rows)
        starts = self.random.integers(0, 2500 - lengths)
        groups = NO_GROUPS
        if is_decode and rows > 2:
            groups = np.array([(0, rows, int(starts.min()) // PAGE)], np.int32)
        qkv, residual, inner = random(num_tokens, 32 * DIM), random(num_tokens, 1024), random(num_tokens, 512)
        rms_norm(residual, residual[0], 1e-6, torch.empty_like(residual))
        silu_and_mul(residual, inner)
        q = qkv.view(num_tokens, 32, DIM)[:, :16]
        positions = torch.zeros(num_tokens, dtype=torch.int32, device=DEVICE)
        shape = AttentionShape(16, 8, DIM)
        rope_and_store(
            qkv, None, None, 0.0, self.cos, self.cos, positions, positions - 1, pages.table, shape, PAGE, q,
            pages.keys, pages.values,
        )  # fmt: skip
        pages.run(list(zip(range(rows), starts.tolist(), lengths.tolist(), strict=True)), q, groups, bounds)


@pytest.mark.parametrize(("pool_dtype", "fixed"), [(BF16, None), (FLOAT8, None), (BF16, 256), (FLOAT8, 256)])
def test_nothing_is_specialised_on_the_size_of_a_step(
    pool_dtype: torch.dtype, fixed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(pool_dtype, fixed)
    for num_rows in (1, 8, 16, 64):
        steps.run(num_rows, num_rows, is_decode=True)
    for num_tokens in (16, 512, 1999):  # parts of many tokens are merged by another kernel
        steps.run(16, num_tokens, is_decode=False)
    names: list[str] = []

    def listen(*, key: str, repr: str, **_: object) -> None:
        names.append(repr)

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", listen)
    for _ in range(100):
        num_rows = int(steps.random.integers(1, 65))
        steps.run(num_rows, num_rows, is_decode=True)
        steps.run(num_rows, int(steps.random.integers(num_rows, 2000)), is_decode=False)
    torch.cuda.synchronize()
    assert names == []


def replayed(call: Callable[[], None]) -> None:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()


def test_overlapped_launches_in_a_graph_change_no_bit() -> None:
    weights = [random(4096, 1024) / 32 for _ in range(6)], [random(1024, 2048) / 45 for _ in range(6)]
    norm, results = random(1024), []
    for pdl in (False, True):
        residual, start = random(1, 1024), torch.arange(1024, device=DEVICE).to(BF16)[None] / 1024
        inner, normed, mixed = (torch.empty(1, n, device=DEVICE, dtype=BF16) for n in (2048, 1024, 4096))

        def chain(residual=residual, inner=inner, normed=normed, mixed=mixed, start=start, pdl=pdl) -> None:  # type: ignore[no-untyped-def]
            residual.copy_(start)
            for up, down in zip(*weights, strict=True):
                multiply_row(residual, up, inner, norm_K=norm, eps=1e-6, gated=True, pdl=pdl)
                multiply_row(inner, down, residual, adds=True, pdl=pdl)
                rms_norm(residual, norm, 1e-6, normed, pdl=pdl)
                multiply_row(normed, up, mixed, pdl=pdl)
                silu_and_mul(mixed, inner, pdl=pdl)
                multiply_row(inner, down, residual, adds=True, pdl=pdl)

        for _ in range(20):
            replayed(chain)
            results.append(residual.clone())
    assert all(torch.equal(result, results[0]) for result in results) and results[0].isfinite().all()


def test_draws_follow_the_distribution_and_repeat() -> None:
    vocab, num_rows = 151936, 256
    logits = torch.full((num_rows, vocab), -20.0, device=DEVICE)
    logits[:, [5, 4097, 150000]] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    params = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 1.0, float("-inf"), 0.0]], device=DEVICE)
    slots = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    seeds = torch.tensor([[11, 3]], dtype=torch.int32, device=DEVICE)
    workspace = SamplingWorkspace.make(num_rows, vocab, DEVICE)
    counts = torch.zeros(vocab, device=DEVICE)
    for step in range(64):
        positions = torch.arange(num_rows, dtype=torch.int32, device=DEVICE) + step * num_rows
        drawn = []
        for _ in range(2):
            tokens, logprobs = torch.full_like(slots, -1), torch.zeros(num_rows, device=DEVICE)
            sample_rows(logits, slots, positions, params, seeds, None, workspace, tokens, logprobs, None)
            drawn.append(tokens)
        assert torch.equal(*drawn)
        counts += torch.bincount(tokens.long(), minlength=vocab)
    shares = counts[[5, 4097, 150000]] / counts.sum()
    expected = torch.softmax(torch.tensor([1.0, 2.0, 3.0], device=DEVICE), 0)
    assert float((shares - expected).abs().max()) < 0.02, shares
