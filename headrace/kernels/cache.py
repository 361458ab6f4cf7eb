"""Where built kernels are kept, and how many are built. Owns the folder of a `kernel_cache` and the count of builds.

Needs neither torch nor triton: the libraries that build kernels learn their folders from the environment, so this must
come before they are imported. A folder may be carried to another path or host: `triton/carried_cache.py` finds what
Triton wrote by its name alone. Entries are keyed by the kernel's source, the versions and the device, so a folder from
elsewhere is at worst useless.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

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


class CompileCounter:
    """Counts Triton's compilations from `arm` on. A kernel that this process has loaded already is neither.

    num_compiled    kernels that were compiled
    num_loaded      kernels whose binary was found in the cache folder
    """

    def __init__(self) -> None:
        self.num_compiled = 0
        self.num_loaded = 0
        self._is_armed = False
        self._is_linked = False  # Triton, or a listener that came later, calls us
        self._earlier: Any = None

    @property
    def num_calls(self) -> int:
        """Every way through the compiler, whether it found a binary or made one: each stalls a step."""
        return self.num_compiled + self.num_loaded

    def arm(self) -> None:
        """Begin to count; imports triton. Whoever listened before goes on listening."""
        if not self._is_linked:
            knobs = importlib.import_module("triton.knobs").compilation
            self._earlier, knobs.listener = knobs.listener, self._observe
            self._is_linked = True
        self._is_armed = True

    def disarm(self) -> None:
        """Stop counting, and put back who listened before unless somebody came later, who still needs us to pass on."""
        if not self._is_linked:
            return
        self._is_armed = False
        knobs = importlib.import_module("triton.knobs").compilation
        if knobs.listener == self._observe:
            knobs.listener, self._earlier = self._earlier, None
            self._is_linked = False

    def _observe(self, *, cache_hit: bool, **about: Any) -> None:
        """Triton's listener: called once per compilation, at its end."""
        if self._is_armed:
            if cache_hit:
                self.num_loaded += 1
            else:
                self.num_compiled += 1
        if self._earlier is not None:
            self._earlier(cache_hit=cache_hit, **about)
