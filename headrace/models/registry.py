"""From a `ModelSpec` to its weight map and its decoder."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headrace.config import LayerSpec, ModelSpec, stages_of
from headrace.config.layer_spec import ExpertsSpec
from headrace.kernels import LayerKernels
from headrace.layers.linear import Embedding, GemmCounter
from headrace.layers.params import Params
from headrace.layers.sharded import ShardedEmbedding, ShardedKernels
from headrace.layers.step import KvPlace
from headrace.models.decoder import Decoder
from headrace.models.family import ExpertLayers, Family, LayerTensor, Size, layer_tensors
from headrace.models.llama import LlamaLayer
from headrace.models.mixtral import MixtralLayer
from headrace.models.qwen3 import Qwen3Layer
from headrace.models.qwen3_moe import Qwen3MoeLayer
from headrace.parallel import SINGLE, Mesh
from headrace.weights.boxes import Box
from headrace.weights.experts import ExpertTensors
from headrace.weights.shard import ONLY_RANK, Shard
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import ParamSpec, Piece, WeightMap, WeightRule

FAMILIES = {
    "LlamaForCausalLM": Family(LlamaLayer),
    "MistralForCausalLM": Family(LlamaLayer),
    "MixtralForCausalLM": Family(None, ExpertLayers(MixtralLayer, "block_sparse_moe", ("w1", "w3", "w2"))),
    "Qwen2ForCausalLM": Family(LlamaLayer),
    "Qwen3ForCausalLM": Family(Qwen3Layer),
    "Qwen3MoeForCausalLM": Family(
        Qwen3Layer, ExpertLayers(Qwen3MoeLayer, "mlp", ("gate_proj", "up_proj", "down_proj"))
    ),
}
"""What computes the layers of each architecture that `ModelSpec` knows."""

_EMBED, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FINAL_NORM = LayerTensor("norm.weight", "final_norm.weight", ("hidden",))


def weight_map(spec: ModelSpec, shard: Shard = ONLY_RANK) -> WeightMap:
    """Every Hugging Face tensor of the checkpoint and the boxes of parameters it fills, on one rank.

    Parameters: "embed", "lm_head" (unless tied), "final_norm.weight", and per layer "layers.{i}." + the parameter names
    of `headrace.models.family`. Raises `UnsupportedModelError` for what does not split over so many ranks.
    """
    layout, family = _Layout(spec, shard), FAMILIES[spec.architecture]
    stage = stages_of(spec, shard.num_stages)[shard.stage]
    is_tied = spec.tie_word_embeddings  # its first and its last stage have it then
    has_embed, num_holders = stage.is_first or (stage.is_last and is_tied), 2 if is_tied and shard.num_stages > 1 else 1
    layout.add_vocabulary(_EMBED, "embed", is_held=has_embed, is_counted=stage.is_first, num_holders=num_holders)
    for index, layer in enumerate(spec.layers):
        layout.is_held = stage.start <= index < stage.end
        sizes = _sizes_of(spec, layer)
        for tensor in layer_tensors(layer):
            layout.add(f"model.layers.{index}.{tensor.name}", f"layers.{index}.{tensor.param}", tensor, sizes)
        if isinstance(layer.mlp, ExpertsSpec) and family.experts is not None:
            layout.add_experts(index, family.experts, layer.mlp)
    layout.is_held = stage.is_last
    layout.add("model.norm.weight", "final_norm.weight", _FINAL_NORM, {"hidden": spec.hidden_size})
    if not spec.tie_word_embeddings:
        layout.add_vocabulary(_LM_HEAD, "lm_head", is_held=stage.is_last, is_counted=True)
    return layout.weight_map({_LM_HEAD: _EMBED} if spec.tie_word_embeddings else {})


def _sizes_of(spec: ModelSpec, layer: LayerSpec) -> dict[Size, int]:
    attention = layer.attention
    return {
        "hidden": spec.hidden_size,
        "heads": attention.num_heads * attention.head_dim,
        "kv_heads": attention.num_kv_heads * attention.head_dim,
        "intermediate": layer.mlp.intermediate_size,
        "head_dim": attention.head_dim,
    }


class _Layout:
    """Places tensors in parameters, one behind the other along the first axis, each as far as this rank holds it:
    nothing of it where not `is_held`, on other stages."""

    def __init__(self, spec: ModelSpec, shard: Shard) -> None:
        self.is_held = True
        self._shard = shard
        self._vocabulary = (spec.vocab_size, spec.hidden_size)
        self._params: dict[str, ParamSpec] = {}
        self._rules: list[WeightRule] = []
        self._other_names: list[WeightRule] = []

    def add(self, name: str, param: str, tensor: LayerTensor, sizes: Mapping[Size, int]) -> None:
        """The next rows of a parameter."""
        shape = tuple(sizes[size] for size in tensor.shape)
        if not self.is_held:
            self._rules.append(WeightRule(name, shape, ()))
            return
        held, is_counted, num_holders = Box.whole(shape), self._shard.rank == 0, self._shard.num_ranks
        if tensor.shard_axis is not None:
            unit = sizes["head_dim"] if tensor.shape[tensor.shard_axis] in ("heads", "kv_heads") else 1
            held, is_counted = self._shard.part(shape, tensor.shard_axis, unit)
            num_holders = self._shard.num_holders(shape[tensor.shard_axis] // unit)
        before = self._params.get(param, ParamSpec(param, (0,)))
        target = Box((before.shape[0], *(0 for _ in shape[1:])), held.shape)
        self._params[param] = ParamSpec(param, (before.shape[0] + held.shape[0], *held.shape[1:]))
        piece = Piece(param, held, target, is_counted=is_counted, num_holders=num_holders)
        self._rules.append(WeightRule(name, shape, (piece,)))

    def add_experts(self, layer: int, family: ExpertLayers, spec: ExpertsSpec) -> None:
        """The router and the experts of a layer, both by a checkpoint's names and by those of transformers' modules.
        Every rank has all experts, and a part of each."""
        (_, hidden), param = self._vocabulary, f"layers.{layer}."
        prefix, whole_prefix = (f"model.layers.{layer}.{below}" for below in (family.prefix, "mlp"))
        tensors = ExpertTensors(
            *(f"{prefix}.experts", f"{param}experts_gate_up.weight", f"{param}experts_down.weight"),
            *(spec.num_experts, hidden, spec.intermediate_size),
            whole_prefix=f"{whole_prefix}.experts",
            projections=family.projections,
            width=self._shard,
        )
        box = Box.whole((spec.num_experts, hidden))
        shard = self._shard
        router = Piece(f"{param}router.weight", box, box, (), shard.rank == 0, shard.num_ranks)
        names = dict.fromkeys((prefix, whole_prefix))
        routers = [WeightRule(f"{name}.gate.weight", box.shape, (router,)) for name in names]
        rules, others = [routers[0], *tensors.one_by_one()], [*routers[1:], *tensors.all_in_one()]
        if self.is_held:
            self._params |= {each.name: each for each in (ParamSpec(router.param, box.shape), *tensors.params())}
        else:
            rules, others = ([msgspec.structs.replace(rule, pieces=()) for rule in each] for each in (rules, others))
        self._rules += rules
        self._other_names += others

    def add_vocabulary(self, name: str, param: str, *, is_held: bool, is_counted: bool, num_holders: int = 1) -> None:
        """A parameter of one row per token, as many on every rank of a stage: the last ones may be padding. It may be
        on `num_holders` stages, on one of which it counts."""
        if not is_held:
            self._rules.append(WeightRule(name, self._vocabulary, ()))
            return
        held, padding = self._shard.padded_rows(self._vocabulary)
        target = Box.whole(held.shape)
        piece = Piece(param, held, target, is_counted=is_counted, num_holders=num_holders)
        self._rules.append(WeightRule(name, self._vocabulary, (piece,)))
        rows = held.shape[0] + sum(box.shape[0] for box in padding)
        self._params[param] = ParamSpec(param, (rows, *held.shape[1:]), padding=padding)

    def weight_map(self, aliases: dict[str, str]) -> WeightMap:
        """The table of what was added."""
        others, is_shard = self._other_names, self._shard.num_all > 1
        return WeightMap(self._params.values(), self._rules, aliases, other_names=others, is_shard=is_shard)


def build(
    spec: ModelSpec,
    store: WeightStore,
    *,
    kernels: LayerKernels,
    counter: GemmCounter | None = None,
    mesh: Mesh = SINGLE,
    in_order: bool = False,
) -> Decoder:
    """The decoder over `store.live`, whose tensors it keeps: one rank's part of it, where the mesh has several ranks.
    `in_order`: as `ShardedKernels`."""
    family, stage = FAMILIES[spec.architecture], stages_of(spec, mesh.num_stages)[mesh.stage]
    own_kernels = kernels
    if mesh.has_shares:
        kernels = ShardedKernels(kernels, mesh, spec.vocab_size, in_order=in_order)
    params = Params(store.live, kernels, counter or GemmCounter(), spec.rms_norm_eps)
    own = stage.of(spec)
    places = {
        layer_id: KvPlace(number, layer)
        for number, group in enumerate(own.kv_groups)
        for layer, layer_id in enumerate(group.layer_ids)
    }
    layers = [
        family.layer(params.below(f"layers.{stage.start + index}"), places[index], layer)
        for index, layer in enumerate(own.layers)
    ]
    embed = _embedding(store, mesh) if stage.is_first else None
    kinds = [(places[index].group, layer) for index, layer in enumerate(own.layers)]
    return Decoder(params, layers, embed, kinds=kinds, has_head=stage.is_last, own_kernels=own_kernels)


def _embedding(store: WeightStore, mesh: Mesh) -> Embedding:
    return ShardedEmbedding(store.live["embed"], mesh) if mesh.has_shares else Embedding(store.live["embed"])
