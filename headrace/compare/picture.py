"""A picture of comparisons: a row for each target, gaps by place and version, and recorded beside scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace.compare.gaps import Comparison, TokenTable, by_place
from headrace.telemetry import new_figure, write_picture

MAX_VERSIONS = 8
_MAX_POINTS = 20_000
_LEAST = 1e-8


def draw_comparisons(path: Path, found: Sequence[tuple[Comparison, TokenTable]]) -> None:
    """Raises `ConfigError` for what cannot be written."""
    figure = new_figure(11, 4 * len(found))
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (comparison, table) in zip(rows, found, strict=True):
        for version in list(comparison.by_version)[-MAX_VERSIONS:]:
            places = by_place(_of_version(table, version))
            means = [max(_LEAST, each.gap.mean_abs) for each in places]
            left.plot([each.first + 1 for each in places], means, marker="o", label=version)
        left.set(xscale="log", yscale="log", xlabel="place in the output, from 1", ylabel="mean |gap|, nats")
        left.set_title(comparison.target[-60:])
        left.legend(title="version", loc="lower left")
        step = max(1, len(table.recorded) // _MAX_POINTS)
        right.plot(np.exp(table.recorded[::step]), np.exp(table.scored[::step]), ".", markersize=2)
        right.plot([0, 1], [0, 1], color="tab:red", linewidth=0.5)
        right.set(
            xlabel="probability as recorded", ylabel="as scored", title=f"mean |gap| {comparison.gap.mean_abs:.2g}"
        )
        for axes in (left, right):
            axes.grid(alpha=0.3)
    write_picture(figure, path)


def _of_version(table: TokenTable, version: str) -> TokenTable:
    chosen = np.array([each == version for each in table.versions])
    return TokenTable(table.recorded[chosen], table.scored[chosen], table.places[chosen], [], [])
