"""The paged KV store of one KV group. Owns the pool's memory and layout; must not know who leases which page.

Layout: per layer, keys and values each [num_pages, num_kv_heads, page_size, head_dim], so that one head's tokens of a
page are contiguous. Seen flat as [num_rows, head_dim], position `offset` of `page` for head g is row
(page * num_kv_heads + g) * page_size + offset. Page 0 is never leased: it stays zero, and padding points at it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.config import KvGroup
from headrace.types.errors import ConfigError

Zeros = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes the memory of a pool."""


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one layer: H query, G key and G value heads of D. Scores are scaled by 1 / sqrt(head_dim)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of_group(cls, group: KvGroup) -> AttentionShape:
        """Of every layer of a KV group."""
        return cls(group.num_heads, group.num_kv_heads, group.head_dim)

    @functools.cached_property
    def scale(self) -> float:
        """Factor on every score."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class KvGeometry:
    """Sizes of a pool, in elements."""

    num_layers: int
    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int

    @classmethod
    def of_group(cls, group: KvGroup, num_pages: int, page_size: int) -> KvGeometry:
        """For the layers of one group; a page has one number in the pools of all groups."""
        return cls(len(group.layer_ids), num_pages, group.num_kv_heads, page_size, group.head_dim)

    @property
    def num_rows(self) -> int:
        """Rows of one layer's keys, seen flat."""
        return self.num_pages * self.num_kv_heads * self.page_size


class KvPool:
    """Keys and values of all layers of a group, flat: `keys[layer]` and `values[layer]` are [num_rows, head_dim],
    `blocks` [2 * layers, num_rows, head_dim] all of them.

    `zeros` makes the memory; None: torch does. Raises `ConfigError` naming `kv_pool_tokens` where it cannot.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        dtype: torch.dtype,
        device: torch.device | None = None,
        zeros: Zeros | None = None,
    ) -> None:
        self.geometry = geometry
        self.dtype = dtype
        shape = (2 * geometry.num_layers, geometry.num_rows, geometry.head_dim)
        try:
            blocks = zeros(shape, dtype) if zeros else torch.zeros(shape, dtype=dtype, device=device or "cpu")
        except (OSError, OverflowError, torch.OutOfMemoryError) as error:
            size = f"{math.prod(shape) * dtype.itemsize / (1 << 30):,.1f} GiB"
            message = f"a KV pool of {size} does not fit in memory; lower kv_pool_tokens ({error})"
            raise ConfigError(message, field="kv_pool_tokens") from None
        self.blocks = blocks
        self.keys = [blocks[2 * layer] for layer in range(geometry.num_layers)]
        self.values = [blocks[2 * layer + 1] for layer in range(geometry.num_layers)]

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer by page: views [num_pages, num_kv_heads, page_size, head_dim]."""
        geometry = self.geometry
        shape = (geometry.num_pages, geometry.num_kv_heads, geometry.page_size, geometry.head_dim)
        return self.keys[layer].view(shape), self.values[layer].view(shape)

    def store(self, layer: int, rows: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Write the tokens' keys and values at `rows` (int64 [T * G], from `store_rows`)."""
        head_dim = self.geometry.head_dim
        self.keys[layer].index_copy_(0, rows, k_TGD.reshape(-1, head_dim))
        self.values[layer].index_copy_(0, rows, v_TGD.reshape(-1, head_dim))


def store_rows(geometry: KvGeometry, page_ids: Tensor, offsets: Tensor) -> Tensor:
    """Flat rows of tokens at (page, offset), all heads: int64 [T] each -> int64 [T * G]."""
    heads = torch.arange(geometry.num_kv_heads, dtype=torch.int64, device=page_ids.device)
    return ((page_ids[:, None] * geometry.num_kv_heads + heads) * geometry.page_size + offsets[:, None]).reshape(-1)


def token_rows(geometry: KvGeometry, page_ids_NC: Tensor, num_positions: int) -> Tensor:
    """Flat rows of head 0 for positions 0..num_positions-1 of each page list: [N, C] -> [N, num_positions]."""
    offsets = torch.arange(geometry.page_size, dtype=page_ids_NC.dtype, device=page_ids_NC.device)
    rows_NCP = (page_ids_NC * (geometry.num_kv_heads * geometry.page_size)).unsqueeze(-1) + offsets
    return rows_NCP.reshape(page_ids_NC.shape[0], -1)[:, :num_positions]
