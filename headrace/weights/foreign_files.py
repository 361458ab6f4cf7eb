"""The shared files that a foreign payload names (torch's `file_system` sharing): taking them over from their sender.

Such a file is a regular one of ours directly in /dev/shm, named as torch names them. Its first 64 bytes are torch's
header, which begins with a 32-bit count of who uses the file: whoever counts it down to zero unlinks it. The sender
counts up once more for each time it sends, and the receiver counts that down again, so not to count would keep every
update's memory until the sender ends. `TakenFiles` counts down as soon as it has a file open, in one atomic operation
as torch does: from then on the memory is held by a descriptor, and whatever becomes of us leaves no name. The sender's
torch_shm_manager is never asked: it unlinks what is left when the sender is gone.

Owns descriptors and counts. Must not know tensors, nor what a payload's bytes are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import stat
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import msgspec

from headrace.types.errors import CheckpointError, HeadraceError, WeightUpdateError
from headrace.types.foreign import FIELD, Payload, SharedFile
from headrace.weights.files import OpenFile

HEADER_BYTES = 64
"""Before the values, in a shared file of torch."""

MAX_COUNT = 1 << 20
"""Users of a shared file; a file that says more is none of torch's."""

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"/torch_[0-9]{1,10}_[0-9]{1,20}_[0-9]{1,20}")
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAKE_OP = 5
_ADD = 1 << 28
_OPERAND_SHIFT = 12
_OPERAND_MASK = 0xFFF


class TakenFiles:
    """The shared files of a payload, held open here until `close`. `payload` says where others may open them.

    `WeightUpdateError` where one is not as torch's are; the others are given back then.
    """

    def __init__(self, payload: Payload) -> None:
        self._opened = ExitStack()
        paths: list[str] = []
        problem: HeadraceError | None = None
        for shared, num_sent in Counter(payload.files).items():
            try:
                file = self._opened.enter_context(_shared_file(shared))
            except HeadraceError as error:
                problem = problem or error
                continue
            for _ in range(num_sent):
                _count_down(file)
            paths.append(f"/proc/{os.getpid()}/fd/{file.stream.fileno()}")
        if problem is not None:
            self.close()
            raise problem
        self.payload = msgspec.structs.replace(payload, paths=tuple(paths))

    def close(self) -> None:
        """Nobody opens them any more."""
        self._opened.close()

    def __enter__(self) -> TakenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def count_up(payload: Payload, num_more: int) -> None:
    """Have the files of a payload serve `num_more` receivers beside the one that they were sent to: each counts down.
    Raises as `TakenFiles`, and has counted none then."""
    with ExitStack() as opened:
        files = [(opened.enter_context(_shared_file(each)), n) for each, n in Counter(payload.files).items()]
        for file, num_sent in files:
            with mmap.mmap(file.stream.fileno(), HEADER_BYTES) as header:
                for _ in range(num_sent * num_more):
                    _add(header, 1)


def _shared_file(shared: SharedFile) -> OpenFile:
    """A file of torch's sharing, open and checked."""
    if not _NAME.fullmatch(shared.handle):
        raise refused(shared, "is not named as torch names shared memory")
    path = _FOLDER / shared.handle[1:]
    try:
        file = OpenFile(path, os.open(path, _FLAGS))
    except OSError as error:
        raise refused(
            shared, f"cannot be opened: {error.strerror}. Is its sender on this host, and still there?"
        ) from None
    try:
        _check(shared, os.fstat(file.stream.fileno()))
        if not 1 <= _count(file) <= MAX_COUNT:
            raise refused(shared, f"says that {_count(file)} use it")
    except BaseException:
        file.stream.close()
        raise
    return file


def _check(shared: SharedFile, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise refused(shared, "is not a regular file of this user")
    if found.st_size < HEADER_BYTES + shared.num_bytes:
        raise refused(shared, f"has {found.st_size} bytes, not {HEADER_BYTES} and {shared.num_bytes}")
    if platform.machine() not in _FUTEX_CALLS:
        raise refused(shared, f"cannot be given back on {platform.machine()}")


def _count(file: OpenFile) -> int:
    return int.from_bytes(file.read(0, 4), "little", signed=True)


def _count_down(file: OpenFile) -> None:
    """One user of the file less. The last one takes its name away; its memory goes with the last that has it open."""
    try:
        with mmap.mmap(file.stream.fileno(), HEADER_BYTES) as header:
            _add(header, -1)
        if _count(file) <= 0:
            file.path.unlink(missing_ok=True)
    except (OSError, ValueError, CheckpointError):
        return  # its sender cut it short: there is no count any more


def _add(header: mmap.mmap, number: int) -> None:
    """Atomically, among processes: a futex call that wakes nobody, and changes a word on its way."""
    word = ctypes.c_int32.from_buffer(header)
    at = ctypes.c_void_p(ctypes.addressof(word))
    call = ctypes.c_long(_FUTEX_CALLS[platform.machine()])
    library = ctypes.CDLL(None, use_errno=True)
    change = _ADD | (number & _OPERAND_MASK) << _OPERAND_SHIFT
    failed = library.syscall(call, at, _FUTEX_WAKE_OP, 0, ctypes.c_void_p(0), at, change) < 0
    del word  # which holds the mapping
    if failed:
        raise OSError(ctypes.get_errno(), "futex")


def refused(shared: SharedFile, problem: str) -> WeightUpdateError:
    """The error for a file that cannot be used."""
    return WeightUpdateError(f"shared memory {shared.handle} {problem}", field=FIELD)
