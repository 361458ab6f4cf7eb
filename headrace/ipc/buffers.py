"""Shared memory without names: bytes one process writes and another maps. Owns descriptors and mappings.

A buffer is an anonymous memory file of its creator, reached by others through `/proc/<pid>/fd/<n>`. The kernel frees it
with its last user, so nothing survives a killed process. It is sealed against resizing: a mapping of it cannot fault.
Where the system has no memory files an already unlinked temporary file takes their place; where it has no `/proc`
either (macOS), the file keeps its name until `close`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hmac
import mmap
import os
import re
import stat
import tempfile

from headrace.types.errors import RequestError, UnavailableError
from headrace.types.weights import BufferRef, DeviceRef

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_LENT_PATH = re.compile(r"/proc/[1-9][0-9]{0,9}/fd/[0-9]{1,9}")
_MEMORY_FILE = "/memfd:headrace"
_HAS_PROC = os.path.isdir("/proc/self/fd")


class SharedBuffer:
    """One mapping of shared bytes. `view` is a flat byte view, writable for the creator, and for others if they ask."""

    def __init__(
        self, descriptor: int, mapping: mmap.mmap, ref: BufferRef, unlink_path: str = "", file: tuple[int, int] = (0, 0)
    ) -> None:
        """`file` tells what was opened from all else that is open: paths may come to name another."""
        self.ref = ref
        self.file = file
        self.view = memoryview(mapping)
        self._mapping: mmap.mmap | None = mapping
        self._descriptor = descriptor
        self._unlink_path = unlink_path

    @property
    def descriptor(self) -> int:
        """The creator's descriptor, for a child to inherit; -1 for others and after `close`."""
        return self._descriptor

    @classmethod
    def create(cls, size: int) -> SharedBuffer:
        """A new buffer of `size` > 0 zero bytes. Raises `OSError` when memory is short."""
        if size <= 0:
            raise RequestError(f"a shared buffer needs at least one byte, got {size}", field="size")
        descriptor, path, unlink_path = _new_descriptor()
        try:
            os.ftruncate(descriptor, size)
            _seal(descriptor)
            mapping = mmap.mmap(descriptor, size)
        except OSError:
            os.close(descriptor)
            if unlink_path:
                os.unlink(unlink_path)
            raise
        return cls(descriptor, mapping, BufferRef(path, size), unlink_path)

    @classmethod
    def open(cls, ref: BufferRef | DeviceRef, *, writable: bool = False) -> SharedBuffer:
        """Map another's buffer for reading, or for writing too.

        Raises `RequestError` (field "buffer") when it is not there, too small or a device's, `UnavailableError` when
        this process is out of descriptors or memory.
        """
        if isinstance(ref, DeviceRef):
            raise RequestError("the buffer is on a device, and what it is for is not", field="buffer")
        try:
            mode = os.O_RDWR if writable else os.O_RDONLY
            descriptor = os.open(ref.path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise _refusal(f"shared buffer {ref.path} cannot be opened: {error}", error) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or ref.size <= 0 or status.st_size < ref.size:
                raise RequestError(f"shared buffer {ref.path} does not hold {ref.size} bytes", field="buffer")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            mapping = mmap.mmap(descriptor, ref.size, access=access)
        except OSError as error:
            raise _refusal(f"shared buffer {ref.path} cannot be mapped: {error}", error) from None
        finally:
            os.close(descriptor)  # the mapping keeps the memory
        return cls(-1, mapping, ref, file=(status.st_dev, status.st_ino))

    def part(self, offset: int, size: int) -> memoryview:
        """These bytes."""
        return self.view[offset : offset + size]

    def close(self) -> None:
        """Give the memory back. Views handed out elsewhere keep it mapped until they go. Idempotent."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with contextlib.suppress(BufferError):
                self.view.release()
                mapping.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._unlink_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._unlink_path)
            self._unlink_path = ""

    def __del__(self) -> None:
        self.close()  # a filler in another thread may end after all who could have closed it

    def __enter__(self) -> SharedBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BorrowedBuffer:
    """Shared memory that a stranger lends, held by a descriptor of ours: `ref` is read through that, so that what its
    owner does with his changes nothing.

    It is taken only if it is a memory file of this user, sealed against shortening, of that size, and ends with
    `token`: who was told the token has written it there, so it is his, and he shares this machine's memory. Raises
    `RequestError` (field "buffer"), in the same words for all that it is not.
    """

    def __init__(self, ref: BufferRef, token: bytes) -> None:
        try:
            if not _LENT_PATH.fullmatch(ref.path) or not os.readlink(ref.path).startswith(_MEMORY_FILE):
                raise OSError
            self._descriptor = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            raise _not_lent(ref) from None
        try:
            status = os.fstat(self._descriptor)
            seals = fcntl.fcntl(self._descriptor, fcntl.F_GET_SEALS)
            end = os.pread(self._descriptor, len(token), ref.size - len(token))
        except OSError:
            self.close()
            raise _not_lent(ref) from None
        is_fixed = bool(seals & fcntl.F_SEAL_SHRINK) and stat.S_ISREG(status.st_mode) and status.st_size == ref.size
        if not is_fixed or status.st_uid != os.geteuid() or not hmac.compare_digest(end, token):
            self.close()
            raise _not_lent(ref)
        self.ref = BufferRef(f"/proc/{os.getpid()}/fd/{self._descriptor}", ref.size)

    def close(self) -> None:
        """Give it back. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _not_lent(ref: BufferRef) -> RequestError:
    message = f"{ref.path} is no shared buffer of {ref.size} bytes that this process may take"
    return RequestError(message, field="buffer")


def _refusal(message: str, error: OSError | ValueError) -> RequestError | UnavailableError:
    """Of a buffer that cannot be had: what was asked for is wrong, or the process has no more of something."""
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        return UnavailableError(message, field="buffer")
    return RequestError(message, field="buffer")


def _new_descriptor() -> tuple[int, str, str]:
    """(descriptor, path that others open, path to unlink at close or "")."""
    if hasattr(os, "memfd_create") and _HAS_PROC:
        descriptor = os.memfd_create("headrace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", ""
    descriptor, path = tempfile.mkstemp(prefix="headrace-")
    if _HAS_PROC:
        os.unlink(path)
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", ""
    return descriptor, path, path


def _seal(descriptor: int) -> None:
    if hasattr(fcntl, "F_ADD_SEALS"):
        with contextlib.suppress(OSError):  # only memory files can be sealed
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
