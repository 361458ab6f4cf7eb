"""The thread that drives a device: its current device, its stream, and how it stands to the graph captures of others.

Owns what is set for the thread, once, before anything is allocated; a core's thread keeps it to its end.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from headrace.config import ResolvedConfig
from headrace.config.cuda_driver import capture_by_thread
from headrace.types.errors import ConfigError

CAPTURE_MODE = "thread_local"
"""Our own captures do not mind what a trainer's threads do meanwhile."""


def take_device(resolved: ResolvedConfig, *, shares_process: bool) -> torch.device:
    """Make this thread that of the device. Raises `ConfigError` if torch cannot use it.

    It has a stream of its own: steps are captured on the one they run on, and the default one cannot be; nor does it
    wait for a trainer's work, or is waited for by it. In a process that is shared what the thread asks of the driver
    neither breaks nor is refused by a capture in another thread.
    """
    if resolved.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device 'cuda' needs a CUDA build of torch and a device that it can use", field="device")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    device = torch.device("cuda", resolved.cuda.index if resolved.cuda is not None else 0)
    torch.cuda.set_device(device)
    try:
        stream = _left_streams(device).pop()
    except KeyError:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    if shares_process:
        capture_by_thread()
    return device


def leave_device(device: torch.device) -> None:
    """Nothing of this thread's is enqueued there any more: the next that takes the device has its stream. Idempotent.

    For each stream torch keeps a workspace of products, 32 MiB on Hopper, as long as the process lives.
    """
    if device.type == "cuda":
        _left_streams(device).add(torch.cuda.current_stream(device))


@functools.cache
def _left_streams(device: torch.device) -> set[Any]:
    """Of threads of this process that have left the device."""
    return set()
