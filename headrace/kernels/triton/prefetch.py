"""Asking for memory before it is needed: it comes to the device's cache, and nothing waits for it.

For launches that begin before the one ahead has ended, over what that one does not write. Owns no kernel.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch_ahead(ptr, rows, first, width, LINES: tl.constexpr):
    """Of each of these rows of `width` elements, LINES lines of 128 bytes from element `first` on."""
    lines = first + tl.arange(0, LINES) * (128 // (ptr.dtype.element_ty.primitive_bitwidth // 8))
    addresses = (ptr + rows.to(tl.int64)[:, None] * width + tl.minimum(lines, width - 1)[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )
