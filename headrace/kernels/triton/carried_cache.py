"""Triton's cache folder, such that it may be moved. Owns how the files of one built kernel are found.

Triton writes down a kernel's files with their absolute paths and compiles again where those are gone. They all lie in
the kernel's own folder, so their names are enough. Triton imports this class by its name: see `config/kernel_cache.py`.
"""
# mypy: disable-error-code="import-untyped,misc"

from __future__ import annotations

import os

import msgspec
from triton.runtime.cache import FileCacheManager


class _Group(msgspec.Struct, frozen=True):
    """As Triton writes it: name -> the path at that time."""

    child_paths: dict[str, str]


class CarriedCacheManager(FileCacheManager):
    """As `FileCacheManager`, wherever the folder is now."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """name -> path of the files of a built kernel; None if it is not there in full."""
        try:
            with open(os.path.join(self.cache_dir, f"__grp__{filename}"), "rb") as file:
                group = msgspec.json.decode(file.read(), type=_Group)
        except (OSError, msgspec.MsgspecError):
            return None
        found = {name: os.path.join(self.cache_dir, name) for name in group.child_paths}
        return found if all(map(os.path.exists, found.values())) else None
