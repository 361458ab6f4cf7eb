"""Tensors of a caller as bytes and back. Owns the reading of torch and numpy arrays, and what is refused about them;
imports torch only when one needs it.

A caller's tensor is only ever read: nothing here changes its storage, or keeps it from being resized or freed later.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.engine.memory_copy import Copy, address_of, copy_memory
from headrace.types.errors import WeightUpdateError
from headrace.types.plain_values import plain_text
from headrace.types.weights import TensorInfo, WeightBytes, name_problem, shape_problem
from headrace.weights.weight_map import is_recomputed

if TYPE_CHECKING:
    import torch

NamedTensors = Mapping[str, Any] | Iterable[tuple[str, Any]]


def named_pairs(
    named_tensors: NamedTensors, hold: Callable[[str, Any], Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """(name, tensor) pairs, checked one by one as they are read: `WeightUpdateError` for what is no such pair. Buffers
    that every engine recomputes are left out. `hold` says what is made of a tensor, `whole` if it is not given."""
    if not isinstance(named_tensors, Iterable) or getattr(named_tensors, "shape", None) == ():
        raise WeightUpdateError("named_tensors must be an iterable of (name, tensor) pairs", field="named_tensors")
    return _checked(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors, hold or whole)


def describe(name: str, tensor: Any) -> TensorInfo:
    """The manifest entry of a tensor. `WeightUpdateError` naming it if its values cannot be read."""
    if not isinstance(tensor, np.ndarray):
        staging = _staging()
        problem = staging.unreadable(tensor) or shape_problem(tensor.shape)
        if problem:
            raise WeightUpdateError(f"{name} {problem}", field=name)
        return TensorInfo(name, tuple(tensor.shape), staging.dtype_name(tensor.dtype))
    problem = "is a masked array" if isinstance(tensor, np.ma.MaskedArray) else shape_problem(tensor.shape)
    if problem:
        raise WeightUpdateError(f"{name} {problem}", field=name)
    return TensorInfo(name, tensor.shape, tensor.dtype.name)


@functools.cache
def _staging() -> Any:
    """The module that knows torch's tensors."""
    from headrace.weights import staging

    return staging


class TensorBytes:
    """The bytes of a tensor that `describe` accepts, or a slice of them: row-major, in this machine's byte order.

    They are read in `copy_into`, from the caller's own memory where the tensor lies there so: what was freed or written
    to between the first of these calls and the last is refused by name, and never read.
    """

    def __init__(self, name: str, tensor: Any) -> None:
        self._hold(name, _plain(tensor))

    def _hold(self, name: str, plain: Any) -> None:
        self._name = name
        self._plain = plain
        self._writes = num_writes(plain)
        self._storage_bytes = storage_bytes(plain)
        self._part = range(plain.nbytes)

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, part: slice) -> TensorBytes:
        if part.start == 0 and part.stop >= len(self):
            return self
        found = copy.copy(self)
        found._part = self._part[part]
        return found

    def copy_into(self, view: Any, copy: Copy = copy_memory) -> None:
        """Write all of them to `view`, which has their size."""
        self._check_memory()
        if self._part:
            copy(address_of(view), _address(self._plain) + self._part.start, len(self._part))

    def _check_memory(self) -> None:
        is_readable = isinstance(self._plain, np.ndarray) or readable_now()
        if storage_bytes(self._plain) != self._storage_bytes or not is_readable:
            describe(self._name, self._plain)
        if num_writes(self._plain) != self._writes:
            raise WeightUpdateError(f"{self._name} was written to while it was sent", field=self._name)


class DeviceBytes(TensorBytes):
    """The same of a tensor on a device, for memory there: nothing waits for the copy."""

    def __init__(self, name: str, tensor: Any) -> None:
        self._hold(name, tensor.detach().resolve_conj().resolve_neg().contiguous())

    def copy_into(self, view: Any, copy: Copy = copy_memory) -> None:
        """Enqueue, on the current stream, writing all of them to `view`, which is uint8 of their size."""
        self._check_memory()
        view.copy_(self._plain.reshape(-1).view(view.dtype)[self._part.start : self._part.stop])


def device_of(tensor: Any) -> str:
    """The UUID of the CUDA device that a tensor is on; "" of any other."""
    if isinstance(tensor, np.ndarray) or tensor.device.type != "cuda":
        return ""
    from headrace.parallel.device_sharing import device_uuid

    return device_uuid(tensor.device)


