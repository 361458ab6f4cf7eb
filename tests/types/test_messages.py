"""Every message survives the wire, and nothing outside the closed union is accepted."""

from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.types import messages
from headrace.types.messages import Abort, Command, Deltas, Output, Reply, Submit
from headrace.types.request import (
    Delta,
    Finish,
    Request,
    TokenSampling,
    pack_ids,
    unpack_floats,
    unpack_ids,
)
from headrace.types.sampling_params import LogprobOptions
from tests.types.packing import pack_floats


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
        msgspec.msgpack.decode(msgspec.msgpack.encode(Abort(())), type=Output)


def test_every_command_with_a_reply_carries_a_call_id() -> None:
    silent = {"Submit", "Abort", "Finished"}
    for cls in messages.Command.__args__:
        assert ("call_id" in cls.__struct_fields__) == (cls.__name__ not in silent), cls.__name__


def test_requests_that_share_their_parameters_travel_once() -> None:
    """Samples and prompts of a call: one long prompt, one bias, one list of stop ids on the wire and in the core."""
    sampling = TokenSampling(logit_bias=tuple((token, 1.0) for token in range(4000)))
    stops, options, prompts = tuple(range(1000)), LogprobOptions(token_ids=tuple(range(500))), [bytes(4000), bytes(8)]
    shared: dict[str, Any] = {"sampling": sampling, "stop_token_ids": stops, "logprobs": options}
    requests = [Request(handle, f"r{handle}", prompts[handle // 50], 8, handle * 7, **shared) for handle in range(100)]
    other = Request(100, "r100", prompts[1], 8, 5, **{**shared, "sampling": TokenSampling(0.5)})
    requests += [other, msgspec.structs.replace(other, handle=101, max_new_tokens=9)]
    data = msgspec.msgpack.encode(Submit.of(requests))
    assert len(data) < 2 * len(msgspec.msgpack.encode(Submit((requests[0],))))
    sent = msgspec.msgpack.decode(data, type=Command)
    assert isinstance(sent, Submit)
    found = list(sent.all_requests())
    assert found == requests
    assert all(each.sampling is found[0].sampling for each in found[:100])
    assert all(each.prompt is found[0].prompt for each in found[:50])
    assert list(Submit(tuple(requests)).all_requests()) == requests
