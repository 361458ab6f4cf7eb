"""Tensors of a caller as bytes and back. Owns the reading of torch and numpy arrays; imports torch only when one needs
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.types.errors import WeightUpdateError
from headrace.types.messages import WeightBytes
from headrace.types.weights import TensorInfo

if TYPE_CHECKING:
    import torch

NamedTensors = Mapping[str, Any] | Iterable[tuple[str, Any]]


def named_pairs(named_tensors: NamedTensors) -> Iterable[tuple[str, Any]]:
    """(name, tensor) pairs, checked one by one as they are read: `WeightUpdateError` for what is no such pair."""
    if isinstance(named_tensors, Mapping):
        return _checked(named_tensors.items())
    if not isinstance(named_tensors, Iterable):
        raise WeightUpdateError("named_tensors must be an iterable of (name, tensor) pairs", field="named_tensors")
    return _checked(named_tensors)


def describe(name: str, tensor: Any) -> TensorInfo:
    """The manifest entry of a tensor."""
    return TensorInfo(name, tuple(int(size) for size in tensor.shape), _dtype_name(tensor))


def tensor_bytes(tensor: Any) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy when it lies so in CPU memory."""
    flat: npt.NDArray[Any]
    if isinstance(tensor, np.ndarray):
        flat = np.ascontiguousarray(tensor).reshape(-1)
    else:
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(np.uint8).data


def to_tensor(weight: WeightBytes) -> torch.Tensor:
    """A CPU tensor of the caller's own memory."""
    import torch

    dtype = getattr(torch, weight.info.dtype)
    if not weight.data:
        return torch.empty(weight.info.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(weight.data), dtype=dtype).reshape(weight.info.shape)


def _checked(pairs: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise WeightUpdateError("named_tensors must hold (name, tensor) pairs", field="named_tensors")
        name, tensor = pair
        if not (isinstance(tensor, np.ndarray) or (hasattr(tensor, "detach") and hasattr(tensor, "shape"))):
            raise WeightUpdateError(f"{name} is a {type(tensor).__name__}, not a torch or numpy tensor", field=name)
        yield name, tensor


def _dtype_name(tensor: Any) -> str:
    return tensor.dtype.name if isinstance(tensor, np.ndarray) else str(tensor.dtype).removeprefix("torch.")
