"""How long requests wait, begin and go on, and for how long updates hold them: histograms over an engine's life.

Owns which there are. Their names are SGLang's where it has them, so that its dashboards find them. Lives on the
engine's loop.
"""

from __future__ import annotations

from collections.abc import Iterator

from headrace.telemetry import DurationHistogram

_WHOLE = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
_WAITING = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1, 2)
_PAUSES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Latencies:
    """The histograms of one engine."""

    def __init__(self) -> None:
        kind = DurationHistogram
        self._queue = kind("sglang:queue_time_seconds", "from arrival to start", _WAITING)
        self._first = kind("sglang:time_to_first_token_seconds", "from arrival to the first token", _WAITING)
        self._between = kind("sglang:inter_token_latency_seconds", "between tokens, of each request the mean", _BETWEEN)
        self._whole = kind("sglang:e2e_request_latency_seconds", "from arrival to end", _WHOLE)
        self._pause = kind("headrace_update_pause_seconds", "for which a weight update let no step run", _PAUSES)

    def __iter__(self) -> Iterator[DurationHistogram]:
        return iter((self._queue, self._first, self._between, self._whole, self._pause))

    def note_end(self, queued: float, times: tuple[float, ...], ended: float, num_tokens: int) -> None:
        """A sequence has ended; `times` as in `Delta`, all in seconds of one clock."""
        started, first_token = times or (0.0, 0.0)
        self._whole.observe(ended - queued)
        if started:
            self._queue.observe(started - queued)
        if first_token:
            self._first.observe(first_token - queued)
            if num_tokens > 1:
                self._between.observe((ended - first_token) / (num_tokens - 1), num_tokens - 1)

    def note_pause(self, seconds: float) -> None:
        """A weight update held requests for so long."""
        self._pause.observe(seconds)
