"""The driver of CUDA devices in this process. Owns the library, how torch is shown its memory, and how a
thread stands to the captures of others.

What a process that must stay free of CUDA asks is `headrace.config.devices`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

from headrace.config.devices import DRIVER

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


@functools.cache
def cuda_driver() -> Any:
    """The library. Raises `OSError` where there is none."""
    return ctypes.CDLL(DRIVER)


def capture_by_thread() -> None:
    """What this thread asks of the driver neither breaks nor is refused by a graph capture in another thread."""
    cuda_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_THREAD_LOCAL)))


def open_context(index: int) -> None:
    """Have the driver make what a process needs first of a device: half a second's work in which Python goes on. What
    goes wrong is told to whoever uses the device."""
    driver, device, context = cuda_driver(), ctypes.c_int(), ctypes.c_void_p()
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch would
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def array_interface(address: int, num_bytes: int) -> dict[str, Any]:
    """The `__cuda_array_interface__` of so many bytes."""
    return {"version": 3, "typestr": "|u1", "shape": (num_bytes,), "strides": None, "data": (address, False)}
