"""The batched CPU backend. Owns the split of a step into work items; must not know scheduling or layers.

Two kinds of work. Query tokens of short rows (decode, and whatever a prefix hit leaves) are pooled over all sequences,
sorted by context length and cut into few pieces of similar width: each piece is three calls, whatever the number of
sequences. Long rows (prefill chunks) go one by one through a dense kernel, in blocks of queries. When bits must not
depend on the batch, every token goes the first way, where each (query, head) is computed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.attention.base import AttentionInputs, HeadNorms, Int64Array
from headrace.attention.heads import Heads, StepHeads
from headrace.kernels.paged_attention import PAD_POSITIONS, SampledAttention
from headrace.kernels.paged_kv import AttentionShape, KvGeometry, KvPool, store_rows, token_rows
from headrace.kernels.products import PLAIN, Products

_DENSE_MIN_TOKENS = 4  # a row of fewer tokens never goes by itself, so that steady decode is few calls
_DENSE_MIN_ENTRIES = 24 << 10  # scores of a row that pay for gathering its context and for its own calls
_BLOCK_QUERIES = 256  # queries of a long row that share one mask
_CUT_SAVES_ENTRIES = 1 << 14  # scores not computed that pay for one more piece's calls
_MAX_PIECE_ENTRIES = 1 << 22  # bounds a piece's scores and indices to 16 MiB each


class CpuAttention:
    """Plans steps over one pool. Scratch: a causal mask that grows to the longest context seen."""

    def __init__(self, heads: Heads, pool: KvPool, *, invariant: bool, products: Products = PLAIN) -> None:
        self._products = products
        self._heads = heads
        self._shape = heads.shape
        self._pool = pool
        self._invariant = invariant
        self._mask = CausalMask()

    def plan(self, inputs: AttentionInputs) -> CpuStep:
        """Split the step's tokens into pieces and dense blocks, and build their indices."""
        geometry = self._pool.geometry
        # A row whose scores are very many is cheaper with a dense kernel of its own.
        num_entries_R = inputs.row_lengths * (inputs.row_starts + inputs.row_lengths) * self._shape.num_heads
        long_R = (inputs.row_lengths >= _DENSE_MIN_TOKENS) & (num_entries_R >= _DENSE_MIN_ENTRIES)
        long_R &= not self._invariant
        short_T = np.repeat(~long_R, inputs.row_lengths)
        pieces: list[QueryGroup] = []
        for tokens in split_tokens(np.flatnonzero(short_T), inputs.token_positions, self._shape.num_heads):
            is_whole_step = len(tokens) == len(short_T)
            pieces.append(QueryGroup(self._shape, self._pool, inputs, tokens, is_whole_step=is_whole_step))
        blocks: list[DenseRow] = []
        if long_R.any():
            firsts = np.cumsum(inputs.row_lengths) - inputs.row_lengths
            blocks = [
                DenseRow(self._shape, geometry, inputs, int(row), int(firsts[row]), self._mask, self._products)
                for row in np.flatnonzero(long_R)
            ]
        columns, offsets = np.divmod(inputs.token_positions, geometry.page_size)
        pages = inputs.page_table.numpy()[inputs.token_slots, columns].astype(np.int64)
        rows_to_store = store_rows(geometry, torch.from_numpy(pages), torch.from_numpy(offsets))
        return CpuStep(self._pool, self._heads.at(inputs.rope_positions), rows_to_store, pieces, blocks)


@dataclass(frozen=True)
class CpuStep:
    """As `AttentionStep`."""

    pool: KvPool
    heads: StepHeads
    rows_to_store: Tensor
    pieces: list[QueryGroup]
    dense_rows: list[DenseRow]

    def run(self, layer: int, qkv_TX: Tensor, norms: HeadNorms | None) -> Tensor:
        """As `AttentionStep.run`."""
        q_THD, k_TGD, v_TGD = self.heads.split(qkv_TX, norms)
        self.pool.store(layer, self.rows_to_store, k_TGD, v_TGD)
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if len(self.pieces) == 1 and self.pieces[0].is_whole_step:
            return self.pieces[0].attend(q_THD, keys, values)
        out_TX = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1] * q_THD.shape[2])
        for piece in self.pieces:
            out_TX.index_copy_(0, piece.tokens, piece.attend(q_THD, keys, values))
        out_THD = out_TX.view(q_THD.shape)
        for row in self.dense_rows:
            row.attend(q_THD, k_TGD, v_TGD, keys, values, out_THD)
        return out_TX


