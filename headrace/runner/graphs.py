"""Captured launches by key. Owns the graphs and their common memory pool; knows nothing of what they compute."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable

import torch

from headrace.layers.linear import GemmCounter
from headrace.runner.device_thread import CAPTURE_MODE


class Graphs:
    """Replays what was captured under a key, and runs everything else as it is.

    All graphs share one pool: nothing allocated inside one is read after another has run. `enabled` False captures
    nothing.
    """

    def __init__(self, counter: GemmCounter, *, enabled: bool) -> None:
        self.num_replays = 0
        self._enabled = enabled
        self._counter = counter
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, int]] = {}
        self._pool = torch.cuda.graph_pool_handle() if enabled else None
        self._stream = torch.cuda.Stream() if enabled else None  # type: ignore[no-untyped-call]

    @property
    def num_graphs(self) -> int:
        """Graphs held."""
        return len(self._graphs)

    def capture(self, key: Hashable, body: Callable[[], None]) -> None:
        """Run `body` once as it is, which compiles what it needs, then capture it."""
        body()
        if not self._enabled:
            return
        torch.cuda.synchronize()
        before = self._counter.num_calls
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # a tensor freed meanwhile would end the capture
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=CAPTURE_MODE):
                body()
        finally:
            if collects:
                gc.enable()
        self._graphs[key] = (graph, self._counter.num_calls - before)

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
