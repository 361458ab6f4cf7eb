"""What a weight update did, as one line of the log. Owns its wording."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from headrace.engine.lookback import Lookback
from headrace.types.weights import UpdateReport

logger = logging.getLogger(__name__)


def note_update(report: UpdateReport, roads: Iterable[str], seconds: float, lookback: Lookback) -> None:
    """Say that new weights are live, `seconds` after the update was begun; `roads` are the ways by which they came. The
    `lookback` hears of it."""
    road = " and ".join(sorted(roads)) or "no road"
    lookback.note_update(report, road, seconds)
    aborted = f", {report.num_aborted} requests aborted" if report.num_aborted else ""
    logger.info(
        "weights %s are live: %d tensors, %s by %s, %s, in %.0f ms, of which %.1f ms without a step%s",
        report.version,
        report.num_tensors,
        _size(report.num_bytes),
        road,
        report.mode,
        1e3 * seconds,
        report.pause_ms,
        aborted,
        extra={"values": {**msgspec.structs.asdict(report), "road": road, "ms": round(1e3 * seconds, 1)}},
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
