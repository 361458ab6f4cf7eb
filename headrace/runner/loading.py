"""Fills a weight store at start: from a folder, or at random. Owns the check of a folder and the report of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from headrace.config import ResolvedConfig
from headrace.models import weight_map
from headrace.types.errors import CheckpointError, WeightUpdateError
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.files import weight_files
from headrace.weights.shard import ONLY_RANK, Shard
from headrace.weights.staging import TensorData
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import WeightMap

Progress = Callable[[str, int, int], None]
"""Told as a start goes on: so many of all "weights", or "graphs", are there; of "sizing" the count says nothing."""


def checked_weight_map(resolved: ResolvedConfig, shard: Shard = ONLY_RANK) -> WeightMap:
    """The model's weight map on one rank, once the headers of the files in its folder were found to hold just that.

    Raises `CheckpointError` naming every tensor that is missing, unknown, misshapen or of a dtype that no engine
    computes in, as quantized ones are.
    """
    table = weight_map(resolved.model, shard)
    if resolved.engine.load_format == "dummy":
        return table
    names = table.of_parameters() if resolved.engine.load_format == "sharded" else table
    manifest = names.untie(_checkpoint(resolved, shard).manifest())
    try:
        names.check_manifest(manifest, partial=False)
    except WeightUpdateError as error:
        message = f"the weights in {resolved.folder} are not those of its config.json: {error.message}"
        if resolved.engine.load_format == "sharded":
            message += "; a sharded save is for the version of Headrace and the settings that it was made with"
        raise CheckpointError(message, field=error.field) from None
    return table


Reload = Callable[[], Iterator[None]]


def load_weights(
    store: WeightStore, resolved: ResolvedConfig, on_progress: Progress | None, shard: Shard = ONLY_RANK
) -> Reload:
    """`on_progress("weights", done, total)` is called per tensor. Returns how the same weights are loaded again, in
    slices. Both raise `CheckpointError` for a bad checkpoint; the second also for files that were changed since."""
    if resolved.engine.load_format == "dummy":
        store.fill_random(resolved.engine.seed)
        return partial(_fill_again, store, resolved.engine.seed)
    files = weight_files(resolved.folder)
    total = len(store.weight_map.params if resolved.engine.load_format == "sharded" else store.weight_map.rules_by_name)
    for _ in _filling(store, resolved, _counted(_checkpoint(resolved, shard).tensors(), total, on_progress)):
        pass
    return partial(_load_again, store, resolved, shard, files)


def _checkpoint(resolved: ResolvedConfig, shard: Shard) -> Checkpoint:
    return Checkpoint(Path(resolved.folder), resolved.engine.load_format, shard=shard)


def _filling(store: WeightStore, resolved: ResolvedConfig, source: Iterable[tuple[str, TensorData]]) -> Iterator[None]:
    is_sharded = resolved.engine.load_format == "sharded"
    return store.load_parameters_in_slices(source) if is_sharded else store.load_in_slices(source)


def _fill_again(store: WeightStore, seed: int) -> Iterator[None]:
    store.fill_random(seed)
    yield


def _load_again(store: WeightStore, resolved: ResolvedConfig, shard: Shard, files: frozenset[object]) -> Iterator[None]:
    yield from _filling(store, resolved, _checkpoint(resolved, shard).tensors())
    if weight_files(resolved.folder) != files:
        raise CheckpointError(f"the weights in {resolved.folder} are not those of the start any more", field="restore")


def _counted(
    source: Iterable[tuple[str, TensorData]], total: int, on_progress: Progress | None
) -> Iterator[tuple[str, TensorData]]:
    for done, item in enumerate(source, 1):
        yield item
        if on_progress is not None:
            on_progress("weights", min(done, total), total)
