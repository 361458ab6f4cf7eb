"""The files of a checkpoint folder: opening them, reading them in pieces, and seeing that they change meanwhile.

Owns paths, descriptors and file states. Nothing is mapped: of a file that is cut short less is read, and nobody faults.
Must not know formats or tensors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from headrace.types.errors import CheckpointError

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a pipe in a file's place must not block us
_MAX_LINKS = 40
WEIGHT_ENDINGS = (".safetensors", ".bin", ".index.json")


class FileState(NamedTuple):
    """What changes when a file is replaced or written."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def changed_ns(self) -> int:
        """When it last changed, in nanoseconds since the epoch."""
        return max(self.mtime_ns, self.ctime_ns)


class OpenFile:
    """One file, open for reading at any place. `path` is for messages."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.stream: BinaryIO = os.fdopen(descriptor, "rb")

    def state(self) -> FileState:
        """As it is now."""
        found = os.fstat(self.stream.fileno())
        return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` (bytes) from `offset` on. `CheckpointError` if the file has become too short, or fails."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.stream.fileno(), [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error}", field=self.path.name) from None
            if count == 0:
                raise changed(self.path)
            done += count

    def read_ahead(self, offset: int, size: int) -> None:
        """Have the system fetch these bytes at once, of which runs are read then: one by one it would wait for each."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is asked, no more
                os.posix_fadvise(self.stream.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, size: int) -> bytes:
        """As `read_into`, as bytes."""
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


class Folder:
    """A folder, looked up anew for every file.

    With a `root` only what lies below that folder is read: every step of a path is opened from its parent, so a link
    that leads out is refused, whoever changes the path meanwhile. Without one, links lead where they lead.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        if root is not None and not path.is_relative_to(root):
            raise CheckpointError(f"{path} is outside {root}", field="path")
        self.path = path
        self._root = root

    def open(self, name: str) -> OpenFile | None:
        """A regular file of the folder; None if there is none of that name. `CheckpointError` if it may not be read."""
        path = self.path / name
        try:
            descriptor = os.open(path, _FLAGS) if self._root is None else open_below(self._root, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be opened: {error}", field=name) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        return OpenFile(path, descriptor)

    def state(self, name: str) -> FileState | None:
        """The state of a regular file of the folder; None if there is none. Raises as `open`."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            return file.state()


def changed(path: Path) -> CheckpointError:
    """The error for a file that is no longer what it was when the reading began."""
    return CheckpointError(f"{path} changed while it was read", field=path.name)


def open_below(root: Path, path: Path) -> int:
    """A descriptor of `path`, reached without leaving `root`, which is opened as it is. Raises `OSError`."""
    pending = list(reversed(path.relative_to(root).parts))
    num_links = 0
    with ExitStack() as opened:
        folders = [_kept(opened, os.open(root, _FLAGS | os.O_DIRECTORY))]
        while pending:
            part = pending.pop()
            if part == "..":
                folders.pop()
                if not folders:
                    raise _outside(path, root)
                continue
            target = _link_target(part, folders[-1])
            if target is None:
                is_last = not pending
                found = os.open(part, _FLAGS | os.O_NOFOLLOW | (0 if is_last else os.O_DIRECTORY), dir_fd=folders[-1])
                if is_last:
                    return found
                folders.append(_kept(opened, found))
                continue
            num_links += 1
            if num_links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if target.is_absolute():
                if not target.is_relative_to(root):
                    raise _outside(path, root)
                target = target.relative_to(root)
                del folders[1:]
            pending += reversed(target.parts)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def _kept(opened: ExitStack, descriptor: int) -> int:
    opened.callback(os.close, descriptor)
    return descriptor


def _link_target(name: str, folder: int) -> PurePath | None:
    """Where a link leads; None for what is no link."""
    try:
        return PurePath(os.readlink(name, dir_fd=folder))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _outside(path: Path, root: Path) -> OSError:
    return OSError(errno.EXDEV, f"{path} leads out of {root}")


def weight_files(folder: str | Path) -> frozenset[tuple[str, int, int, int]]:
    """The weight files in a folder, each with what changes when it is replaced or written. A name that leads nowhere,
    as of a file that has just been removed, is none."""
    found = set()
    for path in Path(folder).iterdir():
        if path.name.endswith(WEIGHT_ENDINGS):
            try:
                status = path.stat()
            except OSError:
                continue
            found.add((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return frozenset(found)
