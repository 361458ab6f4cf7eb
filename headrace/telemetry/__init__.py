"""What a process says about itself: structured log lines, the names of the engine's counters, a bar. No torch."""

from headrace.telemetry.histograms import DurationHistogram
from headrace.telemetry.logs import LOGGER_NAME, LogContext, configure_logging, flush_logs, logging_words
from headrace.telemetry.metrics import METRICS, MetricSpec
from headrace.telemetry.pictures import new_figure, require_matplotlib, write_picture
from headrace.telemetry.progress_bar import Progress, ProgressBar, can_draw

__all__ = [
    "LOGGER_NAME",
    "METRICS",
    "DurationHistogram",
    "LogContext",
    "MetricSpec",
    "Progress",
    "ProgressBar",
    "can_draw",
    "configure_logging",
    "flush_logs",
    "logging_words",
    "new_figure",
    "require_matplotlib",
    "write_picture",
]