def split_tokens(tokens: Int64Array, positions_T: Int64Array, num_heads: int) -> list[Int64Array]:
    """Cut token indices into pieces of similar context width. Pieces are bounded in size; their number grows with the
    spread of widths and with the total work, not with the number of sequences."""
    if len(tokens) == 0:
        return []
    widths = positions_T[tokens] // PAD_POSITIONS + 1
    order = np.argsort(-widths, kind="stable")
    widths = widths[order]
    cuts = [0]
    for boundary in np.flatnonzero(np.diff(widths)) + 1:
        saved = (len(tokens) - boundary) * num_heads * (widths[cuts[-1]] - widths[boundary]) * PAD_POSITIONS
        if saved > _CUT_SAVES_ENTRIES:
            cuts.append(int(boundary))
    if len(cuts) > 1:
        tokens = tokens[order]
    pieces: list[Int64Array] = []
    for first, last in zip(cuts, [*cuts[1:], len(tokens)], strict=True):
        step = max(1, _MAX_PIECE_ENTRIES // (num_heads * PAD_POSITIONS * int(widths[first])))
        for at in range(first, last, step):
            pieces.append(tokens[at : min(at + step, last)])
    return pieces


class QueryGroup:
    """Query tokens of similar context, attended by `SampledAttention`.

    Pools narrower than float32 are widened first: only the pages that these queries read, each once. So are pools with
    fewer rows than there are (padded) positions, which `SampledAttention` could not take.
    """

    def __init__(
        self, shape: AttentionShape, pool: KvPool, inputs: AttentionInputs, tokens: Int64Array, *, is_whole_step: bool
    ) -> None:
        geometry = pool.geometry
        self.tokens = torch.from_numpy(tokens)
        self.is_whole_step = is_whole_step  # all packed tokens, in their order
        num_context_N = inputs.token_positions[tokens] + 1
        num_positions = -(-int(num_context_N.max()) // PAD_POSITIONS) * PAD_POSITIONS
        pages_NC = _pages_of(inputs, tokens, num_context_N, num_positions, geometry.page_size)
        num_pages = geometry.num_pages
        self._num_page_rows = geometry.num_kv_heads * geometry.page_size
        self._wide_pages: Tensor | None = None
        if pool.dtype != torch.float32 or num_pages * self._num_page_rows < num_positions:
            used, places = torch.unique(
                F.pad(pages_NC.flatten(), (1, 0)), return_inverse=True
            )  # the zero page comes first
            num_pages = max(len(used), -(-num_positions // self._num_page_rows))  # no fewer rows than positions
            self._wide_pages = F.pad(used, (0, num_pages - len(used)))
            pages_NC = places[1:].view(pages_NC.shape)
        num_rows = num_pages * self._num_page_rows
        rows_NL = token_rows(geometry, pages_NC.to(torch.int32 if num_rows < 1 << 31 else torch.int64), num_positions)
        self._attention = SampledAttention(
            rows_NL,
            torch.from_numpy(num_context_N),
            shape.num_heads,
            shape.num_kv_heads,
            geometry.page_size,
            num_rows,
            shape.scale,
        )

    def attend(self, q_THD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[len(tokens), H * D] in the order of `tokens`."""
        q_NHD = q_THD if self.is_whole_step else q_THD.index_select(0, self.tokens)
        if self._wide_pages is None:
            return self._attention.run(q_NHD, keys, values)
        return self._attention.run(q_NHD.float(), self._widen(keys), self._widen(values)).to(q_THD.dtype)

    def _widen(self, flat: Tensor) -> Tensor:
        assert self._wide_pages is not None
        pages = flat.view(-1, self._num_page_rows * flat.shape[-1])
        return pages.index_select(0, self._wide_pages).float().view(-1, flat.shape[-1])


def _pages_of(
    inputs: AttentionInputs, tokens: Int64Array, num_context_N: Int64Array, num_positions: int, page_size: int
) -> Tensor:
    """Pages of each query's positions, [N, columns]; cells beyond a query's context read the zero page."""
    num_columns = min(-(-num_positions // page_size), inputs.page_table.shape[1])
    pages = inputs.page_table.numpy()[inputs.token_slots[tokens], :num_columns]
    pages = np.where(np.arange(num_columns) * page_size < num_context_N[:, None], pages, 0)
    missing = -(-num_positions // page_size) - num_columns
    return torch.from_numpy(np.pad(pages, ((0, 0), (0, missing))) if missing else pages)


class CausalMask:
    """Additive float32 mask for any block of queries at the end of any context, cut from one band."""

    def __init__(self) -> None:
        self._band = torch.zeros(_BLOCK_QUERIES, 0, dtype=torch.float32, device="cpu")

    def reserve(self, num_positions: int) -> None:
        """Make the band wide enough; never called while a step still uses a narrower one's views for writing."""
        width = self._band.shape[1]
        if num_positions > width:
            width = max(num_positions, 2 * width, 2 * _BLOCK_QUERIES)
            band = self._band.new_zeros(_BLOCK_QUERIES, width)
            corner = band.new_full((_BLOCK_QUERIES, _BLOCK_QUERIES), float("-inf")).triu_(1)
            band[:, width - _BLOCK_QUERIES :] = corner
            self._band = band

    def view(self, num_queries: int, num_positions: int) -> Tensor:
        """[num_queries, num_positions]: the last `num_queries` positions are the queries' own."""
        return self._band[_BLOCK_QUERIES - num_queries :, self._band.shape[1] - num_positions :]


@dataclass(frozen=True)
class _Block:
    """Queries first..last of a row, which see `num_positions` positions."""

    first: int
    last: int
    num_positions: int


class DenseRow:
    """A long row. If it starts its sequence, its own keys and values are all it sees; else its context is gathered."""

    def __init__(
        self,
        shape: AttentionShape,
        geometry: KvGeometry,
        inputs: AttentionInputs,
        row: int,
        first: int,
        mask: CausalMask,
        products: Products,
    ) -> None:
        self._shape = shape
        self._products = products
        self._mask = mask
        start, length = int(inputs.row_starts[row]), int(inputs.row_lengths[row])
        self._first, self._last = first, first + length
        self._context_rows: Tensor | None = None
        self._blocks: list[_Block] = []
        if start == 0:
            return
        num_columns = -(-(start + length) // geometry.page_size)
        pages = inputs.page_table[int(inputs.row_slots[row]), :num_columns].long()
        heads = torch.arange(shape.num_kv_heads, dtype=torch.int64, device="cpu") * geometry.page_size
        self._context_rows = (token_rows(geometry, pages[None], start + length) + heads[:, None]).view(-1)
        mask.reserve(start + length)
        for at in range(0, length, _BLOCK_QUERIES):
            end = min(at + _BLOCK_QUERIES, length)
            self._blocks.append(_Block(first + at, first + end, start + end))

    def attend(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, keys: Tensor, values: Tensor, out_THD: Tensor
    ) -> None:
        """Write this row's tokens of `out_THD`."""
        if self._context_rows is None:
            own = slice(self._first, self._last)
            k_GLD, v_GLD = k_TGD[own].transpose(0, 1), v_TGD[own].transpose(0, 1)
            out_THD[own] = self._dense(q_THD[own], k_GLD, v_GLD, None)
            return
        shape = (self._shape.num_kv_heads, -1, self._shape.head_dim)
        k_GLD = keys.index_select(0, self._context_rows).view(shape)
        v_GLD = values.index_select(0, self._context_rows).view(shape)
        for block in self._blocks:
            mask = self._mask.view(block.last - block.first, block.num_positions).to(q_THD.dtype)
            seen = slice(0, block.num_positions)
            own = slice(block.first, block.last)
            out_THD[own] = self._dense(q_THD[own], k_GLD[:, seen], v_GLD[:, seen], mask)

    def _dense(self, q_THD: Tensor, k_GLD: Tensor, v_GLD: Tensor, mask_TL: Tensor | None) -> Tensor:
        """Causal attention; without a mask the queries are all of the sequence's positions."""
        q_1HTD, k_1GLD, v_1GLD = q_THD.transpose(0, 1).unsqueeze(0), k_GLD.unsqueeze(0), v_GLD.unsqueeze(0)
        scale = self._shape.scale
        out_1HTD = self._products.compound(_flash_attention, q_1HTD, k_1GLD, v_1GLD, mask_TL, scale=scale)
        return out_1HTD.squeeze(0).transpose(0, 1)


def _flash_attention(q_1HTD: Tensor, k_1GLD: Tensor, v_1GLD: Tensor, mask_TL: Tensor | None, *, scale: float) -> Tensor:
    """What `F.scaled_dot_product_attention` calls for these, but where the process has forbidden it to."""
    flash = torch._scaled_dot_product_flash_attention_for_cpu
    return flash(q_1HTD, k_1GLD, v_1GLD, 0.0, mask_TL is None, attn_mask=mask_TL, scale=scale)[0]
