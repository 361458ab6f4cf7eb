"""Conversions inside kernels against torch's, at every code and around every boundary between two of them."""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.float8 import as_pairs, even_halves, odd_halves, to_float8_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CODES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def _to_bytes_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + places, to_float8_bytes(tl.load(x_ptr + places)))


@triton.jit
def _from_pairs_kernel(pairs_ptr, even_ptr, odd_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs = tl.load(pairs_ptr + places)
    tl.store(even_ptr + places, even_halves(pairs))
    tl.store(odd_ptr + places, odd_halves(pairs))


def to_bytes(x: Tensor) -> Tensor:
    padded = torch.zeros(-(-len(x) // 256) * 256).copy_(torch.nn.functional.pad(x, (0, -len(x) % 256)))
    out = torch.zeros(len(padded), dtype=torch.uint8, device=DEVICE)
    _to_bytes_kernel[(len(padded) // 256,)](padded.to(DEVICE), out, BLOCK=256)
    return out[: len(x)].cpu()


def test_values_are_rounded_to_nearest_even_and_saturate() -> None:
    grid = CODES[:127].view(torch.float8_e4m3fn).float()
    boundaries = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([boundaries, torch.nextafter(boundaries, grid[1:]), torch.nextafter(boundaries, grid[:-1])])
    beyond = torch.tensor([448.0, 463.9, 464.0, 480.0, 1e4, float("inf"), 2.0**-10, 2.0**-11, 1e-30])
    spread = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 40
    x = torch.cat([grid, near, beyond, spread])
    x = torch.cat([x, -x])
    assert torch.equal(to_bytes(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_no_number_stays_none() -> None:
    assert (to_bytes(torch.tensor([float("nan"), -float("nan")])) & 0x7F).tolist() == [0x7F, 0x7F]


def test_every_code_is_widened_exactly() -> None:
    pool = torch.stack([CODES.repeat(256), CODES.repeat_interleave(256)], dim=1).view(torch.float8_e4m3fn)
    (pairs,) = as_pairs(pool.to(DEVICE))
    even, odd = (torch.zeros(len(pool), dtype=torch.float16, device=DEVICE) for _ in range(2))
    _from_pairs_kernel[(len(pool) // 1024,)](pairs, even, odd, BLOCK=1024)
    found = torch.stack([even, odd], dim=1).cpu()
    torch.testing.assert_close(found, pool.to(torch.float16), atol=0, rtol=0, equal_nan=True)


def test_other_pools_are_left_as_they_are() -> None:
    pool = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert as_pairs(pool)[0] is pool
