"""Whole models into live memory: from a checkpoint, or as noise. Owns the checks of a checkpoint's tensors.

Must not know updates, nor what else may be done with live memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from headrace.types.errors import CheckpointError, WeightUpdateError
from headrace.weights.region import Region
from headrace.weights.staging import BLOCK_BYTES, TensorData, info_of, is_finite, not_finite, row_blocks, source_of
from headrace.weights.weight_map import FLOAT_DTYPES, WeightMap, is_recomputed

RegionOf = Callable[[str], Region]
"""The live memory of a tensor, or of what it is tied to."""

_INIT_STD = 0.02
_LOAD_BYTES = {"cpu": 1 << 20, "cuda": 1 << 24}
_FILL_BYTES = {"cpu": BLOCK_BYTES, "cuda": 1 << 28}


def load_checkpoint(
    weight_map: WeightMap, region_of: RegionOf, source: Iterable[tuple[str, TensorData]], *, check_finite: bool
) -> Iterator[None]:
    """Overwrite live memory with a whole checkpoint, resting after each tensor.

    Every element is written exactly once: each rule once, and the map's regions partition the parameters. Of tied names
    the first that comes is written, another one compared. Raises `CheckpointError` naming a missing, unknown, doubled,
    misshapen, non-float, non-finite or unreadable tensor, or a tied one that differs.
    """
    written: set[str] = set()
    filled: set[str] = set()
    for name, data in source:
        if is_recomputed(name):
            continue
        _check_loaded(weight_map, name, data, written)
        written.add(name)
        aliases = weight_map.aliases
        target = aliases.get(name, name)
        _take(name, data, region_of(target), aliases, is_filled=target in filled, check_finite=check_finite)
        filled.add(target)
        yield
    for name, problem in weight_map.find_doubled(filled):
        raise CheckpointError(problem, field=name)
    missing = weight_map.missing(filled)
    if missing:
        message = f"the checkpoint lacks {len(missing)} tensor(s): {', '.join(missing[:8])}"
        raise CheckpointError(message, field=missing[0])


def fill_normal(weight_map: WeightMap, region_of: RegionOf, seed: int) -> None:
    """Noise in all tensors, a pure function of (seed, HF name, shape, dtype, device)."""
    for name, rule in weight_map.rules_by_name.items():
        region = region_of(name)
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(region.device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
        row_size = math.prod(rule.shape[1:])
        for rows in row_blocks(rule.shape, 4, _FILL_BYTES[region.device.type]):
            part = slice(rows.start * row_size, rows.stop * row_size)
            values = torch.empty(part.stop - part.start, dtype=torch.float32, device=region.device)
            values.normal_(0.0, _INIT_STD, generator=generator)
            block = region.write_view(part)
            block.copy_(values)
            region.write_back(part, block)


def fill_initial(weight_map: WeightMap, region_of: RegionOf, seed: int) -> None:
    """As Hugging Face initialises: norm weights are 1, all else is normal with standard deviation 0.02, and as
    `fill_normal` a pure function."""
    fill_normal(weight_map, region_of, seed)
    for name, rule in weight_map.rules_by_name.items():
        if len(rule.shape) == 1 and "norm" in name:
            for memory in region_of(name).memories:
                memory.fill_(1.0)


def _check_loaded(weight_map: WeightMap, name: str, data: TensorData, written: set[str]) -> None:
    expected = weight_map.shape_of(name)
    if expected is None:
        raise CheckpointError(f"{name} is not a tensor of this model", field=name)
    if name in written:
        raise CheckpointError(f"{name} comes twice in the checkpoint", field=name)
    info = info_of(name, data)
    if info.shape != expected:
        raise CheckpointError(f"{name} has shape {list(info.shape)}, expected {list(expected)}", field=name)
    if info.dtype not in FLOAT_DTYPES:
        message = f"{name} has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
        raise CheckpointError(message, field=name)


def _take(
    name: str, data: TensorData, region: Region, aliases: Mapping[str, str], *, is_filled: bool, check_finite: bool
) -> None:
    """Write one whole tensor into its region, or compare it with the tied one that is there."""
    try:
        source = source_of(info_of(name, data), data)
    except WeightUpdateError as error:
        raise CheckpointError(error.message, field=name) from None
    for part in row_blocks((region.num_elements,), region.dtype.itemsize, _LOAD_BYTES[region.device.type]):
        if not region.holds_any(part):
            continue  # another rank's
        if not is_filled:
            block = region.write_view(part)
            source.copy(part, block, region.runs(part))
            if check_finite and not is_finite(block):
                raise CheckpointError(not_finite(name, block.dtype), field=name)
            region.write_back(part, block)
            continue
        block = torch.empty(part.stop - part.start, dtype=region.dtype, device=region.device)
        source.copy(part, block, region.runs(part))
        if not region.equals(part, block):
            tied = next(pair for pair in aliases.items() if name in pair)
            message = f"{tied[0]} is tied to {tied[1]} by config.json but holds other values"
            raise CheckpointError(message, field=tied[0])
