"""A save to a folder: whole at once, or not at all. Owns the way there.

It is written beside the folder that it replaces, under a hidden name, and changes places with it at the end. So whoever
is interrupted leaves the old one as it was, and what he had written is used by the next save there, or removed. All is
done below one open folder, whatever becomes of the path meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from headrace.types.errors import CheckpointError, RequestError, UpdateConflictError
from headrace.weights.files import OpenFile, open_below
from headrace.weights.save_target import NewFile, write_whole, writing
from headrace.weights.saved import RECORD, Record, SavedFile, WeightFile, hash_of, record_of, shown_record

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


class FolderTarget:
    """The folder `path`, which has no links; with a `root` it is reached without leaving that. A `SaveTarget`.

    What is there already has to be empty, or a save with nothing else in it: the new one takes its place. Raises
    `RequestError` otherwise, and `UpdateConflictError` while another save is written there.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.where, self.mark = str(path), ""
        self._path, self._name = path, path.name
        self._new, self._before = f".{self._name}.headrace-saving", f".{self._name}.headrace-before"
        self._opened: list[int] = []
        if not self._name or path == root:
            raise RequestError(f"{path} is no folder that a save may take the place of", field="path")
        try:
            with writing(self.where):
                self._parent = self._keep(_open_folder(path.parent, root))
                self._recover()
                self._check_replaceable()
                self._folder = self._keep(self._open_new())
                _lock(self._folder, self.where)
                self._check_own()
        except BaseException:  # whatever it is: nobody has this target, to close it
            self.close()
            raise

    def begin(self, record: Record, files: Sequence[WeightFile]) -> dict[str, SavedFile]:
        with writing(self.where):
            found = dict(self._left_files(record, files))
            for name in os.listdir(self._folder):
                if name not in found:
                    _remove(name, self._folder)
        self.note(msgspec.structs.replace(record, files=found))
        return found

    def create(self, name: str) -> NewFile:
        above, _, _ = name.rpartition("/")
        what = f"{self.where}/{name}"
        with writing(what):
            if above:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(above, dir_fd=self._folder)
            stream = os.fdopen(os.open(name, _NEW_FILE, 0o666, dir_fd=self._folder), "wb")
        return NewFile(stream, partial(writing, what), _settle)

    def note(self, record: Record) -> None:
        new = f"{RECORD}.partial"
        with writing(self.where), contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=self._folder)
        write_whole(self, new, shown_record(record))
        with writing(self.where):
            os.rename(new, RECORD, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def finish(self, record: Record, last: Sequence[tuple[str, bytes]]) -> None:
        for name, data in last:
            write_whole(self, name, data)
        self.note(record)
        with writing(self.where):
            os.fsync(self._folder)
            self._replace()
            os.fsync(self._parent)

    def close(self) -> None:
        for descriptor in self._opened:
            os.close(descriptor)
        self._opened.clear()

    def _keep(self, descriptor: int) -> int:
        self._opened.append(descriptor)
        return descriptor

    def _recover(self) -> None:
        """Where a save was interrupted between two renames, the old folder has another name."""
        if _is_there(self._before, self._parent):
            if _is_there(self._name, self._parent):
                _remove(self._before, self._parent)
            else:
                self._rename(self._before, self._name)

    def _check_replaceable(self) -> None:
        """`RequestError` for a folder of which something else would be lost."""
        if not _is_there(self._name, self._parent):
            return
        folder = os.open(self._name, _FOLDER, dir_fd=self._parent)
        try:
            names, known = set(_names_in(folder)), set[str]()
            if RECORD in names:
                with contextlib.suppress(CheckpointError), self._open(RECORD, folder) as file:
                    known = {RECORD, *record_of(file).files}
        finally:
            os.close(folder)
        strange = sorted(names - known)
        if strange:
            message = f"{self._path} holds {strange[0]}, which no save wrote, and which would be lost"
            raise RequestError(f"{message}; name another folder", field="path")

    def _open_new(self) -> int:
        """The folder to write in: a new one, or what an interrupted save has left."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._new, dir_fd=self._parent)
        return os.open(self._new, _FOLDER, dir_fd=self._parent)

    def _check_own(self) -> None:
        """Another save may have put the folder in its place just before it was locked here."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._folder), os.stat(self._new, dir_fd=self._parent)):
                return
        raise _busy(self.where)

    def _left_files(self, record: Record, files: Sequence[WeightFile]) -> Iterator[tuple[str, SavedFile]]:
        """Of an interrupted save of the same weights, the files that are whole."""
        try:
            with self._open(RECORD, self._folder) as file:
                left = record_of(file)
        except (OSError, CheckpointError):
            return
        for wanted in files if left.digests == record.digests else ():
            with contextlib.suppress(OSError, CheckpointError), self._open(wanted.name, self._folder) as file:
                head, saved = wanted.head(), left.files.get(wanted.name)
                if saved is not None and file.read(0, len(head)) == head and hash_of(file) == saved:
                    yield wanted.name, saved

    def _open(self, name: str, folder: int) -> OpenFile:
        return OpenFile(self._path / name, os.open(name, _FILE, dir_fd=folder))

    def _replace(self) -> None:
        """Put what was written in the place of what is there."""
        if not _is_there(self._name, self._parent):
            self._rename(self._new, self._name)
            return
        self._check_replaceable()
        old, rest = self._keep(os.open(self._name, _FOLDER, dir_fd=self._parent)), self._new
        _lock(old, self.where)  # it gets the name under which another save would go on
        if not _exchange(self._new, self._name, self._parent):
            rest = self._before
            self._rename(self._name, rest)
            self._rename(self._new, self._name)
        _remove(rest, self._parent)

    def _rename(self, name: str, new_name: str) -> None:
        os.rename(name, new_name, src_dir_fd=self._parent, dst_dir_fd=self._parent)


def _settle(stream: object) -> None:
    """What was written outlives the machine's end."""
    stream.flush()  # type: ignore[attr-defined]
    os.fsync(stream.fileno())  # type: ignore[attr-defined]


def _open_folder(path: Path, root: Path | None) -> int:
    """A folder, which is made if it is not there."""
    if root is None:
        path.mkdir(parents=True, exist_ok=True)
    if root is None or path == root:
        return os.open(path, _FOLDER)
    above = _open_folder(path.parent, root)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.name, dir_fd=above)
    finally:
        os.close(above)
    return open_below(root, path)


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _names_in(folder: int) -> Iterator[str]:
    """All but the folders in it, as paths."""
    for path, folders, files, here in os.fwalk(".", dir_fd=folder):
        links = [name for name in folders if stat.S_ISLNK(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode)]
        for name in (*files, *links):
            yield os.path.normpath(f"{path}/{name}")


def _remove(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except (IsADirectoryError, PermissionError):  # the latter is what some systems say of a folder
        shutil.rmtree(name, dir_fd=folder)


def _lock(folder: int, where: str) -> None:
    """Have a folder for oneself. Where a file system has no locks, two saves to one place do not know of each other."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(where) from None
    except OSError:
        return


def _busy(where: str) -> UpdateConflictError:
    return UpdateConflictError(f"another save to {where} is under way", field="path")


def _exchange(first: str, second: str, folder: int) -> bool:
    """Have two names change places, at once. False where the system or the file system cannot do so."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(folder, os.fsencode(first), folder, os.fsencode(second), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number))
