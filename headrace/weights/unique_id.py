"""The id of an NCCL communicator as a trainer's rank 0 publishes it in its store. Owns the keys and the frame that it
is found in; decodes no objects.

Rank 0 of a group of torch's sets a key to the 128 bytes, when it first uses the group. That of vLLM's
`StatelessProcessGroup` sets one to a serialized ctypes structure of them. That is always the same bytes around the id,
but for the module that the structure is of, which has moved. So it is matched to the last byte, and nothing else is
read.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from headrace.types.errors import RequestError, WeightUpdateError
from headrace.types.weights import Rendezvous

UNIQUE_ID_KEY = "broadcast_from/0/0"
"""Of vLLM's: rank 0, its first broadcast."""

TORCH_KEY = "0"
"""Of torch's: the first communicator, in the part of the store that is the group's."""

NUM_BYTES = 128
_FRAME = re.compile(
    rb"\x80[\x04\x05]\x95(?P<size>.{8})"
    rb"\x8c\x07_ctypes\x94\x8c\x09_unpickle\x94\x93\x94"
    rb"\x8c(?P<length>.)(?P<module>vllm(?:\.[a-z_]+)*\.pynccl_wrapper)\x94\x8c\x0cncclUniqueId\x94\x93\x94"
    rb"}\x94C\x80(?P<id>.{128})\x94\x86\x94\x86\x94R\x94\.",
    re.DOTALL,
)
_HEAD_BYTES = 11  # before what the frame's size counts


def find_unique_id(store: Any, rendezvous: Rendezvous) -> bytes | None:
    """The 128 bytes; None: they are not there yet. `WeightUpdateError` for anything else that is."""
    key = UNIQUE_ID_KEY if rendezvous == "vllm" else TORCH_KEY
    if not store.check([key]):
        return None
    message: bytes = store.get(key)
    if rendezvous == "vllm":
        return read_unique_id(message)
    if len(message) != NUM_BYTES:
        raise WeightUpdateError(f"{len(message)} bytes in the trainer's store are no NCCL id", field="master_address")
    return message


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
