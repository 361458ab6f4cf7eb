"""Settings that come in a thread of their own, and what is prepared beside the import of torch."""
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import subprocess
import sys
import threading
from ctypes import c_int, c_void_p
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

from headrace.config import ResolvedConfig, cuda_driver
from headrace.config.devices import CudaDevice
from headrace.core import awaited_settings
from headrace.core.awaited_settings import AwaitedSettings
from headrace.ipc import PeerClosed
from tests.arch.source import ROOT, child_environment
from tests.core.harness import tiny_config

DEVICE = CudaDevice("H200", 1 << 37, (9, 0), 132, 3)


def on_device() -> ResolvedConfig:
    resolved = tiny_config(kernel_cache="/kernels")
    return msgspec.structs.replace(resolved, device="cuda", cuda=DEVICE, attention_backend="triton")


def test_a_device_is_prepared_once_its_settings_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(
        awaited_settings, "prepare", lambda *given: prepared.append((given, threading.current_thread()))
    )
    sent = threading.Event()

    def receive() -> ResolvedConfig:
        assert sent.wait(10.0)
        return on_device()

    awaited = AwaitedSettings(receive, prepares=True)
    assert not prepared
    sent.set()
    assert awaited.wait() == on_device()
    awaited.wait_prepared()
    [(given, thread)] = prepared
    assert given == (DEVICE, "/kernels") and thread is not threading.current_thread()


def test_nothing_is_prepared_on_a_cpu_nor_for_other_kernels_nor_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awaited_settings, "prepare", lambda *_: pytest.fail("nobody wants that"))
    other = msgspec.structs.replace(on_device(), attention_backend="reference")
    for resolved, prepares in ((tiny_config(), True), (other, True), (on_device(), False)):
        awaited = AwaitedSettings(lambda resolved=resolved: resolved, prepares=prepares)  # type: ignore[misc]
        awaited.wait_prepared()
        assert awaited.wait() == resolved


def test_what_fails_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> ResolvedConfig:
        raise PeerClosed("the front has gone")

    def refuse(*_: object) -> None:
        raise OSError("no driver")

    with pytest.raises(PeerClosed, match="gone"):
        AwaitedSettings(closed, prepares=True).wait()
    monkeypatch.setattr(awaited_settings, "prepare", refuse)
    awaited = AwaitedSettings(on_device, prepares=True)
    assert awaited.wait() == on_device()
    with pytest.raises(OSError, match="no driver"):
        awaited.wait_prepared()


class Driver:
    """Of a device of index 3, whose handle is 7. `init` is what it answers first."""

    def __init__(self, init: int) -> None:
        self.asked: list[Any] = []
        self._init = init

    def cuInit(self, flags: int) -> int:
        self.asked.append(("init", flags))
        return self._init

    def cuDeviceGet(self, device: Any, index: c_int) -> int:
        self.asked.append(("device", index.value))
        device._obj.value = 7
        return 0

    def cuDevicePrimaryCtxRetain(self, context: c_void_p, device: c_int) -> int:
        self.asked.append(("context", device.value))
        return 0


def test_the_context_is_that_which_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")  # what somebody has asked for stays
    for init, asked in ((0, [("init", 0), ("device", 3), ("context", 7)]), (100, [("init", 0)])):
        driver = Driver(init)
        monkeypatch.setattr(cuda_driver, "cuda_driver", lambda driver=driver: driver)
        cuda_driver.open_context(3)
        assert driver.asked == asked


PREPARE = """
import sys
from headrace.config.devices import CudaDevice
from headrace.core import awaited_settings

opened = []
awaited_settings.open_context = opened.append
awaited_settings.prepare(CudaDevice("H200", 1 << 37, (9, 0), 132, 3), sys.argv[1])
assert opened == [3] and "torch" not in sys.modules, "two threads must not import it"
import triton
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime.cache import triton_key

assert triton.knobs.cache.dir.startswith(sys.argv[1])
print(triton_key.cache_info().currsize, get_ptxas_version.cache_info().currsize)
"""


def test_what_names_kernels_is_known_before_the_first_is_looked_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path)],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1 1\n", done.stderr


def test_the_target_is_named_as_triton_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which it finds what it knows of the device."""
    module = MagicMock()
    monkeypatch.setattr(awaited_settings, "open_context", lambda _: None)
    monkeypatch.setattr(awaited_settings, "use_kernel_cache", lambda _: None)
    monkeypatch.setattr("importlib.import_module", lambda _: module)
    awaited_settings.prepare(msgspec.structs.replace(DEVICE, capability=(12, 1)), None)
    module.GPUTarget.assert_called_once_with("cuda", 121, 32)
    module.make_backend.assert_called_once_with(module.GPUTarget.return_value)


@pytest.mark.parametrize("error", [ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError])
def test_a_triton_that_cannot_be_prepared_fails_no_start(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def another(name: str) -> None:
        raise error(f"no {name}")

    monkeypatch.setattr(awaited_settings, "open_context", lambda _: None)
    monkeypatch.setattr(awaited_settings, "use_kernel_cache", lambda _: None)
    monkeypatch.setattr("importlib.import_module", another)
    with caplog.at_level("INFO"):
        awaited_settings.prepare(DEVICE, None)
    assert f"{error.__name__}: no triton" in caplog.text
