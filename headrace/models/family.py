"""What a family of decoders is made of: its layers, and the tensors of a layer as data, by name and where they go.

Which tensors a layer has is said by its `LayerSpec` alone: what a family takes a field for is known to `ModelSpec`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from headrace.config import LayerSpec
from headrace.config.layer_spec import DenseSpec, ExpertsSpec
from headrace.layers.params import Params
from headrace.layers.step import KvPlace
from headrace.models.decoder import Layer
from headrace.types.errors import InternalError

Size = Literal["hidden", "heads", "kv_heads", "intermediate", "head_dim"]


class LayerTensor(msgspec.Struct, frozen=True):
    """A tensor of one layer: `name` in the checkpoint below "model.layers.{i}.", the parameter it is a part of, and its
    sizes. Parts of a parameter follow each other in the order of the table. `shard_axis` is what tensor parallelism
    would split."""

    name: str
    param: str
    shape: tuple[Size, ...]
    shard_axis: int | None = None


class ExpertLayers(msgspec.Struct, frozen=True):
    """Layers of experts; `layer` makes one.

    Below "model.layers.{i}." a checkpoint has "{prefix}.gate.weight", the router, and of each expert
    "{prefix}.experts.{e}.{projection}.weight", for gate, up and down. The modules of transformers hold those of a layer
    in two tensors (`headrace.weights.experts`), and the router, below "mlp", whatever the prefix. Parameters are
    "router.weight", "experts_gate_up.weight" and "experts_down.weight".
    """

    layer: Callable[[Params, KvPlace, ExpertsSpec], Layer]
    prefix: str
    projections: tuple[str, str, str]


class Family(msgspec.Struct, frozen=True):
    """A decoder family. `dense` makes a layer with one feed-forward block for all tokens, and `experts` one of experts,
    where it has such; each is given its spec."""

    dense: Callable[[Params, KvPlace, LayerSpec], Layer] | None
    experts: ExpertLayers | None = None

    def layer(self, params: Params, kv: KvPlace, spec: LayerSpec) -> Layer:
        """The layer of this spec."""
        if isinstance(spec.mlp, ExpertsSpec) and self.experts is not None:
            return self.experts.layer(params, kv, spec.mlp)
        if isinstance(spec.mlp, DenseSpec) and self.dense is not None:
            return self.dense(params, kv, spec)
        raise InternalError(f"the family has no layers of {type(spec.mlp).__name__}")


def layer_tensors(layer: LayerSpec) -> tuple[LayerTensor, ...]:
    """All tensors of a layer, of whatever family, but for those of experts."""
    attention, mlp = layer.attention, layer.mlp
    return (
        *SKELETON,
        *(DENSE_MLP if isinstance(mlp, DenseSpec) else ()),
        *(QKV_BIAS if attention.qkv_bias else ()),
        *(OUTPUT_BIAS if attention.o_bias else ()),
        *(MLP_BIAS if isinstance(mlp, DenseSpec) and mlp.bias else ()),
        *(QK_NORM if attention.qk_norm else ()),
    )


SKELETON = (
    LayerTensor("input_layernorm.weight", "attention_norm.weight", ("hidden",)),
    LayerTensor("self_attn.q_proj.weight", "qkv.weight", ("heads", "hidden"), 0),
    LayerTensor("self_attn.k_proj.weight", "qkv.weight", ("kv_heads", "hidden"), 0),
    LayerTensor("self_attn.v_proj.weight", "qkv.weight", ("kv_heads", "hidden"), 0),
    LayerTensor("self_attn.o_proj.weight", "output.weight", ("hidden", "heads"), 1),
    LayerTensor("post_attention_layernorm.weight", "mlp_norm.weight", ("hidden",)),
)
"""Pre-norm attention, and the norm of what follows it, as in Llama."""

DENSE_MLP = (
    LayerTensor("mlp.gate_proj.weight", "gate_up.weight", ("intermediate", "hidden"), 0),
    LayerTensor("mlp.up_proj.weight", "gate_up.weight", ("intermediate", "hidden"), 0),
    LayerTensor("mlp.down_proj.weight", "down.weight", ("hidden", "intermediate"), 1),
)
QKV_BIAS = (
    LayerTensor("self_attn.q_proj.bias", "qkv.bias", ("heads",), 0),
    LayerTensor("self_attn.k_proj.bias", "qkv.bias", ("kv_heads",), 0),
    LayerTensor("self_attn.v_proj.bias", "qkv.bias", ("kv_heads",), 0),
)
OUTPUT_BIAS = (LayerTensor("self_attn.o_proj.bias", "output.bias", ("hidden",)),)
MLP_BIAS = (
    LayerTensor("mlp.gate_proj.bias", "gate_up.bias", ("intermediate",), 0),
    LayerTensor("mlp.up_proj.bias", "gate_up.bias", ("intermediate",), 0),
    LayerTensor("mlp.down_proj.bias", "down.bias", ("hidden",)),
)
QK_NORM = (
    LayerTensor("self_attn.q_norm.weight", "q_norm.weight", ("head_dim",)),
    LayerTensor("self_attn.k_norm.weight", "k_norm.weight", ("head_dim",)),
)
