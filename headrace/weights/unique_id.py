"""The id of an NCCL communicator as vLLM's trainers publish it. Owns the frame that it is found in; decodes no objects.

Rank 0 of vLLM's `StatelessProcessGroup` sets a key of its store to a serialized ctypes structure of 128 bytes. That is
always the same bytes around the id, but for the module that the structure is of, which has moved. So it is matched to
the last byte, and nothing else is read.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from headrace.types.errors import RequestError, WeightUpdateError

UNIQUE_ID_KEY = "broadcast_from/0/0"
"""Rank 0, its first broadcast."""

NUM_BYTES = 128
_FRAME = re.compile(
    rb"\x80[\x04\x05]\x95(?P<size>.{8})"
    rb"\x8c\x07_ctypes\x94\x8c\x09_unpickle\x94\x93\x94"
    rb"\x8c(?P<length>.)(?P<module>vllm(?:\.[a-z_]+)*\.pynccl_wrapper)\x94\x8c\x0cncclUniqueId\x94\x93\x94"
    rb"}\x94C\x80(?P<id>.{128})\x94\x86\x94\x86\x94R\x94\.",
    re.DOTALL,
)
_HEAD_BYTES = 11  # before what the frame's size counts


def read_unique_id(message: bytes) -> bytes:
    """The 128 bytes. `WeightUpdateError` for anything that is not exactly such a message."""
    found = _FRAME.fullmatch(message)
    if found is not None:
        size, length = int.from_bytes(found["size"], "little"), found["length"][0]
        if size == len(message) - _HEAD_BYTES and length == len(found["module"]):
            return found["id"]
    what = f"{len(message)} bytes at {UNIQUE_ID_KEY} of the trainer's store are no NCCL id as vLLM writes it"
    raise WeightUpdateError(what, field="master_address")


def decode_unique_id(encoded: Any, field: str) -> bytes:
    """The 128 bytes of an id that came as base64."""
    try:
        found = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError, binascii.Error):
        found = b""
    if len(found) != NUM_BYTES:
        raise RequestError(f"{field} must be {NUM_BYTES} bytes as base64", field=field)
    return found
