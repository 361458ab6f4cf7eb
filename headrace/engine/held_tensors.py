"""The tensors of a whole update, listed before the first is copied. Owns what is refused of them together: two in the
same memory, and one that is written to meanwhile; and what is known of them when the same come again.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.engine.tensors import (
    NamedTensors,
    describe,
    named_pairs,
    num_writes,
    place_of,
    readable_now,
    tensor_bytes,
)
from headrace.types.errors import WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights.weight_map import FLOAT_DTYPES, TIED_HEAD, is_recomputed

_OVERLAP_WORK = 100_000

_NUM_SAMPLED = 4096
_MAX_ROWS_SAMPLED = 1 << 18


_FORM = attrgetter("shape", "dtype")
_VERSION = attrgetter("_version")

_AT_ONCE = frozenset({list, tuple, dict, OrderedDict, type({}.items()), type(OrderedDict().items())})
"""What runs no code of the caller between two of its pairs. Not their subclasses, which may."""


def are_at_hand(named_tensors: NamedTensors) -> bool:
    """Whether no code of the caller runs between two of the pairs: all may be read before the first is done with."""
    return isinstance(named_tensors, HeldTensors) or type(named_tensors) in _AT_ONCE


class Sights(NamedTuple):
    """What is seen of plain tensors, one column for each thing: that is quick, and they are looked at each time."""

    names: list[str]
    addresses: list[int]
    forms: list[tuple[Any, ...]]
    strides: list[tuple[int, ...]]
    devices: list[int]
    negated: list[bool]
    storages: list[int]
    storage_bytes: list[int]

    @classmethod
    def of(cls, names: list[str], tensors: list[Any]) -> Sights:
        """Raises `RuntimeError` where one has no memory."""
        import torch

        base, storages = torch.Tensor, list(map(torch.Tensor.untyped_storage, tensors))
        return cls(
            names,
            list(map(base.data_ptr, tensors)),
            list(map(_FORM, tensors)),
            list(map(base.stride, tensors)),
            list(map(base.get_device, tensors)),
            list(map(base.is_neg, tensors)),
            list(map(torch.UntypedStorage.data_ptr, storages)),
            list(map(torch.UntypedStorage.nbytes, storages)),
        )


class Listing(NamedTuple):
    """Tensors that came all at once, without the tensors: where each was, and what was said of it.

    One that is where it was, in the same form, is as readable and as apart from the others as it was. So what was found
    out about all of them holds when all are seen so again, as a trainer's are with every update.
    """

    sights: Sights
    manifest: tuple[TensorInfo, ...]


class HeldTensors:
    """Named tensors that are all listed before the first is copied, because the manifest comes first.

    Raises `WeightUpdateError` where that would send other values than were handed over: for two entries in the same
    memory (but a tied output head), naming both, and for one that was written to after it was listed. Such a write is
    seen if torch counted it, and, of what an iterator yields (its code runs between two tensors, and what goes through
    `.data`, numpy or inference mode is not counted), if it changed a sample of the values: every element of small
    tensors, of large ones 4096 evenly spaced ones, with the first, the last and one of each row (of up to 2^18).
    """

    def __init__(self, named_tensors: NamedTensors, before: Listing | None = None) -> None:
        """`listing` is what may be given as `before` with the next ones; None where each is to be looked at."""
        is_sampled = type(named_tensors) not in _AT_ONCE
        self._held: list[tuple[str, Any, int, bytes | None]] = []
        self.listing: Listing | None = None
        tensors, sights = ([], None) if is_sampled else _seen(named_tensors, before.sights.names if before else [])
        if before is not None and sights == before.sights:
            self.listing, self.manifest = before, before.manifest
            self._held += zip(sights.names, tensors, _numbers_of_writes(tensors), repeat(None))
            return
        manifest: list[TensorInfo] = []
        for name, tensor in named_pairs(named_tensors):
            info = describe(name, tensor)
            manifest.append(info)
            is_taken = info.dtype in FLOAT_DTYPES  # the core refuses the rest, before any of it is read
            self._held.append((name, tensor, num_writes(tensor), _sample(tensor) if is_sampled and is_taken else None))
        self.manifest = tuple(manifest)
        _require_disjoint([(name, tensor) for name, tensor, _, _ in self._held])
        if sights is not None and len(tensors) == len(manifest):
            self.listing = Listing(sights, self.manifest)

    @property
    def counted(self) -> Iterator[tuple[str, Any, int]]:
        """Name, tensor, and how often torch had written to it."""
        return ((name, tensor, writes) for name, tensor, writes, _ in self._held)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, tensor, writes, sample in self._held:
            if sample is not None:
                describe(name, tensor)  # it may have been freed
            if num_writes(tensor) != writes or (sample is not None and _sample(tensor) != sample):
                message = f"{name} was written to after it was handed over; begin_update, stage and commit copy each"
                raise WeightUpdateError(f"{message} tensor before the next is asked for", field=name)
            yield name, tensor


def _numbers_of_writes(tensors: list[Any]) -> list[int]:
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # one is of inference mode
        return list(map(num_writes, tensors))


def _seen(named_tensors: Any, known: list[str]) -> tuple[list[Any], Sights | None]:
    """What is at hand, and what is seen of it; None where one is no plain tensor, or no tensor of a model, as those of
    all `known` names are."""
    torch = sys.modules.get("torch")
    if torch is None:
        return [], None
    try:
        pairs = named_tensors.items() if isinstance(named_tensors, dict) else named_tensors
        names, tensors = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
        is_plain = {*map(type, names)} == {str} and {*map(type, tensors)} <= {torch.Tensor, torch.nn.Parameter}
        if is_plain and readable_now() and (names == known or not any(map(is_recomputed, names))):
            return tensors, Sights.of(names, tensors)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # no pairs, or no memory: it is named elsewhere
        pass
    return [], None


def _sample(tensor: Any) -> bytes:
    """Some of a tensor's bytes, always the same: evenly spaced elements, at least one of each row. On a device one
    gather and one small copy."""
    size = int(np.prod(tensor.shape, dtype=np.int64))
    num_rows = tensor.shape[0] if len(tensor.shape) else 1
    count = min(size, max(_NUM_SAMPLED, min(num_rows, _MAX_ROWS_SAMPLED)))
    if count == size:
        return bytes(tensor_bytes(tensor))
    places = np.unravel_index(np.arange(count) * (size - 1) // (count - 1), tuple(tensor.shape))
    if isinstance(tensor, np.ndarray):
        return bytes(tensor_bytes(tensor[places]))
    import torch

    indices = tuple(torch.from_numpy(place).to(tensor.device) for place in places)
    return bytes(tensor_bytes(tensor.detach()[indices]))


def _require_disjoint(pairs: list[tuple[str, Any]]) -> None:
    """No two tensors share an element. Sorted by address, each is compared with those that reach beyond its begin."""
    spans = [(*_span(tensor), name, tensor) for name, tensor in pairs]
    reaching: list[tuple[int, int, int, str, Any]] = []
    for span in sorted((span for span in spans if span[2] > span[1]), key=itemgetter(0, 1)):
        device, low, _, name, tensor = span
        reaching = [former for former in reaching if former[2] > low and former[0] == device]
        for _, _, _, former_name, former in reaching:
            is_tied = TIED_HEAD in (name, former_name) and name != former_name and _is_one(former, tensor)
            if not is_tied and _shares(_elements(former), _elements(tensor)):
                message = f"{former_name} and {name} lie in the same memory, so one holds the other's values; a buffer"
                hint = "that is filled again and again goes through begin_update, stage and commit"
                raise WeightUpdateError(f"{message} {hint}", field=name)
        reaching.append(span)


def _span(tensor: Any) -> tuple[int, int, int]:
    """The device that a tensor is on, -1 for a CPU; where its first byte is, and where none of it is any more."""
    if isinstance(tensor, np.ndarray):
        return (-1, *np.lib.array_utils.byte_bounds(tensor)) if tensor.size else (-1, 0, 0)
    device = tensor.get_device()
    if tensor.is_contiguous():
        low = tensor.data_ptr()
        return device, low, low + tensor.nbytes
    return device, *np.lib.array_utils.byte_bounds(_elements(tensor))


def _elements(tensor: Any) -> npt.NDArray[Any]:
    return tensor if isinstance(tensor, np.ndarray) else np.asarray(_Elements(tensor))


def _is_one(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return left is right
    return place_of(left) == place_of(right)


def _shares(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> bool:
    try:
        return np.shares_memory(left, right, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Elements:
    """Where a torch tensor's elements lie, for numpy to reason about; nothing is read."""

    def __init__(self, tensor: Any) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }
