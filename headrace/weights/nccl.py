"""One rank of an NCCL communicator, by the library's C interface. Owns what is declared of it; knows no tensors.

torch's backend of that name is not used: it joins no communicator whose id it did not hand round itself, and it ends
the whole process where a rank is lost during a broadcast. None of these calls waits for another rank.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

LIBRARY = "libnccl.so.2"
_IN_PROGRESS = 7
_INT8, _FLOAT32 = 0, 7
_SUM = 0


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * 128),)


class _Config(ctypes.Structure):
    """`ncclConfig_t` as NCCL 2.14 has it: in a later one all other fields have their defaults then."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )

    @classmethod
    def that_does_not_wait(cls) -> _Config:
        return cls(ctypes.sizeof(cls), 0xCAFEBEEF, 21400, 0)


_COMMUNICATOR, _ADDRESS, _STREAM = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ncclCommInitRankConfig": (_ADDRESS, ctypes.c_int, _UniqueId, ctypes.c_int, _ADDRESS),
    "ncclCommGetAsyncError": (_COMMUNICATOR, _ADDRESS),
    "ncclCommAbort": (_COMMUNICATOR,),
    "ncclBroadcast": (_ADDRESS, _ADDRESS, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMMUNICATOR, _STREAM),
    "ncclAllReduce": (_ADDRESS, _ADDRESS, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMMUNICATOR, _STREAM),
    "ncclGetErrorString": (ctypes.c_int,),
    "ncclGetLastError": (_COMMUNICATOR,),
}


@functools.cache
def nccl_library() -> Any:
    """The one that torch has loaded. Raises `OSError` where there is none."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # not every machine lets processes share multicast memory
    library = ctypes.CDLL(LIBRARY)
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    library.ncclGetErrorString.restype = library.ncclGetLastError.restype = ctypes.c_char_p
    return library


class NcclRank:
    """Rank `rank` of the `num_ranks` that have one id, on the device that is current. Its calls begin something, which
    is enqueued once `is_idle`; each raises `RuntimeError` with what NCCL says where the communicator has failed."""

    def __init__(self, unique_id: bytes, rank: int, num_ranks: int) -> None:
        """Begin to join."""
        self._library = nccl_library()
        self._handle = ctypes.c_void_p()
        self._config = _Config.that_does_not_wait()
        there = ctypes.byref(self._handle), num_ranks, _UniqueId.from_buffer_copy(unique_id), rank
        self._check(self._library.ncclCommInitRankConfig(*there, ctypes.byref(self._config)))

    def is_idle(self) -> bool:
        """What was begun is enqueued, or done where no stream is given."""
        state = ctypes.c_int()
        self._check(self._library.ncclCommGetAsyncError(self._handle, ctypes.byref(state)))
        self._check(state.value)
        return state.value != _IN_PROGRESS

    def receive(self, address: int, size: int, stream: int) -> None:
        """Rank 0's next broadcast, of so many bytes."""
        self._check(self._library.ncclBroadcast(address, address, size, _INT8, 0, self._handle, stream))

    def sum_floats(self, address: int, count: int, stream: int) -> None:
        """The sum over all ranks of so many float32, in place."""
        self._check(self._library.ncclAllReduce(address, address, count, _FLOAT32, _SUM, self._handle, stream))

    def abort(self) -> None:
        """Leave, whatever is under way; the device stops with it soon. No other call comes after. Idempotent."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        self._library.ncclCommAbort(handle)

    def _check(self, result: int) -> None:
        if result not in (0, _IN_PROGRESS):
            words = self._library.ncclGetErrorString(result), self._library.ncclGetLastError(None)
            kind, detail = (word.decode(errors="replace").strip() if word else "" for word in words)
            raise RuntimeError(f"NCCL: {kind}" + (f" ({detail})" if detail else ""))
