"""Every message survives the wire, and nothing outside the closed union is accepted."""

import msgspec
import numpy as np
import pytest

from headrace.types import messages
from headrace.types.messages import Abort, Command, Deltas, Output, Reply, Submit
from headrace.types.request import Delta, Finish, Request, pack_floats, pack_ids, unpack_floats, unpack_ids


def test_requests_and_deltas_round_trip() -> None:
    request = Request(1, "rid", pack_ids([3, 1, 2]), 5, (1 << 64) - 1, stop_token_ids=(9,))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Submit((request,))), type=Command) == Submit((request,))
    delta = Delta(1, pack_ids([4]), pack_floats([-0.5]), (("v", 1),), Finish("stop", 4))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Deltas((delta,))), type=Output) == Deltas((delta,))


def test_packed_arrays_are_exact() -> None:
    np.testing.assert_array_equal(unpack_ids(pack_ids([0, -1, 2**31 - 1])), [0, -1, 2**31 - 1])
    np.testing.assert_array_equal(unpack_floats(pack_floats([-1.5, 0.1])), np.array([-1.5, 0.1], np.float32))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x00",
        b"\xc1",
        msgspec.msgpack.encode(["nothing", 1]),
        msgspec.msgpack.encode({"type": "abort"}),
        msgspec.msgpack.encode(["abort", "x"]),
    ],
)
def test_foreign_frames_are_refused(frame: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
        msgspec.msgpack.decode(frame, type=Command)


def test_commands_and_outputs_do_not_mix() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(Reply(1)), type=Command)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(Abort(None)), type=Output)


def test_every_command_with_a_reply_carries_a_call_id() -> None:
    silent = {"Submit", "Abort", "Finished"}
    for cls in messages.Command.__args__:
        assert ("call_id" in cls.__struct_fields__) == (cls.__name__ not in silent), cls.__name__
