"""A call of `stage` that several threads copy for, and that fails, or is interrupted at any line: when its caller hears
of it nothing is read any more, and no buffer is lost."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from headrace import Engine, WeightUpdateError
from headrace.engine import memory_copy
from tests.engine.builders import SETTINGS, model_of, named_tensors
from tests.engine.test_dropped_updates import MANIFEST, check_buffers

OLD, NEW = named_tensors(model_of(0)), named_tensors(model_of(1))
TRACED = ("memory_copy.py", "upload_buffers.py")


@pytest.fixture
def engine(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(memory_copy, "PART_BYTES", 256)
    monkeypatch.setattr(memory_copy, "available_cores", lambda: 8)
    with Engine(model_folder, inprocess=False, **SETTINGS) as found:
        yield found


class Reads:
    """Copies that take their time, and how many are under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock, self.num_begun, self.num_done = threading.Lock(), 0, 0
        self._copy = memory_copy.copy_memory
        monkeypatch.setattr(memory_copy, "copy_memory", self)

    def __call__(self, *place: int) -> None:
        with self.lock:
            self.num_begun += 1
        time.sleep(0.002)
        self._copy(*place)
        with self.lock:
            self.num_done += 1


@pytest.mark.parametrize("wrong", ["shape", "name", "twice"])
def test_a_call_that_fails_reads_nothing_any_more(engine: Engine, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    reads = Reads(monkeypatch)
    name, tensor = NEW[1]
    bad = {"shape": (name, tensor[:1]), "name": ("nobody.weight", tensor), "twice": NEW[0]}[wrong]
    session = engine.begin_update("never", MANIFEST, mode="shadow")
    with pytest.raises(WeightUpdateError):
        engine.stage(session, [NEW[0], bad])
    assert reads.num_done == reads.num_begun > 1
    time.sleep(0.02)
    assert reads.num_done == reads.num_begun
    engine.abort_update(session)
    check_buffers(engine)


class InterruptAt:
    """Raises at a line of the modules that copy, as a signal's handler would: the first is number 0."""

    def __init__(self, number: int) -> None:
        self.num_left = number

    def __enter__(self) -> None:
        sys.settrace(self._of_frame)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _of_frame(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._of_line if frame.f_code.co_filename.endswith(TRACED) else None

    def _of_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.num_left -= 1
            if self.num_left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._of_line


def test_a_call_that_is_interrupted_anywhere_loses_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.update_weights_from_tensor(NEW, "new")
    digest = engine.digest()
    reads, number = Reads(monkeypatch), 0
    while True:
        mine = [(name, tensor.clone()) for name, tensor in OLD]
        try:
            with InterruptAt(number):
                engine.update_weights_from_tensor(mine, "old", mode="shadow")
            break
        except KeyboardInterrupt:
            assert reads.num_done == reads.num_begun, f"line {number}"
            for _, tensor in mine:
                tensor.fill_(torch.nan)
        number += 1 + number // 6
    assert number > 300, "there are more lines than that"
    check_buffers(engine)
    engine.update_weights_from_tensor(NEW, "new")
    assert engine.digest() == digest
