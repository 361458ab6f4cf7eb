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

    def num_multiplied(self, hidden_size: int) -> int:
        """Weights of projections that each token is multiplied by."""
        return 2 * hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim


class DenseSpec(msgspec.Struct, frozen=True, tag="dense"):
    """A gated feed-forward block."""

    intermediate_size: int
    bias: bool

    def widest(self, hidden_size: int) -> int:
        """Elements per token of what it computes, where they are most."""
        return 2 * self.intermediate_size

    def num_multiplied(self, hidden_size: int) -> int:
        """Weights that each token is multiplied by."""
        return 3 * hidden_size * self.intermediate_size


class ExpertsSpec(msgspec.Struct, frozen=True, tag="experts"):
    """Gated feed-forward blocks, of which a router picks `num_per_token` for each token and adds them up by their
    probabilities, scaled to a sum of 1 where it `normalizes` them. `intermediate_size` is that of each."""

    num_experts: int
    num_per_token: int
    intermediate_size: int
    normalizes: bool

    def widest(self, hidden_size: int) -> int:
        """As `DenseSpec.widest`: each picked expert has the token's input and what it makes of it."""
        return self.num_per_token * (2 * self.intermediate_size + hidden_size)

    def num_multiplied(self, hidden_size: int) -> int:
        """As `DenseSpec.num_multiplied`, the router's among them."""
        return hidden_size * (3 * self.num_per_token * self.intermediate_size + self.num_experts)


MlpSpec = DenseSpec | ExpertsSpec


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
