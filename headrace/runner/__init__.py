"""Executes plans: input table, KV pool, one packed forward, sampling. Ranks execute; they never decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.config import ResolvedConfig
from headrace.config.kernel_cache import use_kernel_cache
from headrace.parallel import SINGLE, Mesh
from headrace.runner.loading import Progress
from headrace.runner.runner import Runner

if TYPE_CHECKING:
    from headrace.runner.device_runner import DeviceRunner

__all__ = ["Runner", "build_runner"]

_DEVICE_BACKENDS = ("triton", "flashinfer")


def build_runner(
    resolved: ResolvedConfig,
    on_progress: Progress | None = None,
    *,
    shares_process: bool = False,
    mesh: Mesh = SINGLE,
) -> Runner | DeviceRunner:
    """The runner that these settings ask for, in a process of its own or a caller's. Raises what its constructor
    raises, and `ConfigError`."""
    if resolved.attention_backend not in _DEVICE_BACKENDS:
        return Runner(resolved, on_progress, shares_process=shares_process, mesh=mesh)
    use_kernel_cache(resolved.engine.kernel_cache)  # before anything imports triton
    from headrace.runner.device_runner import DeviceRunner

    return DeviceRunner(resolved, on_progress, shares_process=shares_process, mesh=mesh)
