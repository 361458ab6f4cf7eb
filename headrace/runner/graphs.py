"""Captured launches by key. Owns the graphs, their common memory pool, and which were captured; knows nothing of what
they compute."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from headrace.layers.linear import GemmCounter
from headrace.runner.device_thread import CAPTURE_MODE


class Graphs:
    """Replays what was captured under a key, and runs everything else as it is.

    All graphs share one pool: nothing allocated inside one is read after another has run. They are captured on the
    thread's stream, whose workspace for products is there by then, so that nothing in the pool outlives them. `enabled`
    False captures nothing.
    """

    def __init__(self, counter: GemmCounter, *, enabled: bool) -> None:
        self.num_replays = 0
        self._enabled = enabled
        self._counter = counter
        self._bodies: dict[Hashable, Callable[[], None]] = {}
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, int]] = {}
        self._pool = torch.cuda.graph_pool_handle() if enabled else None
        self._pool_bytes = 0  # of all of them

    @property
    def num_graphs(self) -> int:
        """Graphs held."""
        return len(self._graphs)

    @property
    def dropped(self) -> Iterator[Hashable]:
        """What was captured once and is not now, in that order."""
        return (key for key in self._bodies if key not in self._graphs)

    def capture(self, key: Hashable, body: Callable[[], None], first: Callable[[], None] | None = None) -> None:
        """Run `first`, or `body`, once as it is, which builds and loads all kernels of `body`; then capture that."""
        (first or body)()
        if self._enabled:
            self._bodies[key] = body
            self.capture_again(key)

    def capture_again(self, key: Hashable) -> None:
        """Capture what was dropped. Nothing is run, so no memory that it would write to is touched."""
        body, before = self._bodies[key], self._counter.num_calls
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # a tensor freed meanwhile would end the capture
        try:
            # Not `torch.cuda.graph`, which first has torch give back all memory that it keeps, for steps to take again.
            graph.capture_begin(self._pool, capture_error_mode=CAPTURE_MODE)
            try:
                body()
            finally:
                graph.capture_end()
        except BaseException:
            graph.reset()  # whoever keeps the error would keep it
            raise
        finally:
            if collects:
                gc.enable()
        self._graphs[key] = (graph, self._counter.num_calls - before)

    def check_room(self) -> None:
        """Raise `torch.OutOfMemoryError` where what was dropped has no room any more. A capture that finds out half-way
        may leave torch's allocator believing that it goes on, which then gives nothing back."""
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < self._pool_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory: captured graphs had {self._pool_bytes >> 20} MiB")

    def drop(self) -> None:
        """Give all graphs up, which the device may not be at work on. Their pool is torch's then, to be given back by
        `torch.cuda.empty_cache`."""
        if self._graphs:
            segments: Any = torch.cuda.memory_snapshot(self._pool, include_traces=False)  # type: ignore[no-untyped-call]
            self._pool_bytes = max(self._pool_bytes, sum(segment["total_size"] for segment in segments))
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        if self._enabled:
            self._pool = torch.cuda.graph_pool_handle()  # the former one is not to be captured into any more

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Replay the graph of `key`, or run `body` if there is none."""
        found = self._graphs.get(key)
        if found is None:
            body()
            return
        graph, num_gemms = found
        graph.replay()
        self.num_replays += 1
        self._counter.num_calls += num_gemms
