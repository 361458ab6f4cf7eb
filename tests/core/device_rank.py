"""A rank on a CPU that passes for a device: what it maps of others is in files, which the driver's handles name. Run as
a process it is `headrace.core.rank_process`, with the fault that FAULT names."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from headrace.core import rank_process
from headrace.kernels.triton import weight_pieces
from headrace.types.errors import UnavailableError
from headrace.types.weights import DeviceArea
from headrace.weights import stage_buffers, store
from tests.weights.test_device_staging import moved_one_by_one
from tests.weights.test_stage_buffers import Cudart

FAULT = "HEADRACE_TEST_FAULT"
HERE, THERE = ("GPU-0", "GPU-1", "GPU-2"), ("GPU-1", "GPU-0", "GPU-3")
"""The devices that rank 0 reads, and rank 1."""


class FileMapped:
    """As `MappedMemory`, of an area whose handle is the path of a file."""

    fault = ""

    def __init__(self, area: DeviceArea) -> None:
        if FileMapped.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if FileMapped.fault == "refuse":
            raise UnavailableError("the driver could not map another's memory: error 205", field="buffer")
        with open(area.handle.decode(), "rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
        self.address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr() + area.offset

    def close(self) -> None:
        self._mapping.close()


def pass_for_device(change: Callable[[Any, str, Any], object], device_ids: tuple[str, ...]) -> None:
    """`change` sets an attribute of a module or a class."""
    start = store.WeightStore.__init__

    def with_buffers(self: store.WeightStore, *args: Any, **settings: Any) -> None:
        start(self, *args, **settings)
        self._buffers = stage_buffers.DeviceBuffers(self.device, self._side.settle)

    change(store.WeightStore, "__init__", with_buffers)
    change(store.WeightStore, "device_ids", device_ids)
    change(weight_pieces, "move_rows", moved_one_by_one)
    change(stage_buffers, "MappedMemory", FileMapped)
    change(stage_buffers, "same_context", lambda: lambda: None)
    cudart = Cudart()
    change(torch.cuda, "cudart", lambda: cudart)


if __name__ == "__main__":
    pass_for_device(setattr, THERE)
    FileMapped.fault = os.environ.get(FAULT, "")
    code = rank_process.main(sys.argv[1:])
    os._exit(code)
