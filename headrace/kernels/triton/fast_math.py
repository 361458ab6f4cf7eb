"""Single-instruction exponentials and logarithms, relative error about 2^-22; plain ones in Triton's interpreter."""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

_ON_DEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def fast_exp(x):
    """e^x of float32; results below the least normal number are 0."""
    if _ON_DEVICE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def fast_log2(x):
    """log2 of positive float32."""
    if _ON_DEVICE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def fast_reciprocal(x):
    """1 / x of positive float32."""
    if _ON_DEVICE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x
