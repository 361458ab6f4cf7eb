"""Copies by several threads: all bytes, none beside them, and never less than done."""

from __future__ import annotations

import random
import threading
from concurrent.futures import wait

import numpy as np
import pytest

from headrace.engine import memory_copy as module
from headrace.engine.memory_copy import CopyingThreads, address_of, settle


@pytest.mark.parametrize("num_cores", [1, 2, 16])
def test_any_number_of_bytes_arrives_and_no_other_changes(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 64)
    monkeypatch.setattr(module, "_num_cores", lambda: num_cores)
    threads, choose = CopyingThreads(), random.Random(num_cores)
    source = np.frombuffer(choose.randbytes(5000), dtype=np.uint8)
    for _ in range(50):
        size = choose.choice([0, 1, 63, 64, 127, 128, choose.randrange(4000)])
        start, place = choose.randrange(900), choose.randrange(900)
        into = bytearray(b"\7" * 5000)
        address = source.__array_interface__["data"][0] + start
        threads.copy(address_of(memoryview(into)) + place, address, size)
        expected = b"\7" * place + source[start : start + size].tobytes() + b"\7" * (5000 - place - size)
        assert bytes(into) == expected
    threads.close()


def test_copies_that_have_begun_are_done_when_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many, and beside each other."""
    monkeypatch.setattr(module, "PART_BYTES", 64)
    monkeypatch.setattr(module, "_num_cores", lambda: 4)
    threads, source = CopyingThreads(), np.frombuffer(random.Random(1).randbytes(8192), dtype=np.uint8)
    into, copies = bytearray(8192), []
    may_go, copy = threading.Event(), module.copy_memory
    monkeypatch.setattr(module, "copy_memory", lambda *place: may_go.wait(10.0) and copy(*place))
    for at in range(0, 8192, 512):
        begin = address_of(memoryview(into)) + at, source.__array_interface__["data"][0] + at, 512
        copies += threads.begin(*begin)
    assert not any(into) and len(copies) == 48
    may_go.set()
    settle(copies)
    assert bytes(into) == source.tobytes()
    threads.close()


def test_threads_are_kept_and_end_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 64)
    monkeypatch.setattr(module, "_num_cores", lambda: 4)
    threads, source = CopyingThreads(), np.zeros(1024, dtype=np.uint8)
    into = bytearray(1024)
    before = threading.active_count()
    for _ in range(20):
        threads.copy(address_of(memoryview(into)), source.__array_interface__["data"][0], 1024)
    kept = [each for each in threading.enumerate() if each.name.startswith("headrace-copy")]
    assert 0 < len(kept) <= 3 and threading.active_count() - before <= 3
    threads.close()
    for each in kept:
        each.join(10.0)
        assert not each.is_alive()


def test_who_is_interrupted_leaves_nothing_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 64)
    monkeypatch.setattr(module, "_num_cores", lambda: 4)
    may_go, num_done = threading.Event(), []

    def slow(*_: int) -> None:
        may_go.wait(10.0)
        num_done.append(1)

    waits: list[int] = []

    def interrupted(copies: object) -> object:
        waits.append(1)
        if len(waits) == 1:
            raise KeyboardInterrupt
        may_go.set()
        return wait(copies)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "copy_memory", slow)
    monkeypatch.setattr(module, "wait", interrupted)
    threads = CopyingThreads()
    with pytest.raises(KeyboardInterrupt):
        threads.copy(0, 0, 192)
    assert len(num_done) == 3
    threads.close()
