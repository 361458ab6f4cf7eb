"""Weights of a Megatron-Core model as Hugging Face tensors: every rank gives the boxes that it holds, tensor by tensor.

Owns who of a trainer's ranks gives which box, and the way of boxes to rank 0. How Megatron lays a model out is
`headrace.rl.megatron_layout`. Nothing of Megatron-Core is imported.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from headrace.config import ModelSpec
from headrace.engine.tensors import describe
from headrace.models import weight_map
from headrace.rl.megatron_layout import MegatronPlace, global_name, is_ignored, rank_map
from headrace.rl.push import float_dtype
from headrace.rl.trainer_ranks import TrainerRanks
from headrace.types.errors import ConfigError, WeightUpdateError
from headrace.types.plain_values import as_path
from headrace.types.weights import TensorInfo
from headrace.weights.boxes import Box, find_overlap
from headrace.weights.shard import ONLY_RANK, Shard
from headrace.weights.staging import dtype_name
from headrace.weights.weight_map import WeightMap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

OUTPUT = "output_layer.weight"


class Chunk:
    """The layers of a model that one virtual pipeline stage of a rank has: parameters by their names there, and the
    global number of the first layer, from 0."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], first_layer: int = 0) -> None:
        self.tensors = tensors
        self.first_layer = first_layer

    @classmethod
    def of_module(cls, module: torch.nn.Module) -> Chunk:
        """A `GPTModel`, wrapped or not: its layers know their numbers."""
        numbers: list[int] = []
        for each in module.modules():
            number: Any = getattr(each, "layer_number", None)
            if isinstance(number, int) and hasattr(each, "self_attention"):
                numbers.append(number)
        return cls(dict(module.named_parameters()), min(numbers, default=1) - 1)


