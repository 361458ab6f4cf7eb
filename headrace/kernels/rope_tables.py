"""Rotary tables: cosines and sines of every position. Owns the frequency formulas; must not know models."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.config import RopeSpec


class RotaryTables(NamedTuple):
    """Cosines and sines by position, [P, D] each, both halves of the last axis equal."""

    cos_PD: Tensor
    sin_PD: Tensor


def rope_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle per position of each pair, float32 [head_dim / 2].

    "linear" divides all frequencies by `factor`. "llama3" (Llama 3.1 model card) divides only those whose wavelength
    exceeds original_max_position / low_freq_factor, keeps those below original_max_position / high_freq_factor, and
    blends between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.scaling == "default":
        return base
    if rope.scaling == "linear":
        return base / rope.factor
    wavelength = 2.0 * math.pi / base
    turns = rope.original_max_position / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1.0 - blend) * base / rope.factor + blend * base


def rope_tables(
    rope: RopeSpec, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device | None = None
) -> RotaryTables:
    """The tables of `num_positions` in `dtype`, computed on the CPU wherever they go.

    Angles are float32 products, as everywhere; their cosines are rounded from float64, so that no vector width shows.
    """
    positions = torch.arange(num_positions, dtype=torch.int64, device="cpu").float()
    angles = torch.outer(positions, rope_frequencies(rope, head_dim)).double()
    angles = torch.cat([angles, angles], dim=-1)
    return RotaryTables(angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device))
