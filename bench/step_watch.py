"""When an engine's core completes its steps, by its pulse, and the gaps between them: of scripts that look at what
running requests are given. Knows nothing of what disturbs them."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection

from headrace import Engine
from headrace.engine.stream import Stream
from headrace.ipc import PulsePage
from headrace.types.request import Delta

LOOK_S = 0.0001
LATE_S = 0.001

Gap = tuple[float, float]
"""When it ended, in seconds of CLOCK_MONOTONIC, and its milliseconds."""

Arrivals = dict[int, list[float]]
"""When this process got something for a request, by the request's place in its call."""


class StepWatch:
    """When an engine's core completes its steps, as a process of its own sees it: a fork that only looks at a page of
    shared memory, so that no thread of this process is in its way. A context manager."""

    def __init__(self, engine: Engine) -> None:
        self.page = engine.asynchronous.runtime.host.pulse
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_look, args=(self.page, theirs, self._pipe), daemon=True)
        self._process.start()
        theirs.close()

    def take(self, begin: float, end: float) -> tuple[list[float], float]:
        """The times since the last call, in seconds of CLOCK_MONOTONIC, and the longest that it did not look for
        between these two, in milliseconds."""
        self._pipe.send((begin, end))
        stamps, longest_look = self._pipe.recv()
        return stamps, longest_look

    def __enter__(self) -> StepWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(5.0)


def _look(page: PulsePage, pipe: Connection, other: Connection) -> None:
    other.close()
    seen, stamps, late = page.read().num_steps, list[float](), list[Gap]()
    last = time.monotonic()
    while True:
        time.sleep(LOOK_S)
        now, num_steps = time.monotonic(), page.read().num_steps
        if num_steps != seen:
            stamps.append(now)
            seen = num_steps
        if now - last > LATE_S:
            late.append((now, 1e3 * (now - last)))
        last = now
        if pipe.poll():
            try:
                begin, end = pipe.recv()
            except EOFError:
                return
            pipe.send((stamps, max((each for at, each in late if begin <= at <= end), default=1e3 * LATE_S)))
            stamps, late, last = [], [], time.monotonic()


def gaps_of(times: Sequence[float], window: tuple[float, float]) -> list[Gap]:
    """When each gap within the window ended, and its milliseconds."""
    inside = [each for each in times if window[0] <= each <= window[1]]
    return [(later, 1e3 * (later - earlier)) for earlier, later in pairwise(inside)]


def longest(gaps: Sequence[Gap], span: tuple[float, float]) -> float:
    return max((gap for end, gap in gaps if span[0] <= end <= span[1]), default=0.0)


def spread(gaps: Sequence[float]) -> dict[str, float]:
    ordered = sorted(gaps)
    return {
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[len(ordered) * 99 // 100],
        "longest_ms": ordered[-1],
    }


@contextlib.contextmanager
def noted_arrivals() -> Iterator[Arrivals]:
    """Notes them while it is entered, of all requests."""
    arrivals: Arrivals = defaultdict(list)
    original = Stream.on_delta

    @functools.wraps(original)
    def noting(self: Stream, delta: Delta) -> None:
        arrivals[self.item.prompt_index].append(time.monotonic())
        original(self, delta)

    Stream.on_delta = noting  # type: ignore[method-assign]
    try:
        yield arrivals
    finally:
        Stream.on_delta = original  # type: ignore[method-assign]
