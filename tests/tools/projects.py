"""Small distributions for tests of the wheelhouse: wheels made by hand, and a project that builds without a backend."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

BACKEND = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from tests.tools.projects import make_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return make_wheel(Path(wheel_directory), "mill", "1.0", {requires!r}, extras=("fast",)).name
"""


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    requires: Sequence[str] = (),
    *,
    tag: str = "py3-none-any",
    extras: tuple[str, ...] = (),
) -> Path:
    """A wheel with one module of the distribution's name, whose `VERSION` is its version."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {text}" for text in requires]
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def make_project(folder: Path, requires: Sequence[str], root: Path) -> Path:
    """A source tree called "mill" with an extra "fast"; its build needs nothing that must be installed."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n', encoding="utf-8"
    )
    (folder / "backend.py").write_text(BACKEND.format(root=str(root), requires=list(requires)), encoding="utf-8")
    return folder
