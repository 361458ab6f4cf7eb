"""Which folders a server reads weights from, and saves them to, when it is asked to. Owns the rule; reads nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from headrace.types.errors import ConfigError, RequestError
from headrace.types.plain_values import as_path

_PLAIN = re.compile(r"[A-Za-z0-9._=+@,-]+(/[A-Za-z0-9._=+@,-]+)*/?")
"""What may follow the root of a URL: nothing that a store's library takes for more than names of folders."""


class Folders:
    """The model's own folder, the weight roots and the save roots of the server. To read somewhere is not to write."""

    def __init__(self, model_folder: str | Path, weight_roots: Sequence[str], save_roots: Sequence[str] = ()) -> None:
        own = _model_root(Path(model_folder).resolve())
        self._roots = (own, *(as_path(root, "weight_roots", ConfigError) for root in weight_roots))
        folders = [root for root in save_roots if not _is_url(root)]
        self._save_roots = [as_path(root, "save_roots", ConfigError) for root in folders]
        self._save_urls = [root.rstrip("/") + "/" for root in save_roots if _is_url(root)]

    def allowed(self, path: str, field: str) -> tuple[Path, Path]:
        """The folder, if it lies under the model's or a weight root, and that root. Links are followed before the
        check; that none leads out when files are opened, the core sees to."""
        folder, root, is_folder = _found(path, self._roots, field)
        if root is None:
            message = f"{field} {path} is outside the model's folder and this server's weight roots (--weight-root)"
            raise RequestError(message, field=field)
        if not is_folder:
            raise RequestError(f"{field} {path} is not a folder", field=field)
        return folder, root

    def to_save(self, path: str, field: str = "path") -> tuple[Path, Path]:
        """The folder, if it lies under a save root, and that root."""
        folder, root, _ = _found(path, self._save_roots, field)
        if root is None:
            message = f"{field} {path} is not below a save root of this server (--save-root)"
            raise RequestError(message, field=field)
        return folder, root

    def check_url(self, url: str) -> None:
        """`RequestError` for a URL that no save root begins."""
        below = next((url[len(root) :] for root in self._save_urls if url.startswith(root)), "")
        if not _PLAIN.fullmatch(below) or not {".", ".."}.isdisjoint(below.split("/")):
            raise RequestError(f"url {url} is not below a save root of this server (--save-root)", field="url")


def _found(path: str, roots: Sequence[Path], field: str) -> tuple[Path, Path | None, bool]:
    """A path without links, the root that it lies under, if any, and whether it is a folder there."""
    try:
        folder = Path(path).expanduser().resolve()
        root = next((root for root in roots if folder.is_relative_to(root)), None)
        return folder, root, root is not None and folder.is_dir()
    except (OSError, RuntimeError, ValueError):  # a name too long, a user nobody knows, a null character
        raise RequestError(f"{field} is not a path on this machine", field=field) from None


def _is_url(root: str) -> bool:
    return "://" in root


def _model_root(folder: Path) -> Path:
    """What may be read on request of where the model is: its folder. A snapshot in the Hugging Face cache is links into
    its repository's `blobs`: there it is the repository."""
    repository = folder.parent.parent
    return repository if folder.parent.name == "snapshots" and (repository / "blobs").is_dir() else folder
