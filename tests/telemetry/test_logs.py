from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from headrace.telemetry import LOGGER_NAME, LogContext, configure_logging


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = logging.getLogger(LOGGER_NAME)
    before = (list(logger.handlers), logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


def test_a_line_names_the_process_and_its_fields() -> None:
    stream = io.StringIO()
    configure_logging(LogContext("core", 3), stream=stream)
    logging.getLogger("headrace.weights").info("loaded", extra={"fields": {"seconds": 0.25, "path": "a b"}})
    line = stream.getvalue().strip()
    assert line.endswith('info    core:3 weights: loaded seconds=0.25 path="a b"')


def test_json_lines_parse_and_carry_the_rank() -> None:
    stream = io.StringIO()
    configure_logging(LogContext("front", 1), as_json=True, stream=stream)
    logging.getLogger("headrace.server").warning("slow", extra={"fields": {"num_waiting": 4}})
    record = json.loads(stream.getvalue())
    assert (record["role"], record["rank"], record["level"], record["num_waiting"]) == ("front", 1, "warning", 4)


def test_records_below_the_level_are_dropped_and_reconfiguring_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging(LogContext(), level="warning", stream=first)
    logging.getLogger("headrace").info("quiet")
    configure_logging(LogContext(), level="DEBUG", stream=second)
    logging.getLogger("headrace").debug("heard")
    assert first.getvalue() == ""
    assert "heard" in second.getvalue()


def test_an_exception_is_part_of_the_record() -> None:
    stream = io.StringIO()
    configure_logging(LogContext(), as_json=True, stream=stream)
    try:
        raise RuntimeError("broken pipe of water")
    except RuntimeError:
        logging.getLogger("headrace").exception("failed")
    assert "broken pipe of water" in json.loads(stream.getvalue())["exception"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging(LogContext(), level="loud")
