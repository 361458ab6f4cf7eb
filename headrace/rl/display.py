"""What a person sees of the demo: a live line on standard error while it runs, a picture when it ends."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headrace.telemetry import new_figure, write_picture

LOGPROB_LIMIT = 1e-4
_PLAIN_EVERY = 10


class StepRecord(msgspec.Struct, frozen=True):
    """One step of the demo in figures. `update_pause_ms` is None when nothing was pushed.

    `max_abs_logprob_diff` is between engine and trainer before the gradient; it says something about the engine only
    when `is_on_policy`: both held the same weights.
    """

    step: int
    version: str
    reward: float
    tokens_per_second: float
    update_pause_ms: float | None
    max_abs_logprob_diff: float
    is_on_policy: bool


class ProgressLine:
    """One live line on a terminal; elsewhere (a log file) a plain line now and then."""

    def __init__(self, num_steps: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._num_steps = num_steps
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=5),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("demo", total=num_steps, figures="starting the engine")

    def show(self, record: StepRecord) -> None:
        figures = describe(record)
        self._progress.update(self._task, completed=record.step, figures=figures)
        if not self._console.is_terminal and (record.step % _PLAIN_EVERY == 1 or record.step == self._num_steps):
            self._console.print(f"step {record.step}/{self._num_steps}  {figures}", highlight=False, soft_wrap=True)

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def describe(record: StepRecord) -> str:
    """A step's figures as one short line."""
    pause = "no update" if record.update_pause_ms is None else f"pause {record.update_pause_ms:.2f} ms"
    return f"reward {record.reward:.3f}  {record.tokens_per_second:,.0f} tok/s  version {record.version}  {pause}"


def draw_picture(path: Path, records: list[StepRecord]) -> None:
    """Write a PNG of reward, and of the engine-to-trainer logprob difference, over steps."""
    figure = new_figure(8, 7)
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [record.step for record in records]
    top.plot(steps, [record.reward for record in records], marker=".", color="tab:blue")
    top.set(ylabel="mean reward", ylim=(-0.02, 1.02), title="Headrace demo: reward over steps")
    differences = [max(record.max_abs_logprob_diff, 1e-9) for record in records]
    bottom.plot(steps, differences, marker=".", color="tab:green", label="engine vs trainer")
    bottom.axhline(LOGPROB_LIMIT, color="tab:red", linestyle="--", label=f"limit on policy: {LOGPROB_LIMIT:g}")
    bottom.set(xlabel="step", ylabel="max |logprob difference|", yscale="log", ylim=(1e-9, None))
    bottom.legend(loc="lower right")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    write_picture(figure, path)
