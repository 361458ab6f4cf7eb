"""A trainer's weights as (Hugging Face name, tensor) pairs, one whole tensor at a time.

Owns names (what wrappers put in), tied heads, and the gathering of a DTensor's shards: a collective of all ranks of its
mesh, which therefore read the same weights in the same order. Must not know engines. Loads no torch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from headrace.engine.tensors import NamedTensors, describe, is_in_shards, named_pairs, own_part, same_memory, whole
from headrace.rl.trainer_ranks import TrainerRanks, told
from headrace.types.errors import WeightUpdateError
from headrace.types.plain_values import as_flag
from headrace.types.weights import TensorInfo
from headrace.weights.weight_map import TIED_HEAD, is_recomputed

if TYPE_CHECKING:
    import torch

NamedTensor = tuple[str, Any]

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a parameter's name that data parallelism, compilation, FSDP and activation checkpointing put in."""


class WeightSource(Protocol):
    """Weights to be pushed, once. All ranks that hold a part of them iterate together; those for which it is of no use
    get the tensors too, or nothing."""

    @property
    def manifest(self) -> tuple[TensorInfo, ...] | None:
        """What iterating yields, in its order; None where nobody knows before."""

    def __iter__(self) -> Iterator[NamedTensor]: ...


class Listed:
    """The weights of a module or a state dict: `hf_named_tensors`, with shards left to be gathered."""

    def __init__(self, weights: Any, dtype: torch.dtype | None, ranks: TrainerRanks, *, keep_tied_head: bool) -> None:
        self._dtype = dtype
        self._ranks = ranks
        self._tensors = _named(weights, keep_tied_head, _hold)
        self.manifest = tuple(_info(name, tensor, dtype) for name, tensor in self._tensors.items())

    def __iter__(self) -> Iterator[NamedTensor]:
        pairs = ((name, _converted(tensor, self._dtype)) for name, tensor in self._tensors.items())
        for name, tensor in in_step(self._ranks, pairs):
            yield name, gathered(name, tensor)


class Yielded:
    """What an iterator yields: a tensor has been used before the next one is asked for."""

    manifest = None

    def __init__(self, pairs: NamedTensors, dtype: torch.dtype | None, ranks: TrainerRanks) -> None:
        self._pairs = named_pairs(pairs, _hold)
        self._dtype = dtype
        self._ranks = ranks

    def __iter__(self) -> Iterator[NamedTensor]:
        pairs = ((hf_name(name), _converted(tensor, self._dtype)) for name, tensor in self._pairs)
        for name, tensor in in_step(self._ranks, pairs):
            yield name, gathered(name, tensor)


def in_step(ranks: TrainerRanks, pairs: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """The pairs, each when all ranks have come to it: what goes wrong on one ends them on all before others wait for it
    where tensors are gathered. `WeightUpdateError` naming tensors and ranks where they come to different ones."""
    if ranks.num_ranks == 1:
        yield from pairs
        return
    own = iter(pairs)
    while True:
        pair, names = ranks.attempt(lambda: next(own, None), lambda pair: "" if pair is None else pair[0])
        if len(set(names)) > 1:
            shown = [f"rank {rank}: {name or 'no more'}" for rank, name in enumerate(names)]
            message = f"the ranks do not bring the same tensors in the same order ({', '.join(shown)})"
            raise told(WeightUpdateError(message, field=max(names)))
        if pair is None:
            return
        yield pair


def hf_name(name: str) -> str:
    """The Hugging Face name of a trainer's parameter: the same, without what wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def hf_named_tensors(
    weights: torch.nn.Module | Mapping[str, torch.Tensor], *, keep_tied_head: bool = False
) -> list[NamedTensor]:
    """(Hugging Face name, tensor) pairs of a module or a state dict; no tensor is copied.

    A tied output head is left out (it *is* the embedding) unless it is to be kept, for an engine that does not tie;
    what every model computes for itself is always left out. A DTensor becomes the plain tensor that it is.
    Raises `WeightUpdateError` if two parameters come to bear one name, other ranks hold a part of a DTensor, or one
    has no values that can be read.
    """
    keep_tied_head = as_flag(keep_tied_head, "keep_tied_head", WeightUpdateError)
    return list(_named(weights, keep_tied_head, lambda name, tensor: _hold(name, whole(name, tensor))).items())


def _converted(tensor: Any, dtype: torch.dtype | None) -> Any:
    """In `dtype`, if one is given; before it is gathered, so that less travels."""
    return tensor if dtype is None or isinstance(tensor, np.ndarray) else tensor.to(dtype)


def gathered(name: str, tensor: Any) -> torch.Tensor:
    """A whole tensor: a DTensor is gathered from all ranks of its mesh. `WeightUpdateError` naming it where that
    fails."""
    if not is_in_shards(tensor):
        return tensor  # type: ignore[no-any-return]
    try:
        return tensor.full_tensor()  # type: ignore[no-any-return]
    except RuntimeError as error:  # another rank is gone, or stands still for longer than the group's timeout
        reason = str(error).split("\n", maxsplit=1)[0]
        raise WeightUpdateError(f"{name} could not be gathered from its ranks: {reason}", field=name) from None


def _hold(name: str, tensor: Any) -> Any:
    """As `whole`, with shards as they are."""
    held = tensor if is_in_shards(tensor) else whole(name, tensor)
    describe(name, own_part(held))
    return held if isinstance(held, np.ndarray) else held.detach()


def _named(weights: Any, keep_tied_head: bool, hold: Callable[[str, Any], Any]) -> dict[str, Any]:
    is_module = hasattr(weights, "state_dict") and hasattr(weights, "named_parameters")
    if not isinstance(weights, Mapping) and not is_module:
        message = f"weights must be a module or a state dict, not {type(weights).__name__}"
        raise WeightUpdateError(message, field="weights")
    state = weights if isinstance(weights, Mapping) else _state_of(weights)
    tensors: dict[str, Any] = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise WeightUpdateError(f"weights holds {name!r}, which is no name", field="weights")
        clean = hf_name(name)
        if clean in tensors:
            raise WeightUpdateError(f"{name} and another parameter are both {clean}", field=clean)
        if is_recomputed(clean):
            continue
        if not hasattr(tensor, "detach"):
            raise WeightUpdateError(f"{clean} is a {type(tensor).__name__}, not a tensor", field=clean)
        tensors[clean] = hold(clean, tensor)
    head = None if keep_tied_head else tensors.get(TIED_HEAD)
    if head is not None and any(_is_one(head, other) for name, other in tensors.items() if name != TIED_HEAD):
        del tensors[TIED_HEAD]
    return tensors


def _is_one(left: Any, right: Any) -> bool:
    """Both are the same memory; of shards every rank says the same, also one that holds no element."""
    if not is_in_shards(left) or not is_in_shards(right):
        return same_memory(own_part(left), own_part(right))
    storages = (own_part(each).untyped_storage()._cdata for each in (left, right))
    return left.shape == right.shape and len(set(storages)) == 1


def _state_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """Its state dict. Where torch would fail to make one, `WeightUpdateError` naming its first parameter."""
    from headrace.weights.staging import unreadable_now

    name, problem = next((hf_name(name) for name, _ in module.named_parameters()), ""), unreadable_now()
    if problem:
        raise WeightUpdateError(f"{name} {problem}", field=name)
    return module.state_dict()


def _info(name: str, tensor: Any, dtype: torch.dtype | None) -> TensorInfo:
    from headrace.weights.staging import dtype_name

    return TensorInfo(name, tuple(tensor.shape), dtype_name(dtype or tensor.dtype))
