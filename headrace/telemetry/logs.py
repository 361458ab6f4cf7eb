"""Log lines: one line per event, key=value or JSON, each naming the process that wrote it.

Owns the handler on the "headrace" logger and on those of the libraries that serve for us. Only process entry points
configure it: a library that is imported into a trainer leaves the trainer's logging alone. Must not know what is being
logged; whoever starts a process says its role and rank, and every record carries them.

A caller adds fields with the standard `extra` argument: `logger.info("loaded", extra={"fields": {"seconds": 1.2}})`.
What a message says in words already is given as "values": only JSON lines have those.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, TextIO

import msgspec

from headrace.telemetry.log_writer import QueuedHandler

LOGGER_NAME = "headrace"
LIBRARIES = ("asyncio", "uvicorn")


class LogContext(msgspec.Struct, frozen=True):
    """Which process writes: its role ("front", "core", ...) and its rank within the role."""

    role: str = "front"
    rank: int = 0


def configure_logging(
    context: LogContext, *, level: str | int = "info", as_json: bool = False, stream: TextIO | None = None
) -> logging.Logger:
    """Send the "headrace" logger's records to `stream` (stderr by default), replacing its handlers.

    Records go to the stream's descriptor, if it has one, without anybody waiting for whoever reads it.

    `level` is a standard level's number, or its name in any case; `ValueError` if it is not one.
    """
    logger = logging.getLogger(LOGGER_NAME)
    handler = _handler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter(context) if as_json else _LineFormatter(context))
    for each in (logger, *map(logging.getLogger, LIBRARIES)):
        each.handlers = [handler]
        each.propagate = False
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    return logger


def flush_logs() -> None:
    """Wait a moment until what was logged is written."""
    for handler in logging.getLogger(LOGGER_NAME).handlers:
        if isinstance(handler, QueuedHandler):
            handler.flush()


def logging_words() -> list[str]:
    """Command-line words with which a process that this one starts logs as this one does."""
    logger = logging.getLogger(LOGGER_NAME)
    words = ["--log-level", str(logger.level)] if logger.level else []
    return words + ["--log-json"] * any(isinstance(handler.formatter, _JsonFormatter) for handler in logger.handlers)


def _handler(stream: TextIO | None) -> logging.Handler:
    """A process may have been started without a stream to write to."""
    if stream is None:
        return logging.NullHandler()
    try:
        return QueuedHandler(stream.fileno())
    except (OSError, ValueError):
        return logging.StreamHandler(stream)  # a file in memory, which nobody has to read


class _LineFormatter(logging.Formatter):
    def __init__(self, context: LogContext) -> None:
        super().__init__()
        self._process = f"{context.role}:{context.rank}"

    def format(self, record: logging.LogRecord) -> str:
        when = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        pairs = "".join(f" {name}={_plain(value)}" for name, value in _fields(record).items())
        line = f"{when} {record.levelname.lower():7} {self._process} {_name(record)}: {record.getMessage()}{pairs}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _JsonFormatter(logging.Formatter):
    def __init__(self, context: LogContext) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "role": self._context.role,
            "rank": self._context.rank,
            "logger": _name(record),
            "message": record.getMessage(),
            **_fields(record),
            **_fields(record, "values"),
        }
        if record.exc_info is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _name(record: logging.LogRecord) -> str:
    return record.name.removeprefix(f"{LOGGER_NAME}.")


def _fields(record: logging.LogRecord, name: str = "fields") -> dict[str, Any]:
    fields = getattr(record, name, None)
    return fields if isinstance(fields, dict) else {}


def _plain(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if any(c.isspace() or c in '"=' for c in text) else text
