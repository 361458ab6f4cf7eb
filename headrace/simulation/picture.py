"""What a person sees of simulated runs: one picture, by the number of replicas, or of one run over its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headrace.simulation.figures import RunFigures
from headrace.simulation.simulator import Simulation
from headrace.telemetry import new_figure, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_POINTS = 400


def draw_sweep(path: Path, runs: Sequence[RunFigures], title: str) -> None:
    """Throughput, tail, hit rate and update time by the number of replicas."""
    figure = new_figure(10, 7)
    figure.suptitle(title)
    panels = figure.subplots(2, 2).flat
    _curve(next(panels), runs, "tokens/s per replica", {"while generating": _per_replica})
    _curve(
        next(panels),
        runs,
        "share",
        {"replicas busy": lambda run: run.busy_share, "last tenth's part of a batch": lambda run: run.tail_share},
    )
    _curve(
        next(panels),
        runs,
        "hit rate of prompts",
        {"replicas": lambda run: run.hit_rate, "one big cache": lambda run: run.one_cache_hit_rate},
    )
    _curve(
        next(panels),
        runs,
        "seconds",
        {
            "update, to the fence": lambda run: run.update_seconds,
            "longest wait for a front": lambda run: run.front_wait_seconds,
        },
        is_log=True,
    )
    write_picture(figure, path)


def draw_run(path: Path, simulation: Simulation, title: str) -> None:
    """Samples that run, samples that have ended, and updates, over the time of one run."""
    figure = new_figure(10, 6)
    figure.suptitle(title)
    top, bottom = figure.subplots(2, 1, sharex=True)
    times = np.linspace(0.0, simulation.timeline.now, _NUM_POINTS)
    ended = [each for each in simulation.rollouts if each.ended == each.ended]
    starts, ends = (np.sort([each.started for each in ended]), np.sort([each.ended for each in ended]))
    counts = np.searchsorted(ends, times, side="right")
    top.plot(times, np.searchsorted(starts, times, side="right") - counts, color="tab:blue")
    top.set(ylabel="samples running")
    bottom.plot(times, counts, color="tab:green")
    bottom.set(ylabel="samples ended", xlabel="seconds")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        for step in simulation.steps:
            axes.axvspan(step.push_began, step.pushed, color="tab:red", alpha=0.4)
    write_picture(figure, path)


def _per_replica(run: RunFigures) -> float:
    return run.generating_tokens_per_second / run.num_replicas


def _curve(
    axes: Axes,
    runs: Sequence[RunFigures],
    label: str,
    lines: dict[str, Callable[[RunFigures], float | None]],
    *,
    is_log: bool = False,
) -> None:
    for name, figure_of in lines.items():
        points = [(run.num_replicas, value) for run in runs if (value := figure_of(run)) is not None]
        axes.plot([count for count, _ in points], [value for _, value in points], marker="o", label=name)
    axes.set(xlabel="replicas", ylabel=label)
    axes.set_xscale("log", base=2)
    if is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(axes.dataLim.ymax, 0.1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
