"""The driver of CUDA devices in this process. Owns the library and how torch is shown its memory; calls nothing of it.

What a process that must stay free of CUDA asks is `headrace.config.devices`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from headrace.config.devices import DRIVER


@functools.cache
def cuda_driver() -> Any:
    """The library. Raises `OSError` where there is none."""
    return ctypes.CDLL(DRIVER)


def array_interface(address: int, num_bytes: int) -> dict[str, Any]:
    """The `__cuda_array_interface__` of so many bytes."""
    return {"version": 3, "typestr": "|u1", "shape": (num_bytes,), "strides": None, "data": (address, False)}
