"""A core's settings on their way to it, and what need not wait for torch once they are there.

Owns the thread that does both while the main one imports. What it does leaves Python's lock alone for the most part, so
the import loses little; and it imports nothing that imports torch, on which two threads would wait for each other.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import logging
from collections.abc import Callable

from headrace.config import ResolvedConfig
from headrace.config.cuda_driver import open_context
from headrace.config.devices import CudaDevice
from headrace.config.kernel_cache import use_kernel_cache

SETTINGS_SECONDS = 600.0
"""Of a wait for settings. The front decides them meanwhile, which slow files and drivers may hold up, or a signal that
stops it. Once it is gone its processes end, long before."""

logger = logging.getLogger(__name__)


class AwaitedSettings:
    """Begins at once to `receive` the settings, and then, if it `prepares`, to prepare their device."""

    def __init__(self, receive: Callable[[], ResolvedConfig], *, prepares: bool) -> None:
        thread = concurrent.futures.ThreadPoolExecutor(1, "headrace-settings")
        self._received = thread.submit(receive)
        self._prepared = thread.submit(self._prepare, prepares)
        thread.shutdown(wait=False)

    def wait(self) -> ResolvedConfig:
        """The settings. Raises what `receive` raises."""
        return self._received.result()

    def wait_prepared(self) -> None:
        """Wait for their device. Raises what keeps it from being prepared."""
        self._prepared.result()

    def _prepare(self, is_wanted: bool) -> None:
        resolved = self._received.result()
        if is_wanted and resolved.cuda is not None and resolved.attention_backend == "triton":
            prepare(resolved.cuda, resolved.engine.kernel_cache)


def prepare(device: CudaDevice, kernel_cache: str | None) -> None:
    """The device's context, and what names each built kernel in Triton's folder: for that Triton reads all of itself,
    and asks its assembler for its version. Raises `ConfigError` for a bad folder."""
    open_context(device.index)
    use_kernel_cache(kernel_cache)  # before anything imports triton
    try:
        compiler = importlib.import_module("triton.compiler.compiler")
        target = importlib.import_module("triton.backends.compiler").GPUTarget
        importlib.import_module("triton.runtime.cache").triton_key()
        major, minor = device.capability
        compiler.make_backend(target("cuda", 10 * major + minor, 32)).hash()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:  # another Triton's
        # It is asked again when the first kernel is built, and what is wrong with it is told then.
        logger.info("Triton is not prepared ahead: %s: %s", type(error).__name__, error)
