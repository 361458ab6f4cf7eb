"""Where built kernels are kept. Owns the folder of a `kernel_cache`.

Needs neither torch nor triton: the libraries that build kernels learn their folders from the environment, so this must
come before they are imported. A folder may be carried to another path or host: `triton/carried_cache.py` finds what
Triton wrote by its name alone. Entries are keyed by the kernel's source, the versions and the device, so a folder from
elsewhere is at worst useless.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import msgspec

from headrace.types.errors import ConfigError

MANIFEST = "kernels.json"
CACHE_MANAGER = "headrace.kernels.triton.carried_cache:CarriedCacheManager"
_FOLDERS = {
    "triton": "TRITON_CACHE_DIR",
    "flashinfer": "FLASHINFER_WORKSPACE_BASE",
    "inductor": "TORCHINDUCTOR_CACHE_DIR",
}
_MODULES = {"triton": "triton", "flashinfer": "flashinfer"}


class KernelManifest(msgspec.Struct, frozen=True):
    """What a folder of built kernels was built with and for. `python` is the suffix of its extension modules."""

    headrace: str
    triton: str
    python: str
    device: str
    models: tuple[str, ...]


def use_kernel_cache(folder: str | None) -> None:
    """Make this process and its children keep built kernels in `folder`, which is made if need be; None: do nothing.

    May be called again with the same folder. Raises `ConfigError` (kernel_cache) if a library that builds kernels was
    imported before with another folder, or if the folder can neither be written nor holds this installation's kernels.
    """
    if folder is None:
        return
    root = Path(folder).expanduser().resolve()
    variables = {variable: str(root / name) for name, variable in _FOLDERS.items()}
    for module in _MODULES:
        if module in sys.modules and os.environ.get(_FOLDERS[module]) != variables[_FOLDERS[module]]:
            raise ConfigError(f"{module} is imported already and keeps its kernels elsewhere", field="kernel_cache")
    reason = _why_not_writable(root)
    if reason is not None and not is_complete(root):
        raise ConfigError(f"{root} cannot be written ({reason}), and is no complete set", field="kernel_cache")
    os.environ.update(variables)
    os.environ["TRITON_CACHE_MANAGER"] = CACHE_MANAGER
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # less than half the size


def seal(folder: Path, *, headrace: str, device: str, models: tuple[str, ...]) -> KernelManifest:
    """Write down that `folder` holds all kernels of `models` for `device`; from then on it may be read-only."""
    manifest = KernelManifest(headrace, importlib.metadata.version("triton"), _python(), device, models)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest


def is_complete(folder: Path) -> bool:
    """True if `folder` was sealed, by the Triton and the Python that are installed here."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=KernelManifest)
        triton = importlib.metadata.version("triton")
    except (OSError, msgspec.MsgspecError, importlib.metadata.PackageNotFoundError):
        return False
    return (manifest.triton, manifest.python) == (triton, _python())


def _python() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def _why_not_writable(root: Path) -> str | None:
    """Make the subfolders and try each; the reason if that fails."""
    try:
        for name in _FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root / name):
                pass
    except OSError as error:
        return error.strerror or str(error)
    return None
