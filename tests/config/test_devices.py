"""What is found on a machine: by a driver that is played here, in the probe's own process, and in torch's files."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headrace.config import CudaDevice, cuda_devices
from headrace.config.cuda_probe import read_devices
from headrace.config.devices import PROBE, installed_software, torch_cuda_of

ANY_LIBRARY = "libc.so.6"
"""Stands for a driver that can be loaded; it has none of a driver's functions."""


class PlayedDriver:
    """The driver API over a list of devices: a call stores its answer where its pointer says and returns a status."""

    def __init__(self, devices: list[tuple[str, int, dict[int, int]]], init_status: int = 0) -> None:
        self.devices = devices
        self.init_status = init_status

    def cuInit(self, flags: int) -> int:
        return self.init_status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: ctypes.c_int) -> int:
        device._obj.value = 100 + ordinal.value  # a handle, which need not be the ordinal
        return 0

    def cuDeviceGetName(self, name: Any, size: ctypes.c_int, device: ctypes.c_int) -> int:
        name.value = self._of(device)[0].encode()[: size.value - 1]
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: ctypes.c_int) -> int:
        total._obj.value = self._of(device)[1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: ctypes.c_int, device: ctypes.c_int) -> int:
        if number.value not in self._of(device)[2]:
            return 1
        value._obj.value = self._of(device)[2][number.value]
        return 0

    def _of(self, device: ctypes.c_int) -> tuple[str, int, dict[int, int]]:
        return self.devices[device.value - 100]


def test_every_device_is_read_in_the_drivers_order() -> None:
    large = ("NVIDIA H200", 150_754_820_096, {75: 9, 76: 0, 16: 132})
    small = ("NVIDIA A10", 24 << 30, {75: 8, 76: 6, 16: 72})
    first, second = read_devices(PlayedDriver([large, small]))
    assert first == {
        "name": "NVIDIA H200",
        "total_bytes": 150_754_820_096,
        "capability": [9, 0],
        "num_multiprocessors": 132,
        "index": 0,
    }
    assert (second["name"], second["capability"], second["index"]) == ("NVIDIA A10", [8, 6], 1)


def test_no_device_is_no_error_but_a_failing_driver_is() -> None:
    assert read_devices(PlayedDriver([], init_status=100)) == []
    assert read_devices(PlayedDriver([])) == []
    with pytest.raises(OSError, match="cuInit answered 999"):
        read_devices(PlayedDriver([], init_status=999))
    with pytest.raises(OSError, match="cuDeviceGetAttribute answered 1"):
        read_devices(PlayedDriver([("odd", 1, {75: 9})]))


def test_without_a_driver_there_is_nothing_and_nothing_is_started(caplog: pytest.LogCaptureFixture) -> None:
    start = time.process_time()
    assert cuda_devices(driver="libno-such-driver.so.1", probe=Path("/does/not/exist")) == ()
    assert time.process_time() - start < 0.3
    assert not caplog.records


def test_what_the_probe_prints_is_what_is_found(tmp_path: Path) -> None:
    device = CudaDevice("NVIDIA H200", 150_754_820_096, (9, 0), 132)
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import json, sys\n"
        f"assert sys.argv[1:] == [{ANY_LIBRARY!r}]\n"
        'print(json.dumps([{"name": "NVIDIA H200", "total_bytes": 150754820096, "capability": [9, 0],'
        ' "num_multiprocessors": 132}]))\n'
    )
    assert cuda_devices(driver=ANY_LIBRARY, probe=probe) == (device,)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (None, "cuInit"),  # the real probe on a library that is no driver
        ("print('no JSON')", "JSON"),
        ("print('[{}]')", "name"),
        ("import os; os.abort()", "exit code -6"),
    ],
)
def test_a_driver_that_cannot_be_asked_is_no_device_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, probe: str | None, reason: str
) -> None:
    script = PROBE if probe is None else tmp_path / "probe.py"
    if probe is not None:
        script.write_text(probe)
    with caplog.at_level(logging.WARNING):
        assert cuda_devices(driver=ANY_LIBRARY, probe=script) == ()
    assert reason in caplog.text


def test_the_probe_needs_the_standard_library_only() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(PROBE), "libno-such-driver.so.1"], capture_output=True)
    assert done.returncode == 1 and b"libno-such-driver" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("cuda: Optional[str] = None", None),
        ("hip: Optional[str] = '6.4'", None),
        ("__version__ = '2.11.0+cu130'", None),
    ],
)
def test_the_build_of_torch_is_read_from_its_version_file(line: str, expected: str | None) -> None:
    assert torch_cuda_of(f"debug = False\n{line}\ngit_version = 'abc'\n") == expected


def test_installed_software_is_found_without_importing_it() -> None:
    script = "import sys, msgspec; from headrace.config.devices import installed_software\n"
    script += "found = installed_software(); assert not {'torch', 'triton', 'flashinfer'} & set(sys.modules)\n"
    script += "sys.stdout.write(msgspec.json.encode(found).decode())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    import torch

    assert found["torch_cuda"] == torch.version.cuda
    assert found["has_triton"] == (importlib.util.find_spec("triton") is not None)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_the_interpreter_of_triton_is_asked_for_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert installed_software().interprets_triton is expected
