"""Which device, stream and capture mode a runner's thread gets. What only a device shows is in tests/gpu."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from headrace.config import CudaDevice
from headrace.engine.core_host import current_device
from headrace.runner import device_thread
from headrace.types.errors import ConfigError
from tests.core.harness import tiny_config


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of torch and of the driver, by name."""
    found: list[Any] = []

    def noting(name: str) -> Any:
        return lambda *values: found.append((name, *values))

    for name in ("init", "set_device", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, noting(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(device_thread, "_left_streams", functools.cache(lambda device: set()))
    exchange = SimpleNamespace(cuThreadExchangeStreamCaptureMode=lambda mode: found.append(("mode", mode._obj.value)))
    monkeypatch.setattr("ctypes.CDLL", lambda name: exchange)
    return found


def on_cuda(index: int) -> Any:
    device = CudaDevice("any", 1 << 30, (9, 0), 100, index)
    return msgspec.structs.replace(tiny_config(), device="cuda", cuda=device)


def test_a_thread_gets_a_stream_on_which_steps_may_be_captured(calls: list[Any]) -> None:
    device = device_thread.take_device(on_cuda(0), shares_process=False)
    assert device == torch.device("cuda", 0)
    assert calls == [("init",), ("set_device", device), ("set_stream", "a stream of cuda:0")]


def test_in_a_shared_process_it_gets_a_capture_mode_of_its_own_too(calls: list[Any]) -> None:
    device = device_thread.take_device(on_cuda(3), shares_process=True)
    assert device == torch.device("cuda", 3)
    assert calls == [("init",), ("set_device", device), ("set_stream", "a stream of cuda:3"), ("mode", 1)]


def test_a_stream_that_was_left_is_the_next_ones(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And only his: of two cores at once each has one."""
    names = iter(("first", "second", "third"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(names))
    device = torch.device("cuda", 0)
    for _ in range(2):
        device_thread.take_device(on_cuda(0), shares_process=False)
    for left in ("second", "second", "first"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, left=left: left)
        device_thread.leave_device(device)
    for index in (0, 0, 1):
        device_thread.take_device(on_cuda(index), shares_process=False)
    taken = [call[1] for call in calls if call[0] == "set_stream"]
    assert taken[:2] == ["first", "second"] and set(taken[2:4]) == {"first", "second"} and taken[4] == "third"


def test_a_device_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA build"):
        device_thread.take_device(on_cuda(0), shares_process=False)


def test_a_cpu_has_none_of_it(calls: list[Any]) -> None:
    assert device_thread.take_device(tiny_config(), shares_process=True) == torch.device("cpu") and not calls


@pytest.mark.parametrize(("is_initialized", "expected"), [(True, 2), (False, 0)])
def test_the_callers_current_device_is_asked_only_where_torch_uses_one(
    monkeypatch: pytest.MonkeyPatch, is_initialized: bool, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert current_device() == expected
    monkeypatch.delitem(sys.modules, "torch")
    assert current_device() == 0
