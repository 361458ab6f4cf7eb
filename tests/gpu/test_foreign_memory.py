"""CUDA memory of another process, opened from its torch's own bytes and given back."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import torch

from headrace.types.foreign import CudaHandle, Payload
from headrace.weights.foreign_memory import ForeignMemory
from tests.weights.foreign_sender import Sender

BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)
HALF = BASE.to(torch.bfloat16)


@pytest.fixture
def sender() -> Iterator[Sender]:
    found = Sender("cuda")
    yield found
    found.end()


def _expect(payload: Payload, expected: dict[str, torch.Tensor]) -> None:
    with ForeignMemory(payload) as memory:
        found = {}
        for name, data in memory.tensors:
            assert isinstance(data, torch.Tensor) and data.device.type == "cuda"
            found[name] = data.cpu()
        del data
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_tensors_of_another_process_are_read_where_they_are(sender: Sender) -> None:
    payload = sender.send(
        'serialized([("base", base), ("turned", base.t()), ("part", base[1:3, 2:5]), ("half", half)])'
    )
    assert all(isinstance(tensor.storage, CudaHandle) for tensor in payload.tensors)
    _expect(payload, {"base": BASE, "turned": BASE.t(), "part": BASE[1:3, 2:5], "half": HALF})


def test_a_bucket_of_another_process_is_read_where_it_is(sender: Sender) -> None:
    payload = sender.send('flattened({"a": half[:1, :3], "b": base, "none": base[:0], "c": half})')
    _expect(payload, {"a": HALF[:1, :3], "b": BASE, "none": BASE[:0], "c": HALF})


@pytest.mark.parametrize("prefix", ["", "GPU-"])
def test_a_device_may_be_named_by_its_uuid(sender: Sender, prefix: str) -> None:
    (tensor,) = sender.send('serialized([("a", base)])').tensors
    uuid = prefix + str(torch.cuda.get_device_properties(0).uuid)
    storage = msgspec.structs.replace(tensor.storage, device=uuid)
    _expect(Payload((msgspec.structs.replace(tensor, storage=storage),)), {"a": BASE})


def test_the_sender_gets_its_memory_back(sender: Sender) -> None:
    """Each of 100 new buckets is freed there once it was closed here: torch counted it down."""
    sender.ask('serialized([("a", base)])')  # what torch sets up once
    before = int(sender.ask("torch.cuda.memory_allocated()"))
    for _ in range(100):
        _expect(sender.send('serialized([("a", base.repeat(1000, 1))])'), {"a": BASE.repeat(1000, 1)})
    sender.ask("torch.cuda.ipc_collect()")
    assert int(sender.ask("torch.cuda.memory_allocated()")) - before < 2 * BASE.nbytes * 1000
