"""Pictures of figures, by matplotlib, which only those who draw need. Owns how one is begun and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headrace.types.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib(who: str, path: Path | None = None) -> None:
    """Raise `ConfigError` now rather than after minutes of work when no picture could be drawn, or none written to
    `path`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = f"{who} draws a picture with matplotlib; install it with: pip install matplotlib"
        raise ConfigError(message, field="matplotlib") from None
    if path is None:
        return
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(f"plot {path} must end in one of .{', .'.join(sorted(known))}", field="plot")
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"plot {path} cannot be written: its folder does not exist, or it is one", field="plot")


def new_figure(width: float, height: float) -> Figure:
    """An empty one of so many inches, of no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_picture(figure: Figure, path: Path) -> None:
    """As the format that the name ends in. Raises `ConfigError` (field "plot") where that cannot be."""
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot {path} cannot be written: {error}", field="plot") from None
