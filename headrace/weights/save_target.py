"""What a save is written to: the protocol, and one file of it. Owns what a system's refusal is called.

Must not know tensors' values, engines or deadlines. No method is for an event loop: they block.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from headrace.types.errors import RequestError, UnavailableError
from headrace.weights.saved import Record, SavedFile, WeightFile

_WRONG_PATH = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
    + (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EXDEV)
)


class SaveTarget(Protocol):
    """A place to save to, held for one save. `mark` goes into the names of its files."""

    where: str
    mark: str

    def begin(self, record: Record, files: Sequence[WeightFile]) -> dict[str, SavedFile]:
        """What is to be saved. Returns the files that an interrupted save of it has left whole."""

    def create(self, name: str) -> NewFile:
        """A file that is not there."""

    def note(self, record: Record) -> None:
        """What is whole by now."""

    def finish(self, record: Record, last: Sequence[tuple[str, bytes]]) -> None:
        """All files are whole but the `last`, which are small: let this be what is saved there."""

    def close(self) -> None:
        """Let go of it, whether it was finished or not."""


class NewFile:
    """A file that is being written; what it held is told when it is closed. What fails is renamed by `guard`."""

    def __init__(
        self,
        stream: BinaryIO,
        guard: Callable[[], AbstractContextManager[None]],
        settle: Callable[[BinaryIO], None] | None = None,
    ) -> None:
        """`settle` is called when all is written, before the stream is closed."""
        self._stream = stream
        self._guard = guard
        self._settle = settle
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """More of it."""
        with self._guard():
            self._stream.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> SavedFile:
        """All was written."""
        with self._guard(), self._stream:
            if self._settle is not None:
                self._settle(self._stream)
        return SavedFile(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """It stays as far as it came: nobody takes it for whole."""
        with contextlib.suppress(Exception):  # also of a store's library: nobody wants the file any more
            self._stream.close()


def write_whole(target: SaveTarget, name: str, data: bytes) -> SavedFile:
    """A small file."""
    file = target.create(name)
    try:
        file.write(data)
        return file.close()
    except BaseException:  # whatever it is
        file.abandon()
        raise


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """What the system refuses inside is a `RequestError` where the path is at fault, else `UnavailableError`."""
    try:
        yield
    except OSError as error:
        kind = RequestError if error.errno in _WRONG_PATH else UnavailableError
        raise kind(f"{what} cannot be written: {error.strerror or error}", field="path") from None