def first_layer(num_layers: int, stage: Shard = ONLY_RANK, chunk: int = 0, num_chunks: int = 1) -> int:
    """The first layer of a chunk where all have as many: `num_chunks` on each pipeline rank, dealt out in rounds."""
    return chunk * (num_layers // num_chunks) + stage.rank * (num_layers // (num_chunks * stage.num_ranks))


def current_place() -> MegatronPlace:
    """Where this rank stands, as Megatron-Core's `parallel_state` of this process says."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.is_initialized():
        raise ConfigError("Megatron-Core is not set up in this process: say where this rank stands", field="place")
    return MegatronPlace(
        Shard(state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()),
        Shard(state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_world_size()),
        Shard(state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()),
    )


class MegatronWeights:
    """A source for `WeightPusher.push`, as often as the same parameters change.

    chunks   this rank's modules, or `Chunk`s, in any order
    model    the folder of the Hugging Face model, or its config as a dict, or a `ModelSpec`
    place    where this rank stands; None: as Megatron-Core says
    group    the pusher's group, on all of whose ranks this is constructed; together they hold the whole model, and
             where several hold the same (data parallelism), the first gives it. None: this rank has all

    Raises `WeightUpdateError` naming a parameter that does not fit or a tensor that no rank has all of, on every rank.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk | torch.nn.Module] | Chunk | torch.nn.Module,
        model: str | Path | Mapping[str, Any] | ModelSpec,
        place: MegatronPlace | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self._ranks = TrainerRanks(group)

        def read() -> tuple[ModelSpec, bytes]:
            self._dtype = None if dtype is None else float_dtype(dtype)
            spec = spec_of(model)
            listed = chunks if isinstance(chunks, Sequence) else [chunks]
            self._params = _global_params(spec, listed, place or current_place())
            shapes = {name: tuple(each.shape) for name, each in self._params.items()}
            self._table = rank_map(spec, place or current_place(), shapes)
            return spec, msgspec.msgpack.encode(self._held())

        (spec, held), _ = self._ranks.attempt(read)
        claims = [msgspec.msgpack.decode(each, type=list[_Held]) for each in self._ranks.tell(held)]
        whole = {name: rule.shape for name, rule in weight_map(spec).rules_by_name.items()}
        self._deals, _ = self._ranks.attempt(lambda: deal(whole, claims))
        self.manifest = tuple(each.info for each in self._deals)
        """What iterating yields on rank 0."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """On rank 0 every tensor; other ranks give their parts, and are done when rank 0 is."""
        for each in self._deals:
            part, _ = self._ranks.attempt(functools.partial(self._given, each))
            if self._ranks.rank == 0:
                yield each.info.name, self._whole(each)
            elif part is not None:
                self._ranks.send(each.info.name, part)

    def _given(self, deal: Deal) -> torch.Tensor | None:
        """What another rank than 0 gives of a tensor, if anything."""
        mine = [boxes for rank, boxes in deal.shares if rank == self._ranks.rank and rank > 0]
        return self._packed(deal.info, mine[0]) if mine else None

    def _held(self) -> list[_Held]:
        found = []
        for name, rule in self._table.rules_by_name.items():
            if rule.pieces:
                dtypes = {self._params[piece.param].dtype for piece in rule.pieces}
                if len(dtypes) > 1:
                    raise WeightUpdateError(f"{name} is of several dtypes on one rank", field=name)
                dtype = self._dtype or dtypes.pop()
                found.append(_Held(name, dtype_name(dtype), [piece.source for piece in rule.pieces]))
        return found

    def _whole(self, deal: Deal) -> torch.Tensor:
        """A tensor of what its ranks give."""
        dtype: torch.dtype = getattr(torch, deal.info.dtype)
        device = next(iter(self._params.values())).device if self._params else torch.device("cpu")
        found = torch.empty(deal.info.shape, dtype=dtype, device=device)
        for rank, boxes in sorted(deal.shares, key=lambda share: share[0] == self._ranks.rank):  # others wait for it
            if rank == self._ranks.rank:
                for box in boxes:
                    found[box.slices].copy_(self._part(deal.info.name, box))
                continue
            num_elements = sum(box.num_elements for box in boxes)
            flat = self._ranks.receive(deal.info.name, torch.empty(num_elements, dtype=dtype, device="meta"), rank)
            for box in boxes:
                values, flat = flat[: box.num_elements], flat[box.num_elements :]
                found[box.slices].copy_(values.view(box.shape))
        return found

    def _packed(self, info: TensorInfo, boxes: Iterable[Box]) -> torch.Tensor:
        parts = [self._part(info.name, box).reshape(-1) for box in boxes]
        return torch.cat(parts).to(getattr(torch, info.dtype))

    def _part(self, name: str, box: Box) -> torch.Tensor:
        """What this rank holds of a tensor."""
        piece = next(each for each in self._table.rules_by_name[name].pieces if each.source == box)
        return self._params[piece.param][piece.target.slices]


class _Held(msgspec.Struct, frozen=True, array_like=True):
    """What a rank has of a tensor."""

    name: str
    dtype: str
    boxes: list[Box]


class Deal(msgspec.Struct, frozen=True):
    """Which rank gives which boxes of a tensor."""

    info: TensorInfo
    shares: list[tuple[int, list[Box]]]


def deal(shapes: Mapping[str, tuple[int, ...]], claims: Sequence[Sequence[_Held]]) -> list[Deal]:
    """Who gives what, given what every rank has: of several that have a box the first. `WeightUpdateError` naming a
    tensor that all together have not all of."""
    claimed: dict[str, list[tuple[int, _Held]]] = {name: [] for name in shapes}
    for rank, held in enumerate(claims):
        for each in held:
            claimed[each.name].append((rank, each))
    deals = []
    for name, shape in shapes.items():
        taken: set[Box] = set()
        shares = []
        for rank, each in claimed[name]:
            boxes = [box for box in each.boxes if box not in taken]
            taken.update(boxes)
            if boxes:
                shares.append((rank, boxes))
        dtypes = {each.dtype for _, each in claimed[name]}
        if sum(box.num_elements for box in taken) != math.prod(shape) or find_overlap(list(taken)) is not None:
            raise WeightUpdateError(f"the ranks that push do not hold all of {name}, once", field=name)
        if len(dtypes) > 1:
            raise WeightUpdateError(f"{name} is {' on one rank and '.join(sorted(dtypes))} on another", field=name)
        deals.append(Deal(TensorInfo(name, shape, dtypes.pop()), shares))
    return deals


def to_megatron(table: WeightMap, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a rank, of whole Hugging Face tensors; padding is zero."""
    dtype = next(iter(tensors.values())).dtype
    params = {name: torch.zeros(spec.shape, dtype=dtype) for name, spec in table.params.items()}
    for name, rule in table.rules_by_name.items():
        for piece in rule.pieces:
            params[piece.param][piece.target.slices] = tensors[name][piece.source.slices]
    return params


def spec_of(model: Any) -> ModelSpec:
    """A model by its folder, its config or itself."""
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, Mapping):
        return ModelSpec.from_config(model)
    return ModelSpec.from_folder(as_path(os.fspath(model), "model", ConfigError))


def _global_params(spec: ModelSpec, chunks: Iterable[Any], place: MegatronPlace) -> dict[str, torch.Tensor]:
    params: dict[str, torch.Tensor] = {}
    num_experts = max((getattr(layer.mlp, "num_experts", 0) for layer in spec.layers), default=0)
    first_expert = place.experts.part((num_experts,), 0)[0].start[0] if num_experts else 0
    for given in chunks:
        chunk = Chunk.of_module(given) if isinstance(given, torch.nn.Module) else given
        for name, tensor in chunk.tensors.items():
            if is_ignored(name) or tensor is None:
                continue
            known = global_name(name, chunk.first_layer, first_expert)
            if known == OUTPUT and spec.tie_word_embeddings:
                continue  # the last stage's copy of the embedding
            if known in params:
                raise WeightUpdateError(f"two chunks of this rank have {known}", field=known)
            describe(known, tensor)
            params[known] = tensor.detach()
    return params
