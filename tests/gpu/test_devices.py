"""What the driver says of the devices here is what torch says, and asking leaves this process as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from headrace.config import cuda_devices
from headrace.config.devices import installed_software


def test_the_driver_and_torch_describe_the_same_devices() -> None:
    found = cuda_devices()
    assert len(found) == torch.cuda.device_count() > 0
    for ordinal, device in enumerate(found):
        properties = torch.cuda.get_device_properties(ordinal)
        assert (device.name, device.num_multiprocessors) == (properties.name, properties.multi_processor_count)
        assert device.capability == torch.cuda.get_device_capability(ordinal)
        assert device.total_bytes == pytest.approx(properties.total_memory, rel=0.01)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_devices_are_not_found(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert cuda_devices() == ()


def test_the_build_of_torch_is_one_for_cuda() -> None:
    assert installed_software().torch_cuda == torch.version.cuda is not None


FORK = """
import os
from headrace.config import cuda_devices
assert cuda_devices()
child = os.fork()
if child == 0:
    import torch
    os._exit(int(torch.ones(3, device="cuda").sum().item()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_asked_can_still_fork_one_that_uses_the_device() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3"], done.stderr
