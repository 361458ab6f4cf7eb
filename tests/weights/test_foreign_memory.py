"""Memory of foreign payloads: read from another process's torch, given back to it, and nothing else opened."""

from __future__ import annotations

import base64
import contextlib
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace.types.errors import CheckpointError, WeightUpdateError
from headrace.types.foreign import CudaHandle, ForeignTensor, Payload, SharedFile
from headrace.types.weights import ELEMENT_BYTES, TensorInfo
from headrace.weights import foreign_files
from headrace.weights.foreign import read_payload
from headrace.weights.foreign_files import HEADER_BYTES, TakenFiles
from headrace.weights.foreign_memory import ForeignMemory
from headrace.weights.staging import TensorData, info_of, source_of
from tests.weights.foreign_sender import Sender

BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)
HALF = BASE.to(torch.bfloat16)


@pytest.fixture(scope="module")
def sender() -> Iterator[Sender]:
    found = Sender()
    yield found
    found.end()


def _path(shared: SharedFile) -> Path:
    return Path("/dev/shm") / shared.handle[1:]


def _count(shared: SharedFile) -> int:
    return int.from_bytes(_path(shared).read_bytes()[:4], "little")


def _values(data: TensorData) -> torch.Tensor:
    info = info_of("", data)
    source = source_of(info, data)
    found = torch.empty(source.num_elements, dtype=getattr(torch, info.dtype))
    for start in range(0, source.num_elements, 5):
        part = slice(start, min(start + 5, source.num_elements))
        source.copy(part, found[part])
    return found.reshape(info.shape)


@contextlib.contextmanager
def _opened(payload: Payload) -> Iterator[ForeignMemory]:
    """As the front and the core do it: one takes the files, the other reads them."""
    with TakenFiles(payload) as taken, ForeignMemory(taken.payload) as memory:
        yield memory


def _expect(payload: Payload, expected: dict[str, torch.Tensor]) -> None:
    with _opened(payload) as memory:
        assert [name for name, _ in memory.tensors] == list(expected)
        for name, data in memory.tensors:
            found = _values(data)
            assert found.dtype == expected[name].dtype and torch.equal(found, expected[name]), name
        del data
    assert not memory.tensors


def test_named_tensors_are_what_the_sender_has(sender: Sender) -> None:
    views = {
        "whole": BASE,
        "half": HALF,
        "turned": BASE.t(),
        "part": BASE[1:3, 2:5],
        "rows": BASE[2:],
        "number": BASE[2, 3],
    }
    spelled = '[("whole", base), ("half", half), ("turned", base.t()), ("part", base[1:3, 2:5]), ("rows", base[2:]), '
    spelled += (
        '("number", base[2, 3]), ("none", base[:0]), ("empty", torch.empty(0, 3)), ("wide", base[:, :1].expand(4, 3))]'
    )
    expected = views | {"none": BASE[:0], "empty": torch.empty(0, 3), "wide": BASE[:, :1].expand(4, 3)}
    _expect(sender.send(f"serialized({spelled})"), expected)
    _expect(sender.send(f"serialized({spelled}, 2)"), expected)


def test_a_bucket_is_what_the_sender_has(sender: Sender) -> None:
    payload = sender.send('flattened({"a": half[:1, :3], "b": base, "none": base[:0], "c": half})')
    assert payload.buckets[0].tensors[1].start % 4, "the second is not aligned"
    _expect(payload, {"a": HALF[:1, :3], "b": BASE, "none": BASE[:0], "c": HALF})


def test_bytes_of_each_rank_are_what_the_sender_has(sender: Sender) -> None:
    data = base64.b64decode(sender.ask('local({"a": [b"", serialized(half)], "b": [None, serialized(base)]})'))
    _expect(read_payload(data, rank=1), {"a": HALF, "b": BASE})


def test_a_changed_value_is_seen_and_nothing_of_ours_reaches_the_sender(sender: Sender) -> None:
    sent = sender.send('serialized([("a", kept.setdefault("mine", base.clone())), ("t", kept["mine"].t())])')
    with _opened(sent) as memory:
        assert sender.ask('kept["mine"].mul_(2).sum().item()') == str(float(2 * BASE.sum()))
        (_, plain), (_, turned) = memory.tensors
        assert torch.equal(_values(plain), 2 * BASE)
        assert isinstance(turned, torch.Tensor)
        turned.zero_()  # a copy
        assert sender.ask('kept["mine"].sum().item()') == str(float(2 * BASE.sum()))


