"""Fills a weight store at start: from a folder, or at random. Owns the report of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from headrace.config import ResolvedConfig
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.staging import TensorData
from headrace.weights.store import WeightStore

Progress = Callable[[int, int], None]


def load_weights(store: WeightStore, resolved: ResolvedConfig, on_progress: Progress | None) -> None:
    """`on_progress(done, total)` is called per tensor. Raises `CheckpointError` for a bad checkpoint."""
    if resolved.engine.load_format == "dummy":
        store.fill_random(resolved.engine.seed)
        return
    source = Checkpoint(Path(resolved.folder), resolved.engine.load_format).tensors()
    store.load(_counted(source, len(store.weight_map.rules_by_name), on_progress))


def _counted(
    source: Iterable[tuple[str, TensorData]], total: int, on_progress: Progress | None
) -> Iterator[tuple[str, TensorData]]:
    for done, item in enumerate(source, 1):
        yield item
        if on_progress is not None:
            on_progress(min(done, total), total)
