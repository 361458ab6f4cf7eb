"""Shared buffers: the bytes, who may write, what is refused, and that nothing is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.ipc import SharedBuffer
from headrace.types.errors import RequestError, UnavailableError
from headrace.types.weights import BufferRef
from tests.arch.source import child_environment

READER = """
import hashlib, sys
from headrace.ipc import SharedBuffer
from headrace.types.weights import BufferRef
with SharedBuffer.open(BufferRef(sys.argv[1], int(sys.argv[2]))) as buffer:
    assert buffer.view.readonly
    print(hashlib.sha256(buffer.view).hexdigest())
"""


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_another_process_reads_what_was_written() -> None:
    import hashlib

    data = os.urandom(3_000_001)
    with SharedBuffer.create(len(data)) as buffer:
        buffer.view[:] = data
        found = subprocess.run(
            [sys.executable, "-c", READER, buffer.ref.path, str(buffer.ref.size)],
            capture_output=True, text=True, timeout=60, check=True,
            env=child_environment(),
        )  # fmt: skip
    assert found.stdout.strip() == hashlib.sha256(data).hexdigest()


def test_a_reader_cannot_write_and_sees_later_writes() -> None:
    with SharedBuffer.create(10) as buffer, SharedBuffer.open(buffer.ref) as reader:
        buffer.view[3] = 7
        assert bytes(reader.view) == b"\0\0\0\7\0\0\0\0\0\0"
        with pytest.raises(TypeError):
            reader.view[0] = 1


def test_a_buffer_cannot_shrink_under_its_reader() -> None:
    with SharedBuffer.create(8192) as buffer:
        descriptor = os.open(buffer.ref.path, os.O_RDWR)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


@pytest.mark.parametrize(
    "ref",
    [
        BufferRef("/proc/1/fd/99999", 1),
        BufferRef("/nowhere", 1),
        BufferRef("/dev/zero", 1),
        BufferRef("/tmp", 1),
        BufferRef("a\0b", 1),
    ],
    ids=["descriptor", "path", "device", "folder", "null"],
)
def test_what_is_no_buffer_is_refused(ref: BufferRef) -> None:
    with pytest.raises(RequestError) as caught:
        SharedBuffer.open(ref)
    assert caught.value.field == "buffer"


@pytest.mark.parametrize("size", [0, -1, 101, 1 << 60])
def test_a_wrong_size_is_refused(size: int) -> None:
    with SharedBuffer.create(100) as buffer, pytest.raises(RequestError):
        SharedBuffer.open(BufferRef(buffer.ref.path, size))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_that_has_no_more_to_give_says_so(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Nothing is wrong with the buffer."""

    def fails(*_: object, **__: object) -> int:
        raise OSError(number, "no more")

    with SharedBuffer.create(8) as buffer:
        for module, function in (("os", "open"), ("mmap", "mmap")):
            with monkeypatch.context() as patched:
                patched.setattr(f"headrace.ipc.buffers.{module}.{function}", fails)
                with pytest.raises(UnavailableError, match="no more"):
                    SharedBuffer.open(buffer.ref)
        with SharedBuffer.open(buffer.ref, writable=True) as other:
            other.view[0] = 7
        assert buffer.view[0] == 7


def test_an_empty_buffer_is_refused() -> None:
    with pytest.raises(RequestError):
        SharedBuffer.create(0)


def test_nothing_is_left_open() -> None:
    before = num_descriptors()
    for _ in range(50):
        buffer = SharedBuffer.create(1 << 16)
        reader = SharedBuffer.open(buffer.ref)
        view = reader.view[5:9]
        reader.close()
        buffer.close()
        buffer.close()
        assert bytes(view) == b"\0\0\0\0"  # a view handed out keeps its memory
        view.release()
    assert num_descriptors() == before


def test_a_dropped_buffer_is_closed() -> None:
    num_before = num_descriptors()
    buffer = SharedBuffer.create(100)
    assert num_descriptors() > num_before
    del buffer
    assert num_descriptors() == num_before


@pytest.mark.parametrize("has_proc", [True, False])
def test_an_unnamed_file_stands_in_for_a_memory_file(monkeypatch: pytest.MonkeyPatch, has_proc: bool) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("headrace.ipc.buffers._HAS_PROC", has_proc)
    buffer = SharedBuffer.create(100)
    buffer.view[:3] = b"abc"
    path = Path(os.readlink(buffer.ref.path)) if has_proc else Path(buffer.ref.path)
    assert path.exists() is not has_proc
    with SharedBuffer.open(buffer.ref) as reader:
        assert bytes(reader.view[:4]) == b"abc\0"
    buffer.close()
    assert not path.exists()
