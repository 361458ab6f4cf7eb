"""Attention of single query tokens over paged keys and values, read in place. Must not know plans or layers.

A query token of one head needs the dot products of its vector with chosen rows of the key pool, their softmax, and
the sum of chosen rows of the value pool so weighted. Those are a sampled dense-dense product (only the entries of a
sparse pattern are computed) and an embedding bag with weights: no key or value is copied, any number of sequences is
one call each, and every (query, head) is computed by itself in the order of absolute positions. So its bits depend on
nothing beside it: padding adds exact zeros, and padded widths are multiples of `PAD_POSITIONS` so that the softmax
sums the same lanes whatever the width.

Legend: N query tokens, H query heads, G kv heads, L padded positions, D head size.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

PAD_POSITIONS = 16
_INT32_MAX = 2**31 - 1


class SampledAttention:
    """A reusable pattern: N query tokens, each attending to its own list of rows.

    token_rows_NL   rows of head 0 in the flat pool, in order of position; entries beyond a query's context are ignored
    num_context_N   int: positions that each query sees, at least 1
    head_stride     rows from one kv head to the next
    num_rows        rows of the flat pools `run` is given, at least L of them; row 0 must be finite
    """

    def __init__(
        self,
        token_rows_NL: Tensor,
        num_context_N: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_stride: int,
        num_rows: int,
        scale: float,
    ) -> None:
        num_queries, num_positions = token_rows_NL.shape
        # Padding repeats row 0. Of a pattern with more entries in a row than it has columns torch cuts off the rest.
        assert num_positions <= num_rows, "a pool has at least as many rows as a query has positions"
        index_dtype = (
            torch.int32 if max(num_rows, num_queries * num_heads * num_positions) <= _INT32_MAX else torch.int64
        )
        valid_NL = torch.arange(num_positions, dtype=torch.int64, device="cpu") < num_context_N[:, None]
        rows_NL = (token_rows_NL * valid_NL).to(index_dtype)
        head_offsets = (
            torch.arange(num_kv_heads, dtype=index_dtype, device="cpu").repeat_interleave(num_heads // num_kv_heads)
            * head_stride
        )
        num_bags = num_queries * num_heads
        self._scale = scale
        bias_N1L = torch.zeros(num_queries, 1, num_positions, dtype=torch.float32, device="cpu")
        self._bias_N1L = bias_N1L.masked_fill_(~valid_NL[:, None], float("-inf"))
        self._rows = (rows_NL[:, None] + head_offsets[None, :, None]).view(-1)
        offsets = torch.arange(0, num_bags * num_positions + 1, num_positions, dtype=index_dtype, device="cpu")
        self._scores_RL = bias_N1L.new_zeros(num_bags, num_positions)
        self._scores_NHL = self._scores_RL.view(num_queries, num_heads, num_positions)
        self._first_of_bag = offsets[:-1]
        self._pattern = _csr(offsets, self._rows, self._scores_RL.view(-1), (num_bags, num_rows))

    def run(self, q_NHD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend. q [N, H, D] and flat pools [num_rows, D], all float32 -> [N, H * D]."""
        q_RD = q_NHD.reshape(-1, q_NHD.shape[-1])
        torch.sparse.sampled_addmm(self._pattern, q_RD, keys.t(), beta=0.0, alpha=self._scale, out=self._pattern)
        self._scores_NHL.add_(self._bias_N1L)
        torch.softmax(self._scores_RL, -1, out=self._scores_RL)
        out_RD = torch.embedding_bag(
            values, self._rows, self._first_of_bag, mode=0, per_sample_weights=self._scores_RL.view(-1)
        )[0]
        return out_RD.view(q_NHD.shape[0], -1)


def _csr(offsets: Tensor, columns: Tensor, entries: Tensor, size: tuple[int, int]) -> Tensor:
    """A CSR matrix over these very tensors, unchecked."""
    _hear_beta_notice()
    try:
        return torch.sparse_csr_tensor(offsets, columns, entries, size=size, check_invariants=False)
    except UserWarning:  # a caller's process has asked torch to warn always, and Python to raise that
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(offsets, columns, entries, size=size, check_invariants=False)


@functools.cache
def _hear_beta_notice() -> None:
    """torch says once per process that CSR is a beta feature; let it say so to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        offsets = torch.arange(2, dtype=torch.int64, device="cpu")
        entries = torch.ones(1, dtype=torch.float32, device="cpu")
        torch.sparse_csr_tensor(offsets, offsets[:1], entries, size=(1, 1))
