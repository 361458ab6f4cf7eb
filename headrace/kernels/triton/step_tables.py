"""What a step does before its first layer: page-table cells, and the embeddings of its tokens. Owns two kernels.

Both read the step buffer of the device (`headrace.runner.step_buffer`), whose counts change from step to step while the
launches stay as they were captured. Legend: T tokens, X hidden.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_CELLS_PER_PROGRAM = 256


@triton.jit
def _cells_kernel(cells_ptr, count_ptr, table_ptr, table_stride, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tl.load(count_ptr)
    slot = tl.load(cells_ptr + 3 * index, mask=mask, other=0).to(tl.int64)
    column = tl.load(cells_ptr + 3 * index + 1, mask=mask, other=0)
    page = tl.load(cells_ptr + 3 * index + 2, mask=mask, other=0)
    tl.store(table_ptr + slot * table_stride + column, page, mask=mask)


def write_cells(cells_C3: Tensor, count: Tensor, page_table: Tensor) -> None:
    """page_table[slot, column] = page for the first `count` of cells (slot, column, page); all int32, `count` [1]."""
    grid = (triton.cdiv(len(cells_C3), _CELLS_PER_PROGRAM),)
    _cells_kernel[grid](cells_C3, count, page_table, page_table.stride(0), BLOCK=_CELLS_PER_PROGRAM, num_warps=4)


@triton.jit
def _embed_kernel(
    token_ids_ptr, table_rows_ptr, last_ptr, embedding_ptr, hidden_ptr, first_row, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_PART: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    token_id = tl.load(token_ids_ptr + token)
    if token_id < 0:
        row = tl.load(table_rows_ptr + token)
        token_id = tl.load(last_ptr + tl.maximum(row, 0))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    held = mask
    if IS_PART:
        token_id -= first_row
        held = columns < tl.where((token_id >= 0) & (token_id < num_rows), WIDTH, 0)
    value = tl.load(embedding_ptr + token_id.to(tl.int64) * WIDTH + columns, mask=held, other=0.0)
    tl.store(hidden_ptr + token.to(tl.int64) * WIDTH + columns, value, mask=mask)


def embed_tokens(
    token_ids_T: Tensor,
    table_rows_T: Tensor,
    last_tokens: Tensor,
    embedding_VX: Tensor,
    hidden_TX: Tensor,
    *,
    first_row: int | None = None,
) -> None:
    """hidden[t] = embedding[token id t]; an id below 0 stands for last_tokens[table_rows[t]]. Ids are int32.

    `first_row`: the embedding is a part of a table, its rows from there on; of a token whose row it lacks come zeros.
    """
    num_tokens, width = hidden_TX.shape
    block = min(4096, triton.next_power_of_2(width))
    _embed_kernel[(num_tokens, triton.cdiv(width, block))](
        token_ids_T, table_rows_T, last_tokens, embedding_VX, hidden_TX, first_row or 0, len(embedding_VX),
        WIDTH=width, BLOCK=block, IS_PART=first_row is not None, num_warps=4,
    )  # fmt: skip
