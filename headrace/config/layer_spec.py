"""What one layer of a decoder is made of, as values. Owns which layers may share a pool of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.config.rope import RopeSpec


class AttentionSpec(msgspec.Struct, frozen=True):
    """Grouped-query attention: heads, their rotation, which projections have a bias, and whether heads are normed.

    window   of a layer that really slides, None: it sees all
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    window: int | None


class MlpSpec(msgspec.Struct, frozen=True):
    """A dense gated feed-forward block."""

    intermediate_size: int
    bias: bool


class LayerSpec(msgspec.Struct, frozen=True):
    """One pre-norm block."""

    attention: AttentionSpec
    mlp: MlpSpec


class KvGroup(msgspec.Struct, frozen=True):
    """Layers that are attended alike, over one pool: a page holds [page_size, num_kv_heads, head_dim] keys of each of
    them, and as many values."""

    layer_ids: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec


def kv_groups(layers: Sequence[LayerSpec]) -> tuple[KvGroup, ...]:
    """Every layer in one group. A window is none's matter: where a layer slides, no context is longer."""
    found: dict[tuple[int, int, int, RopeSpec], list[int]] = {}
    for layer_id, layer in enumerate(layers):
        spec = layer.attention
        found.setdefault((spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rope), []).append(layer_id)
    return tuple(KvGroup(tuple(layer_ids), *alike) for alike, layer_ids in found.items())
