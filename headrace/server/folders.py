"""Which folders a server reads weights from when it is asked to. Owns the rule; reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headrace.types.errors import ConfigError, RequestError
from headrace.types.plain_values import as_path


class Folders:
    """The model's own folder and the weight roots of the server."""

    def __init__(self, model_folder: str | Path, weight_roots: Sequence[str]) -> None:
        own = _model_root(Path(model_folder).resolve())
        self._roots = (own, *(as_path(root, "weight_roots", ConfigError) for root in weight_roots))

    def allowed(self, path: str, field: str) -> tuple[Path, Path]:
        """The folder, if it lies under the model's or a weight root, and that root. Links are followed before the
        check; that none leads out when files are opened, the core sees to."""
        try:
            folder = Path(path).expanduser().resolve()
            root = next((root for root in self._roots if folder.is_relative_to(root)), None)
            is_folder = root is not None and folder.is_dir()
        except (OSError, RuntimeError, ValueError):  # a name too long, a user nobody knows, a null character
            raise RequestError(f"{field} is not a path on this machine", field=field) from None
        if root is None:
            message = f"{field} {path} is outside the model's folder and the weight roots of this server"
            raise RequestError(message, field=field)
        if not is_folder:
            raise RequestError(f"{field} {path} is not a folder", field=field)
        return folder, root


def _model_root(folder: Path) -> Path:
    """What may be read on request of where the model is: its folder. A snapshot in the Hugging Face cache is links into
    its repository's `blobs`: there it is the repository."""
    repository = folder.parent.parent
    return repository if folder.parent.name == "snapshots" and (repository / "blobs").is_dir() else folder
