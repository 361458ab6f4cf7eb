"""What a process says about itself: structured log lines and the names of the engine's counters. No torch."""

from headrace.telemetry.logs import LOGGER_NAME, LogContext, configure_logging, flush_logs, logging_words
from headrace.telemetry.metrics import METRICS, MetricSpec

__all__ = ["LOGGER_NAME", "METRICS", "LogContext", "MetricSpec", "configure_logging", "flush_logs", "logging_words"]
