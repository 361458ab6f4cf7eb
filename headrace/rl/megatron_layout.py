"""How Megatron-Core lays a decoder out, as boxes: which rows and columns of Hugging Face tensors a parameter of a rank
holds, for Llama, Mistral, Qwen2, Qwen3 dense and Qwen3-MoE (and Mixtral).

Owns Megatron's names and orders, as data; both directions are read from one `WeightMap`. Names here are *global*: those
of a model on one rank, with layers and experts counted over all stages and ranks. Must not know processes.

    fused QKV     per query group its query heads, then its key head, then its value head
    linear_fc1    the rank's share of gate, then its share of up
    vocabulary    padded at its end, so that every rank has as many rows
    norms         unfused (`input_layernorm`, `pre_mlp_layernorm`), or a part of the projection behind them
    experts       all numbered (`linear_fc1.weight{i}`), or a module each (`local_experts.{i}`)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from headrace.config import ModelSpec
from headrace.models import weight_map
from headrace.models.registry import FAMILIES
from headrace.rl.sources import hf_name
from headrace.types.errors import UnsupportedModelError, WeightUpdateError
from headrace.weights.boxes import Box
from headrace.weights.shard import ONLY_RANK, Shard
from headrace.weights.weight_map import ParamSpec, Piece, WeightMap, WeightRule

Cut = Literal["whole", "rows", "columns", "groups", "vocabulary"]


class MegatronPlace(msgspec.Struct, frozen=True):
    """Where a rank stands in Megatron's mesh: its share of heads, dense blocks and vocabulary, which experts it has,
    and its share of each of them."""

    tensor: Shard = ONLY_RANK
    experts: Shard = ONLY_RANK
    expert_tensor: Shard = ONLY_RANK


class HfPart(msgspec.Struct, frozen=True):
    """A kind of parameter: the tensors that it holds one after the other, and how ranks share it.

    whole        every rank has all of it
    rows         each has an equal share of the rows of every tensor
    columns      each has an equal share of the columns
    groups       each has an equal share of the query groups, whose rows of the tensors follow each other
    vocabulary   each has as many rows, the last ones padding
    """

    tensors: tuple[str, ...]
    cut: Cut


_Q, _K, _V = (f"self_attn.{each}_proj" for each in "qkv")

MODEL = {
    "embedding.word_embeddings.weight": HfPart(("model.embed_tokens.weight",), "vocabulary"),
    "decoder.final_layernorm.weight": HfPart(("model.norm.weight",), "whole"),
    "output_layer.weight": HfPart(("lm_head.weight",), "vocabulary"),
}
"""Parameters outside the layers."""

LAYER = {
    "input_layernorm.weight": HfPart(("input_layernorm.weight",), "whole"),
    "self_attention.linear_qkv.layer_norm_weight": HfPart(("input_layernorm.weight",), "whole"),
    "self_attention.linear_qkv.weight": HfPart((f"{_Q}.weight", f"{_K}.weight", f"{_V}.weight"), "groups"),
    "self_attention.linear_qkv.bias": HfPart((f"{_Q}.bias", f"{_K}.bias", f"{_V}.bias"), "groups"),
    "self_attention.q_layernorm.weight": HfPart(("self_attn.q_norm.weight",), "whole"),
    "self_attention.k_layernorm.weight": HfPart(("self_attn.k_norm.weight",), "whole"),
    "self_attention.linear_proj.weight": HfPart(("self_attn.o_proj.weight",), "columns"),
    "self_attention.linear_proj.bias": HfPart(("self_attn.o_proj.bias",), "whole"),
    "pre_mlp_layernorm.weight": HfPart(("post_attention_layernorm.weight",), "whole"),
    "mlp.linear_fc1.layer_norm_weight": HfPart(("post_attention_layernorm.weight",), "whole"),
    "mlp.linear_fc1.weight": HfPart(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "rows"),
    "mlp.linear_fc1.bias": HfPart(("mlp.gate_proj.bias", "mlp.up_proj.bias"), "rows"),
    "mlp.linear_fc2.weight": HfPart(("mlp.down_proj.weight",), "columns"),
    "mlp.linear_fc2.bias": HfPart(("mlp.down_proj.bias",), "whole"),
    "mlp.router.weight": HfPart(("{block}.gate.weight",), "whole"),
}
"""Parameters below "decoder.layers.{i}.", of tensors below "model.layers.{i}."."""

EXPERT = {
    "mlp.experts.linear_fc1.weight{e}": HfPart(("{expert}.{gate}.weight", "{expert}.{up}.weight"), "rows"),
    "mlp.experts.linear_fc2.weight{e}": HfPart(("{expert}.{down}.weight",), "columns"),
    "mlp.experts.local_experts.{e}.linear_fc1.weight": HfPart(
        ("{expert}.{gate}.weight", "{expert}.{up}.weight"), "rows"
    ),
    "mlp.experts.local_experts.{e}.linear_fc2.weight": HfPart(("{expert}.{down}.weight",), "columns"),
}
"""The same of one expert."""

IGNORED = ("_extra_state", "rotary_pos_emb.inv_freq", "expert_bias", "local_tokens_per_expert")
"""Ends of names of what is no weight of these families."""

_LAYER_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
_TENSOR_LAYER = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")
_EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.weight)\d+$")


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """The global name of a parameter of a stage whose layers, and of a rank whose experts, begin with these."""
    clean = hf_name(name)
    clean = _LAYER_NUMBER.sub(lambda found: str(int(found[0]) + first_layer), clean)
    return _EXPERT_NUMBER.sub(lambda found: str(int(found[0]) + first_expert), clean)


def is_ignored(name: str) -> bool:
    """It is no weight, or none that a checkpoint has."""
    return name.endswith(IGNORED)


def rank_map(spec: ModelSpec, place: MegatronPlace, shapes: Mapping[str, tuple[int, ...]]) -> WeightMap:
    """What the parameters of a rank hold, which are given by their global names and shapes. Rows that pad the
    vocabulary are as many as the shape has.

    Raises `WeightUpdateError` naming a parameter that the model has no place for, or of another shape, and
    `UnsupportedModelError` for what does not split over so many ranks.
    """
    layout = _Layout(spec, place)
    for name, shape in shapes.items():
        layout.add(name, tuple(shape))
    return layout.weight_map()


def whole_shapes(spec: ModelSpec, *, sequential_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """The parameters of a model on one rank, unpadded, with norms of their own: what `rank_map` takes."""
    layout, is_numbered = _Layout(spec, MegatronPlace()), not sequential_experts
    names = list(MODEL)[: 2 if spec.tie_word_embeddings else 3]
    for index in range(len(spec.layers)):
        names += [f"decoder.layers.{index}.{name}" for name in LAYER if "layer_norm_weight" not in name]
        for expert in range(layout.num_experts(index)):
            kinds = (name for name in EXPERT if ("local_experts" in name) != is_numbered)
            names += [f"decoder.layers.{index}.{name.format(e=expert)}" for name in kinds]
    return {name: shape for name in names if (shape := layout.shape_of(name)) is not None}


class _Layout:
    """The boxes of one rank's parameters, added one by one."""

    def __init__(self, spec: ModelSpec, place: MegatronPlace) -> None:
        self._spec = spec
        self._place = place
        self._table = weight_map(spec)
        self._params: list[ParamSpec] = []
        self._pieces: dict[str, list[Piece]] = {name: [] for name in self._table.rules_by_name}

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """One parameter of the rank."""
        found = self._find(name)
        if found is None:
            raise WeightUpdateError(f"{name} has no place in a {self._spec.architecture} of this config", field=name)
        tensors, cut, shard = found
        pieces, padding = self._cut(name, tensors, cut, shard, shape)
        sizes = [_end(box) for box in (*(piece.target for _, piece in pieces), *padding)]
        expected = tuple(map(max, zip(*sizes, strict=True)))
        if expected != shape:
            message = (
                f"{name} has shape {list(shape)}, expected {list(expected)} on rank {shard.rank} of {shard.num_ranks}"
            )
            raise WeightUpdateError(message, field=name)
        self._params.append(ParamSpec(name, shape, padding=padding))
        for tensor, piece in pieces:
            self._pieces[tensor].append(piece)

    def weight_map(self) -> WeightMap:
        """The table of what was added."""
        rules = (
            WeightRule(name, self._table.rules_by_name[name].shape, tuple(pieces))
            for name, pieces in self._pieces.items()
        )
        return WeightMap(self._params, rules, is_shard=True)

    def num_experts(self, layer: int) -> int:
        """Of one layer; 0 where it is dense."""
        return getattr(self._spec.layers[layer].mlp, "num_experts", 0)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """That of a parameter that is whole; None where the model has none of this name."""
        found = self._find(name)
        if found is None:
            return None
        shapes = [self._table.rules_by_name[tensor].shape for tensor in found[0]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _find(self, name: str) -> tuple[tuple[str, ...], Cut, Shard] | None:
        """The tensors of a parameter, and how and over which ranks it is cut."""
        part, prefix, words, shard = MODEL.get(name), "", {}, self._place.tensor
        layer = _LAYER_NUMBER.search(name)
        if layer is not None:
            prefix, tail = f"model.layers.{layer[0]}.", name[layer.end() + 1 :]
            expert = _EXPERT_NUMBER.search(tail)
            family = FAMILIES[self._spec.architecture].experts
            if family is not None:
                gate, up, down = family.projections
                words = {"block": family.prefix, "gate": gate, "up": up, "down": down}
                words["expert"] = f"{family.prefix}.experts.{expert[0] if expert else ''}"
            part = LAYER.get(tail)
            if expert is not None:
                part = EXPERT.get(f"{tail[: expert.start()]}{{e}}{tail[expert.end() :]}")
                shard = self._place.expert_tensor
        if part is None:
            return None
        try:
            tensors = tuple(prefix + tensor.format_map(words) for tensor in part.tensors)
        except KeyError:  # of experts, which the family has not
            return None
        return (tensors, part.cut, shard) if self._table.rules_by_name.keys() >= set(tensors) else None

    def _cut(
        self, name: str, tensors: tuple[str, ...], cut: Cut, shard: Shard, shape: tuple[int, ...]
    ) -> tuple[list[tuple[str, Piece]], tuple[Box, ...]]:
        """The pieces of a parameter, each with its tensor, and its padding."""
        shapes = [self._table.rules_by_name[tensor].shape for tensor in tensors]
        if cut == "vocabulary":
            return self._vocabulary(name, tensors[0], shapes[0], shard, shape)
        if cut == "groups":
            boxes = self._groups(tensors, shapes, shard)
        elif cut == "whole":
            boxes = [(tensor, Box.whole(each)) for tensor, each in zip(tensors, shapes, strict=True)]
        else:
            axis = 0 if cut == "rows" else 1
            boxes = [(tensor, _share(tensor, each, axis, shard)) for tensor, each in zip(tensors, shapes, strict=True)]
        pieces, row = [], 0
        for tensor, box in boxes:
            pieces.append((tensor, Piece(name, box, Box((row, *(0 for _ in box.shape[1:])), box.shape))))
            row += box.shape[0]
        return pieces, ()

    def _groups(self, tensors: tuple[str, ...], shapes: list[tuple[int, ...]], shard: Shard) -> list[tuple[str, Box]]:
        """This rank's share of the rows of all query groups, in their order: whole groups, or a part of one."""
        layer = _TENSOR_LAYER.search(tensors[0])
        assert layer is not None, "only layers have heads"
        num_groups = self._spec.layers[int(layer[0])].attention.num_kv_heads
        mine = _share(tensors[0], (sum(shape[0] for shape in shapes),), 0, shard)
        boxes, row = [], 0
        for group in range(num_groups):
            for tensor, shape in zip(tensors, shapes, strict=True):
                count, rest = shape[0] // num_groups, shape[1:]
                common = mine.common(Box((row,), (count,)))
                if common is not None:
                    first = group * count + common.start[0] - row
                    boxes.append((tensor, Box((first, *(0 for _ in rest)), (common.shape[0], *rest))))
                row += count
        return boxes

    def _vocabulary(
        self, name: str, tensor: str, whole: tuple[int, ...], shard: Shard, shape: tuple[int, ...]
    ) -> tuple[list[tuple[str, Piece]], tuple[Box, ...]]:
        """As many rows as the shape has, which on all ranks are at least those of the vocabulary."""
        if len(shape) != 2 or shape[1] != whole[1] or shape[0] * shard.num_ranks < whole[0]:
            message = f"{name} has shape {list(shape)} on {shard.num_ranks} ranks; {tensor} is {list(whole)}"
            raise WeightUpdateError(message, field=name)
        start = shard.rank * shape[0]
        count = max(0, min(shape[0], whole[0] - start))
        rest = Box((count, 0), (shape[0] - count, shape[1]))
        pieces = [(tensor, Piece(name, Box((start, 0), (count, shape[1])), Box((0, 0), (count, shape[1]))))]
        return pieces if count else [], (rest,) if rest.shape[0] else ()


def _share(tensor: str, shape: tuple[int, ...], axis: int, shard: Shard) -> Box:
    """An equal share of an axis, none of which is on two ranks."""
    if shape[axis] % shard.num_ranks:
        message = f"{tensor}: {shape[axis]} parts do not split over {shard.num_ranks} ranks of Megatron"
        raise UnsupportedModelError(message, field=tensor)
    return shard.part(shape, axis)[0]


def _end(box: Box) -> tuple[int, ...]:
    return tuple(start + size for start, size in zip(box.start, box.shape, strict=True))
