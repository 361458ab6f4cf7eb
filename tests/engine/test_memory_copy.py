"""Copies by several threads: all bytes, none beside them, and never less than done."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from headrace.engine import memory_copy as module
from headrace.engine.memory_copy import CopyingThreads, CopyPart, address_of


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 64)


@pytest.fixture(params=[1, 2, 16])
def any_threads(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[CopyingThreads]:
    yield from started(monkeypatch, request.param)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[CopyingThreads]:
    yield from started(monkeypatch, 4)


def started(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> Iterator[CopyingThreads]:
    monkeypatch.setattr(module, "available_cores", lambda: num_cores)
    found = CopyingThreads()
    found.start()
    yield found
    found.close()


def place_of(source: Any) -> int:
    return int(source.__array_interface__["data"][0])


def test_any_number_of_bytes_arrives_and_no_other_changes(any_threads: CopyingThreads) -> None:
    choose = random.Random(1)
    source = np.frombuffer(choose.randbytes(5000), dtype=np.uint8)
    for _ in range(50):
        size = choose.choice([0, 1, 63, 64, 127, 128, choose.randrange(4000)])
        start, place = choose.randrange(900), choose.randrange(900)
        into, begun = bytearray(b"\7" * 5000), list[CopyPart]()
        any_threads.begin(begun, address_of(memoryview(into)) + place, place_of(source) + start, size)
        any_threads.settle(begun)
        expected = b"\7" * place + source[start : start + size].tobytes() + b"\7" * (5000 - place - size)
        assert bytes(into) == expected and not begun


def test_copies_that_have_begun_are_done_when_settled(monkeypatch: pytest.MonkeyPatch, threads: CopyingThreads) -> None:
    """However many, and beside each other."""
    source = np.frombuffer(random.Random(1).randbytes(8192), dtype=np.uint8)
    into, begun = bytearray(8192), list[CopyPart]()
    may_go, copy = threading.Event(), module.copy_memory
    monkeypatch.setattr(module, "copy_memory", lambda *place: may_go.wait(10.0) and copy(*place))
    for at in range(0, 8192, 512):
        threads.begin(begun, address_of(memoryview(into)) + at, place_of(source) + at, 512)
    assert not any(into) and len(begun) == 48
    may_go.set()
    threads.settle(begun)
    assert bytes(into) == source.tobytes()


def test_threads_are_kept_and_have_ended_when_they_are_closed(threads: CopyingThreads) -> None:
    source, into = np.zeros(1024, dtype=np.uint8), bytearray(1024)
    for _ in range(20):
        begun = list[CopyPart]()
        threads.begin(begun, address_of(memoryview(into)), place_of(source), 1024)
        threads.settle(begun)
    kept = [each for each in threading.enumerate() if each.name == "headrace-copy"]
    assert len(kept) == 3
    threads.close()
    assert not any(each.is_alive() for each in kept)
    threads.start()
    threads.begin(begun, address_of(memoryview(into)), place_of(source), 1024)
    assert not begun, "this thread copies then"


@pytest.mark.parametrize("at", range(6))
def test_who_is_interrupted_while_a_copy_begins_can_wait_for_what_has(
    monkeypatch: pytest.MonkeyPatch, threads: CopyingThreads, at: int
) -> None:
    """Before a thread sees a part, and after."""
    source, into, begun = np.ones(192, dtype=np.uint8), bytearray(192), list[CopyPart]()
    put, calls = threads._parts.put, list[int]()

    class Parts:
        get = threads._parts.get

        def put(self, part: Any) -> None:
            calls.append(1)
            if at % 2:
                put(part)
            if len(calls) - 1 == at // 2:
                raise KeyboardInterrupt
            if not at % 2:
                put(part)

    monkeypatch.setattr(threads, "_parts", Parts())
    with pytest.raises(KeyboardInterrupt):
        threads.begin(begun, address_of(memoryview(into)), place_of(source), 192)
    assert len(begun) == 1 + at // 2
    threads.settle(begun)
    done = 64 * (1 + at // 2)
    assert bytes(into) == b"\1" * done + b"\0" * (192 - done)
    source[:] = 2  # nobody reads it any more, as nobody writes
    time.sleep(0.01)
    assert 2 not in into


def test_who_is_interrupted_while_he_waits_may_wait_again(
    monkeypatch: pytest.MonkeyPatch, threads: CopyingThreads
) -> None:
    source, into, begun = np.ones(192, dtype=np.uint8), bytearray(192), list[CopyPart]()
    may_go, copy = threading.Event(), module.copy_memory
    monkeypatch.setattr(module, "copy_memory", lambda *place: may_go.wait(10.0) and copy(*place))

    def interrupted(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: may_go.wait(0.01))
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    threads.begin(begun, address_of(memoryview(into)), place_of(source), 192)
    with pytest.raises(KeyboardInterrupt):
        threads.settle(begun)
    assert not any(into) and len(begun) == 3
    may_go.set()
    threads.settle(begun)
    assert bytes(into) == b"\1" * 192


def test_what_began_as_the_threads_ended_is_copied_all_the_same(threads: CopyingThreads) -> None:
    source, into, begun = np.ones(192, dtype=np.uint8), bytearray(192), list[CopyPart]()
    threads.close()
    threads._has_started = True  # as one sees it who has looked just before
    threads.begin(begun, address_of(memoryview(into)), place_of(source), 192)
    assert len(begun) == 3 and not any(into)
    threads._has_started = False
    threads.settle(begun)
    assert bytes(into) == b"\1" * 192
