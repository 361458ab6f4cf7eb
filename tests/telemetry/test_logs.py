from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys

import pytest

from headrace.telemetry import LogContext, configure_logging, flush_logs
from headrace.telemetry.log_writer import MAX_WAITING_BYTES
from headrace.telemetry.logs import LIBRARIES
from tests.arch.source import child_environment


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


def test_a_pipe_that_nobody_reads_stops_nobody_and_the_loss_is_counted() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as reader, os.fdopen(writing, "w", encoding="utf-8") as writer:
        configure_logging(LogContext(), stream=writer)
        logger, text = logging.getLogger("headrace"), "x" * 1000
        num_records = 2 * MAX_WAITING_BYTES // len(text)
        for _ in range(num_records):
            logger.info(text)
        num_lines = num_dropped = 0
        for line in reader:  # the loss is told as often as there was room and then none
            if "were dropped" in line:
                num_dropped += int(line.split()[0])
            else:
                num_lines += 1
            if num_lines + num_dropped == num_records:
                break
        assert num_dropped > num_records // 3
        logger.info("after")
        assert reader.readline().endswith("after\n")
        flush_logs()


def test_libraries_that_serve_for_us_log_through_it_too() -> None:
    stream = io.StringIO()
    configure_logging(LogContext(), stream=stream)
    for name in LIBRARIES:
        logging.getLogger(name).warning("from %s", name)
        logging.getLogger(name).info("quiet")
    assert [line.split("from ")[1] for line in stream.getvalue().splitlines()] == list(LIBRARIES)


def test_a_process_ends_with_its_log_unread() -> None:
    script = """
import logging
from headrace.telemetry import LogContext, configure_logging
configure_logging(LogContext())
for _ in range(5000):
    logging.getLogger("headrace").warning("x" * 1000)
print("done", flush=True)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        assert process.wait(60) == 0


FORKING = """
import logging, os
from headrace.telemetry import LogContext, configure_logging, flush_logs

configure_logging(LogContext(role="parent"), level=logging.INFO)
logger = logging.getLogger("headrace.test")
logger.info("before")
flush_logs()
if not os.fork():
    logger.info("in the child")
    flush_logs()
    os._exit(0)
os.wait()
logger.info("after")
flush_logs()
"""


def test_a_process_that_is_forked_off_logs_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, env=child_environment()
    )
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()] == ["before", "in the child", "after"]
