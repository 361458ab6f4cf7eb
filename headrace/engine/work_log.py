"""One line of the log every few seconds while an engine works, and none while it is idle. Owns when, and its wording.

It is made of the status that the front asks for anyway: the core does nothing for it.
"""

from __future__ import annotations

import logging
import operator

from headrace.types.messages import CoreStatus

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0

_LINE = "%d running, %d waiting, %.0f tokens/s in, %.0f out, %.0f%% of prompts cached, %.0f%% of KV used, weights %s"
_COUNTED = ("num_prompt_tokens", "num_cached_tokens", "num_generated_tokens")


class WorkLog:
    """Is told of every status of one core, or of one after the other."""

    def __init__(self) -> None:
        self._since = 0.0
        self._before: tuple[float, ...] | None = None

    def note(self, status: CoreStatus, now: float) -> None:
        """`now` is in seconds of any clock."""
        counts = tuple(status.metrics.get(name, 0.0) for name in _COUNTED)
        before = self._before
        is_waiting = bool(status.num_running or status.num_waiting) and not (status.paused or status.released)
        is_another_core = before is not None and any(map(operator.lt, counts, before))
        if before is None or is_another_core or not (is_waiting or counts != before):
            self._since, self._before = now, counts  # idle: the next line's seconds begin here
        elif now - self._since >= INTERVAL_SECONDS:
            self._write(status, now - self._since, list(map(operator.sub, counts, before)))
            self._since, self._before = now, counts

    def _write(self, status: CoreStatus, seconds: float, added: list[float]) -> None:
        num_prompt, num_cached, num_generated = added
        rates = num_prompt / seconds, num_generated / seconds
        hit_rate = num_cached / num_prompt if num_prompt else 0.0
        kv_used = status.num_used_tokens / max(1, status.max_total_num_tokens)
        logger.info(
            _LINE,
            *(status.num_running, status.num_waiting, *rates, 100 * hit_rate, 100 * kv_used, status.version),
            extra={
                "values": {
                    "running": status.num_running,
                    "waiting": status.num_waiting,
                    "prompt_tokens_per_second": round(rates[0], 1),
                    "generated_tokens_per_second": round(rates[1], 1),
                    "cache_hit_rate": round(hit_rate, 4),
                    "kv_used": round(kv_used, 4),
                    "version": status.version,
                }
            },
        )
