"""FlashInfer's kernels over our pool: rows of one token at the front of a step through its decode wrapper, all rows
after them through its prefill wrapper.

Owns the two wrappers, their workspace and the page lists they are planned with. Rows that share leading pages are read
one by one, and steps run without graphs: planning copies to the device, once per step. Must not know scheduling or
layers. Legend: R rows, T packed tokens, N pages of all rows, X width of the fused projection, H, G query and kv heads,
D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.attention.base import AttentionStep, Bucket, DeviceTables, HeadNorms, Int64Array, StepRows
from headrace.attention.projection import HeadProjection
from headrace.kernels.paged_kv import AttentionShape, KvPool
from headrace.kernels.rope_tables import RotaryTables
from headrace.types.errors import ConfigError
from headrace.types.request import Int32Array

TENSOR_CORE_GROUP = 4
"""Query heads per KV head from which decode rows go through tensor cores. The other decode kernel knows groups of 1, 2,
3, 4 and 8 only, so every size has a kernel."""

_LEAST_WORKSPACE = 128 << 20
_BLOCKS_PER_MULTIPROCESSOR = 2
_TILE_ROWS = 128


class Wrapper(Protocol):
    """A kernel with its plan, as FlashInfer's batch wrappers are used here.

    run   q [T, H, D] and (keys, values), each [pages, G, page_size, D], to `out` [T, H, D]; any layer, one plan
    """

    def plan(self, *indices: Tensor, **settings: Any) -> None: ...

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Library:
    """What makes the wrappers, from a workspace, the layout of pages and settings."""

    decode: Callable[..., Wrapper]
    prefill: Callable[..., Wrapper]


@dataclass(frozen=True)
class PageLists:
    """Where contexts are, int32: those of row r on page_ids[firsts[r] : firsts[r + 1]].

    firsts [R + 1], page_ids [N], last_lengths [R] positions on the last page, lengths [R] positions in all
    """

    firsts: Int32Array
    page_ids: Int32Array
    last_lengths: Int32Array
    lengths: Int32Array


def page_lists(page_table: Int32Array, slots: Int64Array, lengths: Int64Array, page_size: int) -> PageLists:
    """The pages of positions 0..length-1 of each slot; lengths are at least 1."""
    num_pages = -(-lengths // page_size)
    ends = np.cumsum(num_pages)
    cells = np.arange(ends[-1]) + np.repeat(slots * page_table.shape[1] - (ends - num_pages), num_pages)
    firsts = np.zeros(len(slots) + 1, np.int32)
    firsts[1:] = ends
    last_lengths = lengths - (num_pages - 1) * page_size
    return PageLists(
        firsts, page_table.reshape(-1).take(cells), last_lengths.astype(np.int32), lengths.astype(np.int32)
    )


@dataclass(frozen=True)
class _Planned:
    """Packed tokens of the step that the wrappers are planned for: the decode rows' come first."""

    num_decode: int
    num_tokens: int


class FlashInferAttention:
    """Plans and runs over one pool. `dtype` is that of queries; the pool's may be narrower.

    `captures` is False: a plan's copies cannot be part of a graph, and what they hold changes with every step.
    The constructor runs both kernels once, which builds them where no cache has them: 10 to 60 seconds each.
    `library` is the package `flashinfer` unless given. Raises `ConfigError` (attention_backend) if it is not installed.
    """

    captures = False
    metadata_size = 0

    def __init__(
        self,
        shape: AttentionShape,
        pool: KvPool,
        rotary: RotaryTables,
        dtype: torch.dtype,
        library: Library | None = None,
    ) -> None:
        library = import_library() if library is None else library
        self._device = device = rotary.cos_PD.device
        self._shape = shape
        self._pool = pool
        self._dtype = dtype
        self._page_size = pool.geometry.page_size
        self.projection = HeadProjection(shape, pool, rotary)
        workspace = torch.zeros(_workspace_bytes(shape, device), dtype=torch.uint8, device=device)
        has_wide_groups = shape.num_heads // shape.num_kv_heads >= TENSOR_CORE_GROUP
        # Both may have the same workspace: the launches of a stream follow one another.
        self._decode = library.decode(workspace, "HND", use_tensor_cores=has_wide_groups)
        self._prefill = library.prefill(workspace, "HND")
        self._planned = _Planned(0, 0)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._warm()

    def fill(self, metadata: Int32Array, rows: StepRows, bucket: Bucket) -> int:
        """Plan the next step; writes no metadata."""
        starts, lengths = rows.starts.astype(np.int64), rows.lengths.astype(np.int64)
        contexts, slots = starts + lengths, rows.slots.astype(np.int64)
        is_longer = lengths != 1
        num_decode = int(is_longer.argmax()) if is_longer.any() else len(lengths)
        page_size = self._page_size
        if self._copied is not None:
            self._copied.synchronize()  # the wrappers' pinned memory is free again: long ago, at depths of up to 1
        if num_decode:
            pages = page_lists(rows.page_table, slots[:num_decode], contexts[:num_decode], page_size)
            self._plan_decode(pages)
        if num_decode < len(lengths):
            pages = page_lists(rows.page_table, slots[num_decode:], contexts[num_decode:], page_size)
            self._plan_prefill(pages, lengths[num_decode:])
        if self._copied is not None:
            self._copied.record()
        self._planned = _Planned(num_decode, int(lengths.sum()))
        return 0

    def steps(self, tables: DeviceTables, bucket: Bucket) -> list[AttentionStep]:
        """The launches of the step that was planned last; before any was, outputs are undefined."""
        return [_FlashInferStep(self, tables, self._planned)]

    def attend(self, layer: int, q_THD: Tensor, planned: _Planned) -> Tensor:
        """As planned: [T, H, D], contiguous; tokens of no row are left as they are found."""
        pages = self._pool.pages(layer)
        out_THD = q_THD.new_empty(q_THD.shape)
        decode, others = slice(0, planned.num_decode), slice(planned.num_decode, planned.num_tokens)
        if planned.num_decode:
            self._decode.run(q_THD[decode], pages, out=out_THD[decode])
        if planned.num_decode < planned.num_tokens:
            self._prefill.run(q_THD[others], pages, out=out_THD[others])
        return out_THD

    def _plan_decode(self, pages: PageLists) -> None:
        firsts, last_lengths, lengths = map(self._host, (pages.firsts, pages.last_lengths, pages.lengths))
        self._decode.plan(
            firsts, self._device_copy(pages.page_ids), last_lengths,
            head_dim=self._shape.head_dim, seq_lens=lengths, **self._settings(),
        )  # fmt: skip

    def _plan_prefill(self, pages: PageLists, num_queries: Int64Array) -> None:
        """Causal: the last query of a row sees all of its context, the one before it one position less."""
        query_firsts = np.zeros(len(num_queries) + 1, np.int32)
        query_firsts[1:] = np.cumsum(num_queries)
        firsts, last_lengths, lengths = map(self._host, (pages.firsts, pages.last_lengths, pages.lengths))
        self._prefill.plan(
            self._host(query_firsts), firsts, self._device_copy(pages.page_ids), last_lengths,
            head_dim_qk=self._shape.head_dim, causal=True, seq_lens=lengths, **self._settings(),
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """What both wrappers are planned with."""
        return {
            "num_qo_heads": self._shape.num_heads,
            "num_kv_heads": self._shape.num_kv_heads,
            "page_size": self._page_size,
            "sm_scale": self._shape.scale,
            "q_data_type": self._dtype,
            "kv_data_type": self._pool.dtype,
        }

    def _host(self, values: Int32Array) -> Tensor:
        """Where both the planner, on the host, and a copy that waits for nobody can read it."""
        tensor = torch.from_numpy(values)
        return tensor if self._copied is None else tensor.pin_memory()

    def _device_copy(self, values: Int32Array) -> Tensor:
        return self._host(values).to(self._device, non_blocking=True)

    def _warm(self) -> None:
        """Run both kernels over page 0, so that no step waits for a compiler."""
        nothing = np.zeros((1, 2), np.int32)
        rows = StepRows(nothing[0], nothing[0], np.array([1, 2]), np.zeros((0, 3), np.int32), nothing)
        self.fill(nothing[0, :0], rows, Bucket(3, 2, is_decode=False))
        q_shape = (self._planned.num_tokens, self._shape.num_heads, self._shape.head_dim)
        self.attend(0, torch.zeros(q_shape, dtype=self._dtype, device=self._device), self._planned)
        self._planned = _Planned(0, 0)


class _FlashInferStep:
    """As `AttentionStep`."""

    def __init__(self, attention: FlashInferAttention, tables: DeviceTables, planned: _Planned) -> None:
        self._attention = attention
        self._tables = tables
        self._planned = planned

    def run(self, layer: int, qkv_TX: Tensor, norms: HeadNorms | None) -> Tensor:
        """As `AttentionStep.run`."""
        q_THD = self._attention.projection.run(layer, qkv_TX, norms, self._tables)
        return self._attention.attend(layer, q_THD, self._planned).view(qkv_TX.shape[0], -1)


def import_library() -> Library:
    """The installed package. Raises `ConfigError` (attention_backend) if it cannot be imported."""
    try:
        package = importlib.import_module("flashinfer")
    except ImportError as error:
        message = f"attention backend 'flashinfer' needs a package: pip install flashinfer-python ({error})"
        raise ConfigError(message, field="attention_backend") from error
    return Library(package.BatchDecodeWithPagedKVCacheWrapper, package.BatchPrefillWithPagedKVCacheWrapper)


def _workspace_bytes(shape: AttentionShape, device: torch.device) -> int:
    """For the partial results of contexts that are cut: float32, a tile of query rows for every block that fits on the
    device at once and every query head of a KV head; never less than FlashInfer recommends."""
    if device.type != "cuda":
        return _LEAST_WORKSPACE
    num_blocks = _BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    rows = num_blocks * _TILE_ROWS * (shape.num_heads // shape.num_kv_heads)
    return max(_LEAST_WORKSPACE, rows * (shape.head_dim + 1) * 4 + (1 << 20))