def tensor_bytes(tensor: Any) -> memoryview:
    """As `TensorBytes`, to be read at once, while the tensor stays as it is."""
    return _memory(_plain(tensor))


def _plain(tensor: Any) -> Any:
    """The tensor with its elements one after the other in CPU memory: itself where they lie so."""
    if not isinstance(tensor, np.ndarray):
        lies_so = tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()
        return tensor if lies_so else tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("=") if not tensor.dtype.isnative else None)


def _address(plain: Any) -> int:
    return int(plain.__array_interface__["data"][0] if isinstance(plain, np.ndarray) else plain.data_ptr())


def _memory(plain: Any) -> memoryview:
    if isinstance(plain, np.ndarray):
        flat: npt.NDArray[Any] = plain.reshape(-1)
        return flat.view(np.uint8).data
    if not plain.nbytes:
        return memoryview(b"")
    # `Tensor.numpy()` would do, but makes the storage unresizable for good: FSDP could not free it any more.
    memory = (ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())
    memory.owner = plain  # so that a copy lives as long as the view
    return memoryview(memory).cast("B").toreadonly()


def to_tensor(weight: WeightBytes) -> torch.Tensor:
    """A CPU tensor over the memory of `weight`."""
    import torch

    dtype = getattr(torch, weight.info.dtype)
    if not weight.data:
        return torch.empty(weight.info.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(weight.data, dtype=dtype).reshape(weight.info.shape)


def whole(name: str, tensor: Any) -> Any:
    """What holds all of a tensor: a DTensor's own part where that is everything, the tensor itself if it is none.

    `WeightUpdateError` naming it where other ranks hold parts: gathering them is for all ranks to begin together.
    """
    if not _is_dtensor(tensor):
        return tensor
    if is_in_shards(tensor):
        num_ranks = tensor.device_mesh.size()
        message = (
            f"{name} is a DTensor of {num_ranks} ranks: headrace.rl.WeightPusher gathers it where all of them push"
        )
        raise WeightUpdateError(message, field=name)
    return own_part(tensor)


def own_part(tensor: Any) -> Any:
    """What this rank holds of a tensor."""
    if not _is_dtensor(tensor):
        return tensor
    with sys.modules["torch"].no_grad():  # its own part as it is, untouched
        return tensor.to_local()


def is_in_shards(tensor: Any) -> bool:
    """It is a DTensor of which other ranks hold parts."""
    if not _is_dtensor(tensor):
        return False
    mesh = tensor.device_mesh
    return not all(place.is_replicate() or mesh.size(axis) == 1 for axis, place in enumerate(tensor.placements))


def same_memory(left: Any, right: Any) -> bool:
    """True when two torch tensors are one: the same elements at the same place."""
    unreadable = _staging().unreadable
    if unreadable(left) or unreadable(right) or not left.numel():
        return False
    return place_of(left) == place_of(right)


def place_of(tensor: Any) -> tuple[Any, ...]:
    """Where a torch tensor's elements are: what no other that is readable has."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _checked(pairs: Iterable[Any], hold: Callable[[str, Any], Any]) -> Iterator[tuple[str, Any]]:
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise WeightUpdateError("named_tensors must hold (name, tensor) pairs", field="named_tensors")
        name, tensor = plain_text(pair[0]), pair[1]
        if problem := name_problem(name):
            raise WeightUpdateError(f"named_tensors: {problem}", field="named_tensors")
        if is_recomputed(name):
            continue
        if not isinstance(tensor, np.ndarray) and not _is_torch(tensor):
            raise WeightUpdateError(f"{name} is a {type(tensor).__name__}, not a torch or numpy tensor", field=name)
        yield name, hold(name, tensor)


def _is_dtensor(tensor: Any) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # not loaded: it can be none
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _is_torch(tensor: Any) -> bool:
    torch = sys.modules.get("torch")  # not loaded: it can be none
    return torch is not None and isinstance(tensor, torch.Tensor)


def storage_bytes(tensor: Any) -> int:
    """What the memory of a tensor holds: less, once it was freed."""
    return int(tensor.nbytes if isinstance(tensor, np.ndarray) else tensor.untyped_storage().nbytes())


def readable_now() -> bool:
    """Whether this thread can copy torch's tensors at the moment."""
    return not _staging().unreadable_now()


def num_writes(tensor: Any) -> int:
    """How often torch has written to a tensor's memory; 0 where nobody counts."""
    try:
        return int(tensor._version)
    except (AttributeError, RuntimeError):  # of NumPy, or of inference mode
        return 0
