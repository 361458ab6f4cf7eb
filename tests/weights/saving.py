"""Writes live weights as a checkpoint folder, for what is read back by an engine and by transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from headrace.weights.store import WeightStore


def save_checkpoint(store: WeightStore, folder: Path, *, max_shard_bytes: int = 4 << 30) -> list[Path]:
    """Write the live weights as safetensors in HF layout, engine dtype; tied names are left out. Returns the files.

    One `model.safetensors`, or shards with an index when the weights are larger than `max_shard_bytes`. Each file
    appears whole or not at all; the index comes last. `config.json` is the caller's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(store, max_shard_bytes)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        partial = folder / f".{file_name}.partial"
        save_file({name: store.read(name) for name in names}, partial, metadata={"format": "pt"})
        os.replace(partial, folder / file_name)
        written.append(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        total_size = sum(store.info(name).num_bytes for name in weight_map)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        written.append(folder / "model.safetensors.index.json")
        partial = folder / ".model.safetensors.index.json.partial"
        partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, written[-1])
    return written


def _shards(store: WeightStore, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name in store.weight_map.rules_by_name:
        size = store.info(name).num_bytes
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
