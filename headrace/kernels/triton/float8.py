"""float8_e4m3fn inside kernels: unscaled, 3 bits of mantissa, largest value 448, nothing infinite.

A pool of such values is given to a kernel as integers: bytes to store into, and int16 pairs of neighbours to load.
On a device the conversions are its own instructions; Triton's interpreter, whose own do not round as they should, gets
the same results from bit arithmetic.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ON_DEVICE = tl.constexpr(not triton.knobs.runtime.interpret)
_GREATEST = tl.constexpr(448.0)
_WIDEN = """{{
.reg .b32 bytes;
.reg .b16 two, none;
prmt.b32 bytes, $1, 0, {chosen};
mov.b32 {{two, none}}, bytes;
cvt.rn.f16x2.e4m3x2 $0, two;
}}"""
_LOW_BYTES = tl.constexpr(_WIDEN.format(chosen="0x4420"))  # of the two pairs in a register
_HIGH_BYTES = tl.constexpr(_WIDEN.format(chosen="0x4431"))


def is_float8(pool: Tensor) -> bool:
    """Whether a pool holds float8_e4m3fn."""
    return pool.dtype == torch.float8_e4m3fn


def as_pairs(*pools: Tensor) -> tuple[Tensor, ...]:
    """float8 pools [rows, D] as int16 [rows, D // 2]; others as they are."""
    return tuple(pool.view(torch.int16) if is_float8(pool) else pool for pool in pools)


def as_bytes(*pools: Tensor) -> tuple[Tensor, ...]:
    """float8 pools as uint8; others as they are."""
    return tuple(pool.view(torch.uint8) if is_float8(pool) else pool for pool in pools)


@triton.jit
def to_float8_bytes(x):
    """The bytes of float32 values, rounded to nearest, ties to even; saturates at 448, and NaN stays NaN."""
    if _ON_DEVICE:
        x = tl.clamp(x, -_GREATEST, _GREATEST, propagate_nan=tl.PropagateNan.ALL)
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        size = tl.minimum(tl.abs(x), _GREATEST)
        normal = size.to(tl.uint32, bitcast=True)
        normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
        tiny = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # in units of 2^-9, the last bit of the sum
        code = tl.where(size < 0.015625, tiny, normal)
        code = tl.where(x == x, code, 0x7F)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def even_halves(pairs):
    """float16 values of the low bytes of int16 pairs, exact."""
    if _ON_DEVICE:
        return _widened_bytes(pairs, _LOW_BYTES)
    else:
        return _widened_byte(pairs.to(tl.uint16, bitcast=True) & 0xFF)


@triton.jit
def odd_halves(pairs):
    """float16 values of the high bytes of int16 pairs, exact."""
    if _ON_DEVICE:
        return _widened_bytes(pairs, _HIGH_BYTES)
    else:
        return _widened_byte(pairs.to(tl.uint16, bitcast=True) >> 8)


@triton.jit
def _widened_bytes(pairs, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _widened_byte(byte):
    """float16 of an e4m3 byte in uint16: its bits moved into place, the exponent's bias corrected by a product."""
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