def test_the_file_goes_when_the_sender_lets_go_of_it(sender: Sender) -> None:
    payload = sender.send('serialized([("a", kept.setdefault("new", torch.ones(5)))])')
    (shared,) = payload.files
    assert _count(shared) == 2
    with _opened(payload):
        assert _count(shared) == 1, "counted down as soon as it is open"
    sender.ask('kept.pop("new").sum()')
    sender.ask("__import__('gc').collect()")
    assert not _path(shared).exists()


def test_the_file_goes_with_us_when_the_sender_let_go_before(sender: Sender) -> None:
    payload = sender.send('serialized([("a", torch.ones(5))])')
    (shared,) = payload.files
    sender.ask("__import__('gc').collect()")
    assert _count(shared) == 1
    with _opened(payload) as memory:
        assert not _path(shared).exists()
        assert torch.equal(_values(memory.tensors[0][1]), torch.ones(5))


def test_each_sending_is_counted(sender: Sender) -> None:
    payload = sender.send('local({name: [serialized(base)] for name in "abc"})')
    assert len(payload.files) == 3 and len(set(payload.files)) == 1
    assert _count(payload.files[0]) == 4
    _expect(payload, {"a": BASE, "b": BASE, "c": BASE})
    assert _count(payload.files[0]) == 1


def test_what_was_opened_is_given_back_when_the_rest_cannot_be(sender: Sender) -> None:
    spelled = '("a", base), ("b", kept.setdefault("unlinked", half.clone())), ("c", half)'
    payload = sender.send(f"serialized([{spelled}])")
    first, second, third = payload.files
    _path(second).unlink()
    num_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightUpdateError, match="cannot be opened: No such file"):
        TakenFiles(payload)
    assert _count(first) == _count(third) == 1
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_who_took_files_and_closed_them_is_named(sender: Sender) -> None:
    with TakenFiles(sender.send('serialized([("a", base)])')) as taken:
        pass
    with pytest.raises(WeightUpdateError, match="cannot be opened as /proc/") as caught:
        ForeignMemory(taken.payload)
    assert caught.value.field == "serialized_named_tensors"


def test_a_thousand_updates_leave_nothing(sender: Sender) -> None:
    payload = sender.send('serialized([("a", base), ("t", base.t())])')
    (shared,) = payload.files
    num_open = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        with open(_path(shared), "r+b") as file:
            file.write((2).to_bytes(4, "little"))  # as if it were sent again
        with _opened(payload) as memory:
            assert len(memory.tensors) == 2
        assert _count(shared) == 1
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert shared.handle[1:] not in Path("/proc/self/maps").read_text()


# What is not opened.


@pytest.fixture
def shared() -> Iterator[SharedFile]:
    """A file like torch's, of 24 bytes after its header."""
    found = SharedFile("/nowhere", f"/torch_{os.getpid()}_4242_{threading.get_native_id()}", 24)
    _path(found).write_bytes((2).to_bytes(4, "little") + bytes(60) + torch.arange(6.0).numpy().tobytes())
    yield found
    if os.path.lexists(_path(found)):
        _path(found).unlink()


def _payload(shared: SharedFile, shape: tuple[int, ...] = (6,), stride: tuple[int, ...] = (1,)) -> Payload:
    return Payload((ForeignTensor("a", "float32", shape, stride, 0, shared),), files=(shared,))


def _refused(shared: SharedFile) -> str:
    with pytest.raises(WeightUpdateError) as caught:
        TakenFiles(_payload(shared))
    assert caught.value.field == "serialized_named_tensors"
    return caught.value.message


def test_a_file_like_torchs_is_read(shared: SharedFile) -> None:
    _expect(_payload(shared), {"a": torch.arange(6.0)})
    assert _count(shared) == 1


