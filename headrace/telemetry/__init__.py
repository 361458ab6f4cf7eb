"""What a process says about itself: structured log lines, the names of the engine's counters, a bar. No torch."""

from headrace.telemetry.histograms import DurationHistogram
from headrace.telemetry.history import (
    MAX_SAMPLES,
    POINT_FIELDS,
    Excerpt,
    History,
    HistoryPart,
    HistoryPoint,
    Rewards,
    SampleNote,
    UpdateNote,
    sum_of,
)
from headrace.telemetry.logs import LOGGER_NAME, LogContext, configure_logging, flush_logs, logging_words
from headrace.telemetry.metrics import METRICS, MetricSpec
from headrace.telemetry.pictures import new_figure, require_matplotlib, write_picture
from headrace.telemetry.progress_bar import Progress, ProgressBar, can_draw

__all__ = [
    "LOGGER_NAME",
    "MAX_SAMPLES",
    "METRICS",
    "POINT_FIELDS",
    "DurationHistogram",
    "Excerpt",
    "History",
    "HistoryPart",
    "HistoryPoint",
    "LogContext",
    "MetricSpec",
    "Progress",
    "ProgressBar",
    "Rewards",
    "SampleNote",
    "UpdateNote",
    "can_draw",
    "configure_logging",
    "flush_logs",
    "logging_words",
    "new_figure",
    "require_matplotlib",
    "sum_of",
    "write_picture",
]
