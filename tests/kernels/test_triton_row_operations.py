"""The fused row operations against their definitions, odd sizes and untouched neighbours included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.row_operations import rms_norm, rope_and_store, silu_and_mul
from tests.kernels.oracles import reference_rms_norm, reference_rope, reference_silu_and_mul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter truncates to bfloat16
TOLERANCES = {torch.float32: 2e-6, HALF: 1e-2}

SHAPES = [(AttentionShape(4, 2, 64), 16), (AttentionShape(7, 1, 80), 1)]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.isfinite().all()
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(difference) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [64, 896, 1000])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = (random(3, width, dtype=dtype, seed=seed) for seed in range(2))
    before, out = x.clone(), torch.full_like(x, float("nan"))
    rms_norm(x, weight[0], 1e-6, out)
    assert torch.equal(x, before)
    assert_near(out, reference_rms_norm(x, weight[0], 1e-6), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [48, 1100])
def test_silu_and_mul(width: int, dtype: torch.dtype) -> None:
    x = random(5, 2 * width, dtype=dtype, seed=4)
    out = torch.full((5, width), float("nan"), dtype=dtype, device=DEVICE)
    silu_and_mul(x, out)
    assert_near(out, reference_silu_and_mul(x), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "page"), [*SHAPES, (AttentionShape(3, 3, 128), 24)])
@pytest.mark.parametrize(("has_norm", "has_bias"), [(True, False), (False, True), (False, False)])
def test_rope_and_store(shape: AttentionShape, page: int, has_norm: bool, has_bias: bool, dtype: torch.dtype) -> None:
    num_heads, num_kv, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    width = (num_heads + 2 * num_kv) * dim
    qkv, cos, sin = (random(*size, dtype=dtype, seed=7) for size in ((4, width), (50, dim), (50, dim)))
    cos[:, dim // 2 :], sin[:, dim // 2 :] = cos[:, : dim // 2], sin[:, : dim // 2]
    bias = random(width, dtype=dtype, seed=8) if has_bias else None
    norms = (random(dim, dtype=dtype, seed=9), random(dim, dtype=dtype, seed=10)) if has_norm else None
    positions = torch.tensor([0, 49, 17, 3], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([1, 0, 1, -1], dtype=torch.int32, device=DEVICE)
    table = (torch.randperm(100, generator=torch.Generator().manual_seed(3)).view(2, 50).int() + 1).to(DEVICE)
    q = torch.full((4, num_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    pools = [torch.zeros(101 * num_kv * page, dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    expected = reference_rope(qkv, bias, norms, 1e-6, cos, sin, positions, shape)
    rope_and_store(qkv, bias, norms, 1e-6, cos, sin, positions, rows, table, shape, page, q, pools[0], pools[1])
    assert_near(q[:3], expected[0][:3], dtype)
    assert q[3].isnan().all(), "a skipped token"
    for pool, values in zip(pools, expected[1:], strict=True):
        view = pool.view(101, num_kv, page, dim)
        for token in range(3):
            position = int(positions[token])
            place = int(table[int(rows[token]), position // page]), slice(None), position % page
            assert_near(view[place], values[token], dtype)
            view[place] = 0.0
        assert not pool.any(), "nothing else was written"


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "page"), SHAPES)
def test_float8_pools_hold_the_same_values_rounded(shape: AttentionShape, page: int, dtype: torch.dtype) -> None:
    num_kv, dim = shape.num_kv_heads, shape.head_dim
    width = (shape.num_heads + 2 * num_kv) * dim
    qkv, cos, sin = (random(*size, dtype=dtype, seed=11) for size in ((4, width), (50, dim), (50, dim)))
    qkv[0] *= 400  # beyond what float8 holds
    qkv[1] /= 100  # where it is subnormal
    norms = (random(dim, dtype=dtype, seed=12), random(dim, dtype=dtype, seed=13))
    positions = torch.tensor([0, 49, 17, 3], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([1, 0, 1, -1], dtype=torch.int32, device=DEVICE)
    table = (torch.randperm(100, generator=torch.Generator().manual_seed(3)).view(2, 50).int() + 1).to(DEVICE)
    results = []
    for pool_dtype in (dtype, torch.float8_e4m3fn):
        q = torch.zeros(4, shape.num_heads, dim, dtype=dtype, device=DEVICE)
        pools = [torch.zeros(101 * num_kv * page, dim, device=DEVICE).to(pool_dtype) for _ in range(2)]
        rope_and_store(qkv, None, norms, 1e-6, cos, sin, positions, rows, table, shape, page, q, pools[0], pools[1])
        results.append((q, *pools))
    (q, *pools), (packed_q, *packed_pools) = results
    torch.testing.assert_close(q, packed_q, atol=1e-5, rtol=1e-5)  # another kernel may contract its products
    for pool, packed in zip(pools, packed_pools, strict=True):
        expected = pool.float().clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
        assert float(pool.abs().max()) > 448 or pool is pools[0]
