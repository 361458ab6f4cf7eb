"""The frame of NCCL's id in vLLM's store."""

from __future__ import annotations

import base64
import ctypes
import pickle
import random
import sys
import types
import unittest.mock
from typing import Any

import pytest

from headrace import RequestError, WeightUpdateError
from headrace.weights.unique_id import decode_unique_id, read_unique_id

MODULE = "vllm.distributed.device_communicators.pynccl_wrapper"
ID = bytes(range(128))


def pickled(value: bytes, module: str = MODULE, protocol: int = 4) -> bytes:
    """What vLLM's trainer publishes: the pickle of its structure."""
    kind: Any = type("ncclUniqueId", (ctypes.Structure,), {"_fields_": [("internal", ctypes.c_byte * 128)]})
    kind.__module__ = module
    parts = module.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    with unittest.mock.patch.dict(sys.modules, {name: types.ModuleType(name) for name in names}):
        sys.modules[module].ncclUniqueId = kind  # type: ignore[attr-defined]
        return pickle.dumps(kind.from_buffer_copy(value), protocol)


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("module", [MODULE, "vllm.backends.distributed.device_communicators.pynccl_wrapper"])
def test_an_id_is_found(module: str, protocol: int) -> None:
    message = pickled(ID, module, protocol)
    assert read_unique_id(message) == ID
    if module == MODULE and protocol == 4:
        assert len(message) == 247


def test_nothing_but_its_frame_is_taken() -> None:
    message, chance = pickled(ID), random.Random(1)
    start = message.index(ID)
    others = [
        b"",
        message[:-1],
        message + b".",
        ID,
        pickle.dumps(ID),
        pickle.dumps({}),
        pickled(ID, "others.pynccl_wrapper"),
    ]
    for at in [*range(start), *range(start + 128, len(message))]:
        for bit in range(8):
            others.append(message[:at] + bytes([message[at] ^ 1 << bit]) + message[at + 1 :])
    for _ in range(2000):
        cut = sorted(chance.sample(range(len(message)), 2))
        others.append(message[: cut[0]] + message[cut[1] :])
    for other in others:
        if other[:2] == b"\x80\x05" or len(other) == len(message) and other[11:] == message[11:]:
            continue  # the other protocol, whose frame is the same
        try:
            found = read_unique_id(other)
        except WeightUpdateError as error:
            assert error.field == "master_address"
        else:
            assert found == ID and b"vllm" in other, "another name of a module of theirs"


def test_an_id_in_base64_has_its_size() -> None:
    assert decode_unique_id(base64.b64encode(ID).decode(), "x") == ID
    for wrong in ("", "AAAA", "not base64", 5, None, base64.b64encode(ID + b"x").decode()):
        with pytest.raises(RequestError) as caught:
            decode_unique_id(wrong, "x")
        assert caught.value.field == "x"
