"""A script, run by `headrace.config.devices` in a process of its own: what CUDA devices the driver shows, as JSON.

Only the standard library, so that it starts in milliseconds. It calls the driver (`cuInit`), which a process that forks
later must not have done; it makes no context, so it takes no device memory.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76
_NO_DEVICE = 100
_NAME_BYTES = 256


def read_devices(driver: Any) -> list[dict[str, Any]]:
    """Every visible device by the driver API's functions: the fields of `headrace.config.devices.CudaDevice`.

    No device is an empty list; any other answer than success raises `OSError`.
    """
    status = driver.cuInit(0)
    if status == _NO_DEVICE:
        return []
    _check(status, "cuInit")
    count = ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    return [_read_device(driver, ordinal) for ordinal in range(count.value)]


def _read_device(driver: Any, ordinal: int) -> dict[str, Any]:
    device, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(_NAME_BYTES)
    _check(driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal)), "cuDeviceGet")
    _check(driver.cuDeviceGetName(name, ctypes.c_int(_NAME_BYTES), device), "cuDeviceGetName")
    _check(driver.cuDeviceTotalMem_v2(ctypes.byref(total), device), "cuDeviceTotalMem_v2")
    return {
        "name": name.value.decode("utf-8", "replace"),
        "total_bytes": total.value,
        "capability": [_attribute(driver, device, _MAJOR), _attribute(driver, device, _MINOR)],
        "num_multiprocessors": _attribute(driver, device, _MULTIPROCESSORS),
        "index": ordinal,
    }


def _attribute(driver: Any, device: ctypes.c_int, number: int) -> int:
    value = ctypes.c_int()
    _check(driver.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(number), device), "cuDeviceGetAttribute")
    return value.value


def _check(status: int, call: str) -> None:
    if status != 0:
        raise OSError(f"{call} answered {status}")


if __name__ == "__main__":
    try:
        print(json.dumps(read_devices(ctypes.CDLL(sys.argv[1]))))
    except (OSError, AttributeError) as error:
        sys.exit(str(error))