@pytest.mark.parametrize(
    "handle",
    [
        "",
        "/",
        "torch_1_2_3",
        "/other_1_2_3",
        "/torch_1_2",
        "/torch_1_2_3_4",
        "/torch_a_2_3",
        "/torch_1_2_3/../../../etc/passwd",
        "/../etc/passwd",
        "/torch_1_2_3\0",
        "/torch_1_2_3\n",
        "//torch_1_2_3",
        "/torch_1_2_3/x",
        "/torch_1_2_" + "3" * 300,
    ],
)
def test_names_that_torch_does_not_give_are_refused(handle: str) -> None:
    assert "is not named as torch names" in _refused(SharedFile("", handle, 24))


def test_a_file_that_is_gone_is_named(shared: SharedFile) -> None:
    _path(shared).unlink()
    assert f"{shared.handle} cannot be opened" in _refused(shared)


def test_a_link_is_not_followed(shared: SharedFile, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(_path(shared).read_bytes())
    _path(shared).unlink()
    _path(shared).symlink_to(target)
    assert "cannot be opened" in _refused(shared)


def test_what_is_no_regular_file_is_refused(shared: SharedFile) -> None:
    _path(shared).unlink()
    os.mkfifo(_path(shared))
    assert "not a regular file" in _refused(shared)


def test_a_file_of_another_user_is_refused(shared: SharedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "of this user" in _refused(shared)


def test_a_file_shorter_than_said_is_refused(shared: SharedFile) -> None:
    os.truncate(_path(shared), HEADER_BYTES + 23)
    assert "has 87 bytes, not 64 and 24" in _refused(shared)
    assert _count(shared) == 2, "what is refused is not touched"


@pytest.mark.parametrize("count", [0, -1, (1 << 20) + 1, -(1 << 31)])
def test_a_file_with_a_count_that_is_none_is_refused(shared: SharedFile, count: int) -> None:
    data = _path(shared).read_bytes()
    _path(shared).write_bytes(count.to_bytes(4, "little", signed=True) + data[4:])
    assert f"says that {count} use it" in _refused(shared)


def test_a_machine_that_cannot_count_is_named(shared: SharedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "abacus")
    assert "cannot be given back on abacus" in _refused(shared)


@pytest.mark.parametrize("size", [0, 3, 40, 70])
def test_a_file_cut_short_meanwhile_is_an_error_and_no_fault(shared: SharedFile, size: int) -> None:
    with _opened(_payload(shared)) as memory:
        os.truncate(_path(shared), size)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            _values(memory.tensors[0][1])


def test_a_file_cut_short_before_a_strided_view_is_an_error(
    shared: SharedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_files, "_check", lambda shared, found: os.truncate(_path(shared), 70))
    with pytest.raises(CheckpointError, match="changed while it was read"), _opened(_payload(shared, (3, 2), (1, 3))):
        pass


def test_many_count_down_at_once_and_none_is_lost(shared: SharedFile) -> None:
    with open(_path(shared), "r+b") as file:
        file.write((4001).to_bytes(4, "little"))

    def count_down() -> None:
        for _ in range(1000):
            with TakenFiles(_payload(shared)):
                pass

    threads = [threading.Thread(target=count_down) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _count(shared) == 1


def test_a_device_that_is_not_here_is_named() -> None:
    handle = CudaHandle("GPU-0a1b", bytes(64), 24, 0, "/torch_1_2_3", 0, b"", False)
    with pytest.raises(WeightUpdateError, match="device GPU-0a1b is none of the 0 CUDA devices"):
        ForeignMemory(Payload((ForeignTensor("a", "float32", (6,), (1,), 0, handle),)))


def test_dtypes_of_other_kinds_are_named_and_left_to_the_session(shared: SharedFile) -> None:
    for dtype, size in ELEMENT_BYTES.items():
        tensor = ForeignTensor("a", dtype, (24 // size,), (1,), 0, shared)
        strided = ForeignTensor("b", dtype, (2, 24 // size), (0, 1), 0, shared)
        with _opened(Payload((tensor, strided), files=(shared,))) as memory:
            assert [info_of(name, data) for name, data in memory.tensors] == [
                TensorInfo("a", (24 // size,), dtype),
                TensorInfo("b", (2, 24 // size), dtype),
            ]
        _path(shared).write_bytes((2).to_bytes(4, "little") + bytes(HEADER_BYTES - 4 + 24))
