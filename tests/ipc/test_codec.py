"""Frames and messages as bytes: whole, in pieces, oversized, and broken in every way."""

from __future__ import annotations

import random
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.ipc.codec import (
    DECODE_ERRORS,
    CommandCodec,
    FrameError,
    FrameReader,
    OutputCodec,
    pack_frame,
    refuse_command,
)
from headrace.types import messages
from headrace.types.errors import ErrorInfo
from headrace.types.foreign import ForeignTensor, Payload, SharedFile
from headrace.types.messages import Abort, Command, CoreReady, Deltas, Finished, Output, Reply, Stage, Submit
from headrace.types.profile import ProfileTerms
from headrace.types.request import Delta, Finish, Request, pack_ids
from headrace.types.sampling_params import LogprobOptions
from headrace.types.weights import BufferEntry, BufferRef, DeviceArea, DeviceRef, TensorInfo

INFO = TensorInfo("model.norm.weight", (4,), "float32")
COMMANDS: list[Command] = [
    Submit((Request(1, "a", pack_ids([1, 2]), 3, 2**64 - 1, logprobs=LogprobOptions(token_ids=(4, 5))),)),
    Abort(()),
    Abort((1, 2), "why"),
    Finished((3,)),
    messages.Pause(1, "keep"),
    messages.Resume(2),
    messages.GiveUp(15, 2),
    messages.BeginUpdate(3, "v", (INFO,), "shadow", "recompute", True, 5.0),
    Stage(4, 1, BufferRef("/proc/1/fd/3", 10), (BufferEntry(0, 0), BufferEntry(1, 4, 8, 4)), deadline=9.25),
    messages.ExtendUpdate(16, 1, (INFO,)),
    messages.StagePayload(
        17, 1, Payload((ForeignTensor("n", "float32", (2,), (1,), 0, SharedFile("m", "/torch_1", 8)),), ()), (0,)
    ),
    messages.JoinGroup(18, "g", "127.0.0.1", 9, 1, 2, "gloo", deadline=1.5),
    messages.LeaveGroup(19, "g"),
    messages.Receive(20, 1, "g", (messages.GroupTensor(INFO, 0), messages.GroupTensor(INFO, -1, True)), 64),
    messages.Discard(21, "g", None, -1, 2.0),
    messages.ReleaseMemory(22, ("weights",), "recompute"),
    messages.SlowDown(26, 0.5),
    messages.FreezeGc(27),
    messages.Profile(28, ProfileTerms("/f", "n", ("CPU",), 3, True, True)),
    messages.Profile(29, None),
    messages.ResumeMemory(23, (), "copy"),
    Stage(24, 1, DeviceRef((DeviceArea(b"\1\0", 8, 64), DeviceArea(b"", 1 << 40, 4))), ()),
    messages.CommitUpdate(5, 1),
    messages.AbortUpdate(6, 1),
    messages.UpdateFromDisk(7, "/m", "v"),
    messages.SetVersion(8, "v"),
    messages.GetWeight(9, "n", BufferRef("/proc/1/fd/3", 64), 8, 2, deadline=5.5),
    messages.GetWeight(26, "p", BufferRef("/proc/1/fd/3", 64), rank=1),
    messages.Digest(10),
    messages.DescribeWeights(27),
    messages.WeightsChecker(11, "snapshot"),
    messages.FlushCache(12),
    messages.GetStatus(13),
    messages.Shutdown(14),
    messages.ExtendUpdate(16, 1, (INFO,)),
    messages.ReleaseMemory(17, ("kv_cache",), "recompute"),
    messages.ResumeMemory(18, ("weights",), "disk"),
]
OUTPUTS: list[Output] = [
    Deltas((Delta(1, pack_ids([7]), b"\0\0\0\0", (("v", 1),), Finish("stop", 7)), Delta(2))),
    Reply(1, b"\xc0"),
    Reply(2, error=ErrorInfo("RequestError", "no", "x")),
    CoreReady(10, 16, 2, (("device", "cpu", "why"),)),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: type(c).__name__)
def test_command_round_trip(command: Command) -> None:
    codec = CommandCodec()
    assert codec.decode(codec.encode(command)) == command


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: type(o).__name__)
def test_output_round_trip(output: Output) -> None:
    codec = OutputCodec()
    assert codec.decode(codec.encode(output)) == output


@given(st.lists(st.binary(max_size=200), max_size=20), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_frames_survive_any_cut_of_the_stream(payloads: list[bytes], chance: random.Random) -> None:
    stream = b"".join(map(pack_frame, payloads))
    reader = FrameReader()
    found: list[bytes] = []
    position = 0
    while position < len(stream):
        size = chance.randint(1, 40)
        found += reader.feed(stream[position : position + size])
        position += size
    assert found == payloads


def test_frame_over_the_bound_is_refused_before_it_is_read() -> None:
    reader = FrameReader(max_frame_bytes=100)
    assert reader.feed(pack_frame(b"x" * 100)) == [b"x" * 100]
    with pytest.raises(FrameError, match="101"):
        reader.feed(struct.pack("<I", 101))


def test_undecodable_call_is_answered_by_its_id() -> None:
    payload = msgspec.msgpack.encode(["pause", 77, "sideways"])
    with pytest.raises(msgspec.ValidationError) as caught:
        CommandCodec().decode(payload)
    (output,) = refuse_command(payload, caught.value)
    assert isinstance(output, Reply)
    assert output.call_id == 77
    assert output.error is not None
    assert output.error.code == "InternalError"
    assert "sideways" in output.error.message


def test_undecodable_submission_ends_each_of_its_requests() -> None:
    payload = msgspec.msgpack.encode(["submit", [[5, "a", "not bytes", 1, 1], [6, "b"], "junk"]])
    (output,) = refuse_command(payload, ValueError("bad prompt"))
    assert isinstance(output, Deltas)
    assert [delta.handle for delta in output.deltas] == [5, 6]
    for delta in output.deltas:
        assert delta.finish is not None
        assert delta.finish.type == "error"
        assert delta.finish.error is not None


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        msgspec.msgpack.encode({"a": 1}),
        msgspec.msgpack.encode(["pause"]),
        msgspec.msgpack.encode(["abort", 5]),
    ],
    ids=["empty", "invalid", "deep", "map", "short", "uncalled"],
)
def test_frames_nobody_waits_for_are_refused_in_silence(payload: bytes) -> None:
    assert refuse_command(payload, ValueError("x")) == []


def test_random_bytes_and_mutations_only_ever_raise_decode_errors() -> None:
    chance = random.Random(5)
    codec = CommandCodec()
    seeds = [codec.encode(command) for command in COMMANDS]
    num_refused = 0
    for _ in range(5000):
        payload = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        try:
            codec.decode(bytes(payload))
        except DECODE_ERRORS as error:
            num_refused += 1
            refuse_command(bytes(payload), error)
    assert num_refused > 1000
