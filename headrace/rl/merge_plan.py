"""Which box of which stored tensor becomes which part of a Hugging Face file's tensor.

Owns how the names of a trainer's checkpoint are understood: Hugging Face names below some prefix, those of
transformers' newer modules among them, or Megatron-Core's with layers and experts stacked or numbered. Reads nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import msgspec

from headrace.config import ModelSpec
from headrace.models import weight_map
from headrace.rl.megatron_layout import MegatronPlace, is_ignored, rank_map
from headrace.rl.sources import hf_name
from headrace.types.errors import CheckpointError
from headrace.types.weights import TensorInfo
from headrace.weights.boxes import Box
from headrace.weights.weight_map import FLOAT_DTYPES, Piece, WeightMap, is_recomputed

_HF_ROOT, _MEGATRON_ROOT = "model.embed_tokens.weight", "embedding.word_embeddings.weight"
_OPTIMIZER = re.compile(r"(^|\.)(optim|optimizer|chained_\d+)(\.|$)")
_MODEL_PARTS = ("model.", "lm_head.", "embedding.", "decoder.", "output_layer.")
_STACKED = "decoder.layers."
_STACKED_EXPERTS = re.compile(r"(?<=\.mlp\.experts\.)experts\.(?=linear_fc[12]\.weight$)")
_NUMBERED_EXPERT = re.compile(r"(?<=\.mlp\.experts\.)experts\.(?=\d+\.linear_fc[12]\.weight$)")


class StoredBox(msgspec.Struct, frozen=True):
    """Box `source` of the stored tensor `key`, its axes in this order (() for as they are), is box `target`."""

    target: Box
    key: str
    source: Box
    axes: tuple[int, ...] = ()


class MergedTensor(msgspec.Struct, frozen=True):
    """A tensor of a file, and what it is made of."""

    info: TensorInfo
    parts: tuple[StoredBox, ...]


def plan_merge(spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> list[MergedTensor]:
    """All tensors of the model's files, of what a checkpoint has. `CheckpointError` naming a tensor that it lacks, or
    that the model does not have or has in another shape."""
    clean = {hf_name(name): name for name in tensors}
    for root, parts_of in ((_HF_ROOT, _hf_parts), (_MEGATRON_ROOT, _megatron_parts)):
        prefixes = [name.removesuffix(root) for name in clean if name.endswith(root)]
        prefixes = [each for each in prefixes if each.endswith(("", ".")[bool(each)]) and not _OPTIMIZER.search(each)]
        if len(prefixes) > 1:
            message = f"the checkpoint has several models: below {' and '.join(map(repr, sorted(prefixes)))}"
            raise CheckpointError(message, field="source")
        if prefixes:
            below = {name.removeprefix(prefixes[0]): key for name, key in clean.items() if name.startswith(prefixes[0])}
            held = {name: key for name, key in below.items() if name.startswith(_MODEL_PARTS)}
            table = weight_map(spec)
            return list(_merged(table, parts_of(spec, table, held, tensors), tensors))
    message = f"the checkpoint has no tensor whose name ends with {_HF_ROOT} or {_MEGATRON_ROOT}"
    raise CheckpointError(message, field="source")


def _merged(
    table: WeightMap, parts: Mapping[str, list[StoredBox]], tensors: Mapping[str, TensorInfo]
) -> Iterator[MergedTensor]:
    for name, rule in table.rules_by_name.items():
        found = parts.get(name, [])
        if sum(part.target.num_elements for part in found) != math.prod(rule.shape):
            raise CheckpointError(f"the checkpoint lacks {name}, or a part of it", field=name)
        dtypes = {tensors[part.key].dtype for part in found}
        if len(dtypes) > 1 or not dtypes.issubset(FLOAT_DTYPES):
            raise CheckpointError(f"{name} is stored as {' and '.join(sorted(dtypes))}", field=name)
        yield MergedTensor(TensorInfo(name, rule.shape, dtypes.pop()), tuple(found))


def _hf_parts(
    spec: ModelSpec, table: WeightMap, held: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> dict[str, list[StoredBox]]:
    known = {name: key for name, key in held.items() if not is_recomputed(name)}
    for name, key in known.items():
        shape, found = table.shape_of(name), tensors[key].shape
        if shape is None:
            raise CheckpointError(f"{key} is no tensor of a {spec.architecture} of this config", field=key)
        if shape != found:
            raise CheckpointError(f"{key} has shape {list(found)}, expected {list(shape)}", field=key)
    others: dict[str, list[tuple[str, Piece]]] = {}
    for name in known:
        for piece in table.other_rules[name].pieces if name in table.other_rules else ():
            others.setdefault(piece.param, []).append((known[name], piece))
    stand_ins = {target: alias for alias, target in table.aliases.items() if alias in known}
    parts: dict[str, list[StoredBox]] = {}
    for name, rule in table.rules_by_name.items():
        own = known.get(name) or known.get(stand_ins.get(name, ""))
        if own is not None:
            parts[name] = [StoredBox(Box.whole(rule.shape), own, Box.whole(rule.shape))]
        else:
            parts[name] = [
                _located(piece, *other)
                for piece in rule.pieces
                for other in others.get(piece.param, ())
                if _is_in(piece.target, other[1].target)
            ]
    return parts


def _is_in(box: Box, outer: Box) -> bool:
    return box.common(outer) == box


def _located(piece: Piece, key: str, other: Piece) -> StoredBox:
    """A piece of a file's tensor, in a tensor that fills the same memory and more."""
    within = piece.target.seen_from(other.target)
    axes = other.axes or tuple(range(len(other.source.shape)))
    start, shape = list(other.source.start), list(other.source.shape)
    for axis, source_axis in enumerate(axes):
        start[source_axis] += within.start[axis]
        shape[source_axis] = within.shape[axis]
    return StoredBox(piece.source, key, Box(tuple(start), tuple(shape)), other.axes)


def _megatron_parts(
    spec: ModelSpec, table: WeightMap, held: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> dict[str, list[StoredBox]]:
    params: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, key in held.items():
        is_tied = name == "output_layer.weight" and spec.tie_word_embeddings
        if not is_ignored(name) and not is_tied:
            params.update(_unstacked(name, key, tensors[key].shape))
    shapes = {name: tensors[key].shape[len(index) :] for name, (key, index) in params.items()}
    parts: dict[str, list[StoredBox]] = {}
    for name, rule in rank_map(spec, MegatronPlace(), shapes).rules_by_name.items():
        for piece in rule.pieces:
            key, index = params[piece.param]
            source = Box((*index, *piece.target.start), (*(1 for _ in index), *piece.target.shape))
            parts.setdefault(name, []).append(StoredBox(piece.source, key, source))
    return parts


def _unstacked(name: str, key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """The parameters that a stored tensor holds, each with its place among the first axes: layers, then experts."""
    tail = name.removeprefix(_STACKED)
    if tail != name and not tail[:1].isdigit():
        for layer in range(shape[0] if shape else 0):
            for found, (_, index) in _unstacked(f"{_STACKED}{layer}.{tail}", key, shape[1:]):
                yield found, (key, (layer, *index))
        return
    numbered = _NUMBERED_EXPERT.sub("local_experts.", name)
    if _STACKED_EXPERTS.search(numbered):
        for expert in range(shape[0] if shape else 0):
            yield _STACKED_EXPERTS.sub(f"local_experts.{expert}.", numbered), (key, (expert,))
        return
    yield numbered, (key, ())
