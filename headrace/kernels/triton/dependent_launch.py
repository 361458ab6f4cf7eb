"""What launches share that may begin before the one ahead of them has ended (programmatic dependent launch, PDL).

Owns no kernel. What such a launch may do before it waits: read and ask for what the one ahead does not write.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


def launch_options(pdl: bool) -> dict[str, bool]:
    """Options of a launch; with `pdl` its kernel must wait for the one ahead. See `linear_rows.multiply_row`."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def take_turn(PDL: tl.constexpr):
    """Let the next launch begin, which may fetch ahead while this one waits; and wait for the one ahead."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_ahead(ptr, rows, first, width, LINES: tl.constexpr):
    """Ask, of each of these rows of `width` elements, for LINES lines of 128 bytes from element `first` on.

    They come to the cache; nothing waits for them.
    """
    lines = first + tl.arange(0, LINES) * (128 // (ptr.dtype.element_ty.primitive_bitwidth // 8))
    addresses = (ptr + rows.to(tl.int64)[:, None] * width + tl.minimum(lines, width - 1)[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )
