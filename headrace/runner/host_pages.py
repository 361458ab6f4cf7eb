"""KV pages in host memory, and their copies from the pools and back, beside a step. Owns that memory and the order of
the copies, and the account of their time; must not know whose pages they are.

On a CUDA device copies run on a stream of their own, after all that was enqueued before the step. Pages are gathered on
the device, and travel as runs of host pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.paged_kv import KvPool
from headrace.types.errors import ConfigError
from headrace.types.request import Int32Array

Mark = TypeVar("Mark")


@dataclass
class CopyTimes:
    """Seconds that copies took, each way."""

    save_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True)
class PageCopies:
    """A step's copies on a device: events before them, between the two ways, and after them."""

    times: CopyTimes
    begin: torch.cuda.Event
    saved: torch.cuda.Event
    loaded: torch.cuda.Event

    def wait(self) -> None:
        """Until they are done. Once: then they are accounted for."""
        self.loaded.synchronize()
        self.times.save_s += self.begin.elapsed_time(self.saved) * 1e-3
        self.times.load_s += self.saved.elapsed_time(self.loaded) * 1e-3


@dataclass(frozen=True)
class _Group:
    """One KV group: the pool's pages as bytes [2 * layers, pages, bytes of a page and layer], and what else holds them:
    the host's [host pages, 2 * layers, bytes], and on a device room for one step's copies each way."""

    pool: Tensor
    host: Tensor
    leaving: Tensor
    coming: Tensor


class HostPages:
    """`num_pages` pages of each pool, of which at most `max_moves` go each way beside a step. Raises `ConfigError`
    naming `host_kv_tokens` where they do not fit."""

    def __init__(self, pools: Sequence[KvPool], num_pages: int, max_moves: int) -> None:
        self.times = CopyTimes()
        self._device = pools[0].blocks.device
        self._is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        try:
            self._groups = [self._group(pool, num_pages, max_moves) for pool in pools]
        except RuntimeError as error:
            message = f"{num_pages} KV pages do not fit in host memory: {error}"
            raise ConfigError(message, field="host_kv_tokens") from None

    def counters(self) -> dict[str, float]:
        """Figures for the metrics."""
        return {"page_save_s": self.times.save_s, "page_load_s": self.times.load_s}

    def move(self, moves: Int32Array) -> PageCopies | None:
        """Begin the copies of a step, as `StepPlan.page_moves`. None: they are done."""
        saves, loads = moves[moves[:, 0] == 0], moves[moves[:, 0] == 1]
        if self._stream is None:
            begin, saved, loaded = self._copy(saves, loads, time.perf_counter)
            self.times.save_s += saved - begin
            self.times.load_s += loaded - saved
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return PageCopies(self.times, *self._copy(saves, loads, _event))

    def _copy(self, saves: Int32Array, loads: Int32Array, mark: Callable[[], Mark]) -> tuple[Mark, Mark, Mark]:
        """Save, then load; what `mark` gives before, between and after."""
        begin = mark()
        for group in self._groups if len(saves) else ():
            self._save(group, saves)
        saved = mark()
        for group in self._groups if len(loads) else ():
            self._load(group, loads)
        return begin, saved, mark()

    def _save(self, group: _Group, moves: Int32Array) -> None:
        leaving = group.leaving[: len(moves)]
        torch.index_select(group.pool.transpose(0, 1), 0, self._ids(moves), out=leaving)
        for own, hosts in _runs(moves):
            group.host[hosts].copy_(leaving[own], non_blocking=True)

    def _load(self, group: _Group, moves: Int32Array) -> None:
        coming = group.coming[: len(moves)]
        for own, hosts in _runs(moves):
            coming[own].copy_(group.host[hosts], non_blocking=True)
        group.pool.index_copy_(1, self._ids(moves), coming.transpose(0, 1))

    def _ids(self, moves: Int32Array) -> Tensor:
        pages = torch.from_numpy(moves[:, 1].astype(np.int64))
        return pages.pin_memory().to(self._device, non_blocking=True) if self._is_cuda else pages

    def _group(self, pool: KvPool, num_pages: int, max_moves: int) -> _Group:
        geometry = pool.geometry
        pages = pool.blocks.view(len(pool.blocks), geometry.num_pages, -1).view(torch.uint8)
        shape = pages.shape[0], pages.shape[2]
        host = torch.empty(num_pages, *shape, dtype=torch.uint8, device="cpu", pin_memory=self._is_cuda)
        leaving, coming = torch.empty(2, max_moves, *shape, dtype=torch.uint8, device=self._device)
        return _Group(*(_as_words(each) for each in (pages, host, leaving, coming)))


def _event() -> torch.cuda.Event:
    """On the current stream."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _as_words(blocks: Tensor) -> Tensor:
    """Bytes [*, *, n] as int64, where they are whole ones: a copy by index costs by the element."""
    return blocks.view(torch.int64) if blocks.shape[-1] % 8 == 0 else blocks


def _runs(moves: Int32Array) -> Iterator[tuple[slice, slice]]:
    """Which moves have host pages that follow each other, and these."""
    for _, run in groupby(enumerate(moves[:, 2].tolist()), key=lambda item: item[1] - item[0]):
        first, *others = run
        count = 1 + len(others)
        yield slice(first[0], first[0] + count), slice(first[1], first[1] + count)
