"""What this machine and its Python offer for running on a GPU. Owns how both are found out, without torch.

Neither is a decision: `resolve()` makes those.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
PROBE = Path(__file__).with_name("cuda_probe.py")
_PROBE_SECONDS = 30.0
_TORCH_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


class CudaDevice(msgspec.Struct, frozen=True):
    """A device as the driver describes it. `capability` is (major, minor), (9, 0) for an H200; `index` counts what a
    process sees."""

    name: str
    total_bytes: int
    capability: tuple[int, int]
    num_multiprocessors: int
    index: int = 0


class Software(msgspec.Struct, frozen=True):
    """What is installed. `torch_cuda` is the CUDA version torch was built for, None for a CPU build.

    `interprets_triton` says that the environment makes Triton run its kernels in Python, which needs no device.
    """

    torch_cuda: str | None = None
    has_triton: bool = False
    has_flashinfer: bool = False
    interprets_triton: bool = False


def cuda_devices(*, driver: str = DRIVER, probe: Path = PROBE) -> tuple[CudaDevice, ...]:
    """The CUDA devices that `CUDA_VISIBLE_DEVICES` lets this process see, in its order; () without driver or device.

    Asked in a short-lived process: a process whose driver is initialised can fork no child that uses CUDA, and may not
    change `CUDA_VISIBLE_DEVICES` any more, which is not for an engine's constructor to bring about. Never raises.
    """
    try:
        ctypes.CDLL(driver)  # loading it initialises nothing; without it there is nothing to ask
    except OSError:
        return ()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(probe), driver], capture_output=True, timeout=_PROBE_SECONDS, check=True
        )
        return msgspec.json.decode(done.stdout, type=tuple[CudaDevice, ...])
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode("utf-8", "replace").strip() or f"exit code {error.returncode}"
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        reason = str(error)
    logger.warning("%s is there, but its devices cannot be listed: %s", driver, reason)
    return ()


def installed_software() -> Software:
    """What the engine's device code needs, looked up without importing any of it."""
    return Software(
        torch_cuda=_torch_cuda(),
        has_triton=_is_installed("triton"),
        has_flashinfer=_is_installed("flashinfer"),
        interprets_triton=os.environ.get("TRITON_INTERPRET") == "1",
    )


def torch_cuda_of(version_file: str) -> str | None:
    """The CUDA version in the text of `torch/version.py`."""
    found = _TORCH_CUDA.search(version_file)
    return found[1] if found else None


def _torch_cuda() -> str | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        return torch_cuda_of(Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"))
    except OSError:
        return None


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
