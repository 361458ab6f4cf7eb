"""What an engine held is gone when its `shutdown` returns: no collector of garbage has to come."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import Engine
from headrace.types.errors import HeadraceError
from tests.engine.builders import SETTINGS, shared_memory

NUM_CYCLES = int(os.environ.get("HEADRACE_CLOSINGS", "2"))
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "shares": {"tp_size": 2},
    "stages": {"pp_size": 2},
    "stages-of-two": {"tp_size": 2, "pp_size": 2},
}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held(num_tasks: int = 0) -> tuple[int, list[str], int, set[str], int]:
    """Descriptors, threads, tensors, names and tasks of this process; the last may stay a moment longer than their
    threads, which are over: where there are more than so many they are looked at for a while."""
    num_descriptors = len(os.listdir("/proc/self/fd"))
    threads = sorted(each.name for each in threading.enumerate())
    num_tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    until = time.monotonic() + 2.0
    while len(os.listdir("/proc/self/task")) > num_tasks > 0 and time.monotonic() < until:
        time.sleep(0.01)
    return num_descriptors, threads, num_tensors, shared_memory(), len(os.listdir("/proc/self/task"))


def check_flat(cycle: Any) -> None:
    """What a first one leaves, libraries and pools of threads, is there for good; no later one leaves more."""
    cycle()
    gc.collect()
    before = held()
    found = []
    for _ in range(NUM_CYCLES):
        cycle()
        found.append(held(before[-1]))
    assert found == [before] * NUM_CYCLES


@pytest.mark.parametrize("name", ["alone", "shares", "stages"])
def test_an_engine_that_was_shut_down_holds_nothing(model_folder: Path, name: str) -> None:
    def cycle() -> None:
        with Engine(model_folder, inprocess=True, device="cpu", **LAYOUTS[name], **SETTINGS) as engine:
            engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 3})

    check_flat(cycle)


@pytest.mark.parametrize("name", ["alone", "stages-of-two"])
def test_an_engine_that_could_not_start_holds_nothing(model_folder: Path, tmp_path: Path, name: str) -> None:
    """All ranks have joined by the time that they find a weight missing, those of a stage and the stages."""
    folder = tmp_path / "cut"
    folder.mkdir()
    for each in model_folder.iterdir():
        (folder / each.name).write_bytes(each.read_bytes()[: -4 if each.suffix == ".safetensors" else None])

    def cycle() -> None:
        with pytest.raises(HeadraceError):
            Engine(folder, inprocess=True, device="cpu", **LAYOUTS[name], **SETTINGS)

    check_flat(cycle)
