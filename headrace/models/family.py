"""What one family of decoders says about itself: its layer, and its tensors as data, by name and where they go.

All families have the tensors of `SKELETON`; a family states which further parts its layers may have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from headrace.config import LayerSpec
from headrace.layers.params import Params
from headrace.layers.step import KvPlace
from headrace.models.decoder import Layer

Size = Literal["hidden", "heads", "kv_heads", "intermediate", "head_dim"]


class Tensor(msgspec.Struct, frozen=True):
    """A tensor of one layer: `name` in the checkpoint below "model.layers.{i}.", the parameter it is a part of, and its
    sizes. Parts of a parameter follow each other in the order of the table. `shard_axis` is what tensor parallelism
    would split."""

    name: str
    param: str
    shape: tuple[Size, ...]
    shard_axis: int | None = None


class Part(msgspec.Struct, frozen=True):
    """Tensors that a layer has only if its spec says so."""

    present: Callable[[LayerSpec], bool]
    tensors: tuple[Tensor, ...]


class Family(msgspec.Struct, frozen=True):
    """A decoder family; `layer` makes a layer over its parameters, `parts` are what it may have beyond `SKELETON`."""

    architecture: str
    layer: Callable[[Params, KvPlace], Layer]
    parts: tuple[Part, ...] = ()

    def layer_tensors(self, layer: LayerSpec) -> tuple[Tensor, ...]:
        """All tensors of one layer."""
        return SKELETON + tuple(tensor for part in self.parts if part.present(layer) for tensor in part.tensors)


SKELETON = (
    Tensor("input_layernorm.weight", "attention_norm.weight", ("hidden",)),
    Tensor("self_attn.q_proj.weight", "qkv.weight", ("heads", "hidden"), 0),
    Tensor("self_attn.k_proj.weight", "qkv.weight", ("kv_heads", "hidden"), 0),
    Tensor("self_attn.v_proj.weight", "qkv.weight", ("kv_heads", "hidden"), 0),
    Tensor("self_attn.o_proj.weight", "output.weight", ("hidden", "heads"), 1),
    Tensor("post_attention_layernorm.weight", "mlp_norm.weight", ("hidden",)),
    Tensor("mlp.gate_proj.weight", "gate_up.weight", ("intermediate", "hidden"), 0),
    Tensor("mlp.up_proj.weight", "gate_up.weight", ("intermediate", "hidden"), 0),
    Tensor("mlp.down_proj.weight", "down.weight", ("hidden", "intermediate"), 1),
)
"""Pre-norm attention and gated MLP, as in Llama."""

QKV_BIAS = Part(
    lambda layer: layer.attention.qkv_bias,
    (
        Tensor("self_attn.q_proj.bias", "qkv.bias", ("heads",), 0),
        Tensor("self_attn.k_proj.bias", "qkv.bias", ("kv_heads",), 0),
        Tensor("self_attn.v_proj.bias", "qkv.bias", ("kv_heads",), 0),
    ),
)
OUTPUT_BIAS = Part(lambda layer: layer.attention.o_bias, (Tensor("self_attn.o_proj.bias", "output.bias", ("hidden",)),))
MLP_BIAS = Part(
    lambda layer: layer.mlp.bias,
    (
        Tensor("mlp.gate_proj.bias", "gate_up.bias", ("intermediate",), 0),
        Tensor("mlp.up_proj.bias", "gate_up.bias", ("intermediate",), 0),
        Tensor("mlp.down_proj.bias", "down.bias", ("hidden",)),
    ),
)
QK_NORM = Part(
    lambda layer: layer.attention.qk_norm,
    (
        Tensor("self_attn.q_norm.weight", "q_norm.weight", ("head_dim",)),
        Tensor("self_attn.k_norm.weight", "k_norm.weight", ("head_dim",)),
    ),
)
