"""The routes of weight sessions, spoken by hand: what a body may be, what may be lent, and what is left of a client."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from headrace import (
    AsyncClient,
    Client,
    DeadlineError,
    Engine,
    UnreachableError,
    UpdateConflictError,
    WeightUpdateError,
    serve,
)
from headrace.client.transport import HttpAnswer, HttpCall, LoopTransport
from headrace.client.uploads import _HEAD_BYTES_PER_PIECE, BUFFER_BYTES, MAX_PIECES, UploadMemory, Uploads
from headrace.engine.tensors import TensorBytes
from headrace.ipc import SharedBuffer
from headrace.ipc.buffers import BorrowedBuffer
from headrace.types.http import (
    BYTES_TYPE,
    LENGTH_BYTES,
    MESSAGE_TYPE,
    TOKEN_BYTES,
    AbortAsk,
    BeginAsk,
    CommitAsk,
    ExtendAsk,
    JoinAsk,
    LendAsk,
    SessionBegun,
    StageHead,
    StageLentAsk,
    TensorPiece,
)
from headrace.types.weights import MAX_TENSORS, BufferEntry, BufferRef, TensorInfo
from tests.client.conftest import CONFIG, CONNECT

NORM = "model.norm.weight"
VALUES = np.arange(32, dtype=np.float32)
OTHER = VALUES[::-1].copy()


class Door:
    """A server's routes, spoken without the client."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/headrace", timeout=60)

    def ask(self, name: str, value: Any) -> httpx.Response:
        return self.http.post(f"/{name}", content=msgspec.msgpack.encode(value), headers={"content-type": MESSAGE_TYPE})

    def begin(self, timeout: float = 60.0, token: bytes = b"") -> SessionBegun:
        manifest = (TensorInfo(NORM, (32,), "float32"),)
        ask = BeginAsk(version="v", manifest=manifest, partial=True, timeout=timeout, token=token)
        reply = self.ask("begin_update", ask)
        assert reply.status_code == 200, reply.text
        return msgspec.msgpack.decode(reply.content, type=SessionBegun)

    def stage(self, session_id: int, pieces: list[TensorPiece], data: bytes) -> httpx.Response:
        return self.http.post("/stage", content=body_of(session_id, pieces, data), headers={"content-type": BYTES_TYPE})

    def commit(self, session_id: int) -> httpx.Response:
        return self.ask("commit", CommitAsk(session_id))


def body_of(session_id: int, pieces: list[TensorPiece], data: bytes) -> bytes:
    head = msgspec.msgpack.encode(StageHead(session_id, tuple(pieces)))
    return len(head).to_bytes(LENGTH_BYTES, "little") + head + data


def told(reply: httpx.Response) -> tuple[int, str, str | None]:
    body = reply.json()
    assert body["error"]["err_type"] == body["err_type"]
    return reply.status_code, body["err_type"], body["param"]


@pytest.fixture
def door(engine: Engine) -> Iterator[Door]:
    opened = Door(serve(engine).url)
    yield opened
    opened.http.close()


def live(engine: Engine) -> list[float]:
    values: list[float] = engine.get_weights_by_name(NORM).tolist()
    return values


def test_a_body_carries_pieces_in_order(door: Door, engine: Engine) -> None:
    begun = door.begin()
    data = VALUES.tobytes()
    assert door.stage(begun.session_id, [TensorPiece(0, 0, 20), TensorPiece(0, 20, 32)], data[:52]).status_code == 200
    assert told(door.commit(begun.session_id))[:2] == (400, "WeightUpdateError")
    assert door.stage(begun.session_id, [TensorPiece(0, 52, 76)], data[52:]).status_code == 200
    report = msgspec.msgpack.decode(door.commit(begun.session_id).content)
    assert report["num_tensors"] == 1 and live(engine) == VALUES.tolist()
    assert told(door.commit(begun.session_id)) == (409, "UpdateConflictError", "session_id")
    assert told(door.stage(begun.session_id, [], b"")) == (409, "UpdateConflictError", "session_id")


@pytest.mark.parametrize(
    ("pieces", "num_bytes", "field"),
    [
        ([TensorPiece(0, 0, 128)], 127, "body"),
        ([TensorPiece(0, 0, 128)], 129, "body"),
        ([TensorPiece(0, 0, 256), TensorPiece(0, 0, -128)], 128, "body"),
        ([TensorPiece(0, 64, 64)], 64, NORM),
        ([TensorPiece(0, 64, 64), TensorPiece(0, 0, 64)], 128, NORM),
        ([TensorPiece(0, 0, 64), TensorPiece(0, 0, 64)], 128, None),
        ([TensorPiece(0, 100, 64)], 64, NORM),
        ([TensorPiece(1, 0, 128)], 128, None),
        ([TensorPiece(-1, 0, 128)], 128, None),
    ],
)
def test_a_wrong_body_is_refused_and_may_be_sent_again(
    door: Door, engine: Engine, pieces: list[TensorPiece], num_bytes: int, field: str | None
) -> None:
    begun = door.begin()
    status, kind, param = told(door.stage(begun.session_id, pieces, bytes(num_bytes)))
    assert (status, kind) == (400, "WeightUpdateError")
    assert field is None or param == field
    assert door.stage(begun.session_id, [TensorPiece(0, 0, 128, replaces=True)], OTHER.tobytes()).status_code == 200
    assert door.commit(begun.session_id).status_code == 200 and live(engine) == OTHER.tolist()


def test_what_is_no_stage_body_is_refused(door: Door) -> None:
    begun = door.begin()
    good = body_of(begun.session_id, [TensorPiece(0, 0, 128)], bytes(128))
    for content, headers, expected in (
        (good, {"content-type": "text/plain"}, (415, "RequestError", "content-type")),
        (iter([good]), {"content-type": BYTES_TYPE}, (400, "RequestError", "content-length")),
        (b"", {"content-type": BYTES_TYPE}, (400, "WeightUpdateError", "body")),
        (b"\xff\xff\xff\xff" + good, {"content-type": BYTES_TYPE}, (413, "RequestTooLargeError", "body")),
        (b"\x03\x00\x00\x00abc", {"content-type": BYTES_TYPE}, (400, "RequestError", "body")),
    ):
        assert told(door.http.post("/stage", content=content, headers=headers)) == expected
    raw = door.http.post("/begin_update", content=b"{}", headers={"content-type": "application/json"})
    assert told(raw) == (415, "RequestError", "content-type")
    assert told(door.ask("begin_update", {"version": "v"})) == (400, "RequestError", "body")
    assert told(door.ask("abort", {"nobody": 1})) == (400, "RequestError", "body")
    assert told(door.ask("abort", {"message": "x" * (2 << 20)})) == (413, "RequestTooLargeError", "body")


def test_a_name_that_no_tensor_has_is_refused_at_every_door(door: Door) -> None:
    named = (TensorInfo("x" * 1025, (32,), "float32"),)
    begun = msgspec.msgpack.decode(
        door.ask("begin_update", BeginAsk(version="v", manifest=None, timeout=60.0)).content, type=SessionBegun
    )
    extend = ExtendAsk(begun.session_id, named)
    join = JoinAsk(manifest=named, version="v", mode="auto", in_flight="drain", timeout=60.0)
    begin = BeginAsk(version="v", manifest=named, timeout=60.0)
    for name, ask in (("extend_update", extend), ("join_update", join), ("begin_update", begin)):
        reply = door.ask(name, ask)
        assert told(reply) == (400, "WeightUpdateError", "manifest") and len(reply.content) < 1000


def test_an_ask_to_begin_is_undone_by_its_token(door: Door, engine: Engine) -> None:
    begun = door.begin(token=b"ours")
    for token in (b"another's", b"not come yet"):
        assert door.ask("abort_update", AbortAsk(token=token)).status_code == 200
        assert engine.status().updating
    assert door.ask("abort_update", AbortAsk(token=b"ours")).status_code == 200
    assert not engine.status().updating
    assert told(door.commit(begun.session_id))[:2] == (409, "UpdateConflictError")
    late = BeginAsk(version="v", manifest=(), partial=True, timeout=60.0, token=b"not come yet")
    assert told(door.ask("begin_update", late)) == (409, "UpdateConflictError", "session_id")
    assert not engine.status().updating


@pytest.mark.parametrize(
    "problem", [asyncio.CancelledError(), UnreachableError("x"), DeadlineError("x"), KeyboardInterrupt()], ids=repr
)
def test_an_answer_that_nobody_hears_leaves_no_session(engine: Engine, problem: BaseException) -> None:
    class Transport(LoopTransport):
        async def send(self, call: HttpCall) -> HttpAnswer:
            answer = await super().send(call)
            if call.name == "begin_update":
                raise problem
            return answer

    async def update() -> None:
        url = serve(engine).url
        async with AsyncClient(url, transport=Transport(url)) as client:
            with pytest.raises(type(problem)):
                await client.update_weights_from_tensor({NORM: OTHER}, "v", partial=True)
            assert not (await client.status()).updating, "nothing is left when the caller goes on"
            await client.abort_update()

    asyncio.run(update())


def test_a_refused_ask_is_not_undone(engine: Engine) -> None:
    """There is nothing, and another's session stays."""
    with Client(serve(engine).url) as client, pytest.raises(UpdateConflictError):
        engine.begin_update("v", [(NORM, (32,), "float32")], partial=True)
        client.update_weights_from_tensor({NORM: OTHER}, "v", partial=True)
    assert engine.status().updating


def test_a_client_that_breaks_off_leaves_its_session_usable(door: Door, engine: Engine) -> None:
    begun = door.begin()
    whole = body_of(begun.session_id, [TensorPiece(0, 0, 128)], VALUES.tobytes())
    for _ in range(4):  # more than there are buffers
        with socket.create_connection(("127.0.0.1", door.http.base_url.port or 0)) as connection:
            head = f"POST /headrace/stage HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(whole)}\r\n"
            connection.sendall(f"{head}content-type: {BYTES_TYPE}\r\n\r\n".encode() + whole[:-60])
            time.sleep(0.05)
    reply = door.stage(begun.session_id, [TensorPiece(0, 0, 128, replaces=True)], OTHER.tobytes())
    assert reply.status_code == 200, reply.text
    assert door.commit(begun.session_id).status_code == 200 and live(engine) == OTHER.tolist()


def test_a_body_that_does_not_come_has_a_deadline(engine: Engine) -> None:
    door = Door(serve(engine, body_timeout=0.3).url)
    begun = door.begin()
    whole = body_of(begun.session_id, [TensorPiece(0, 0, 128)], VALUES.tobytes())
    with socket.create_connection(("127.0.0.1", door.http.base_url.port or 0), timeout=30) as connection:
        head = f"POST /headrace/stage HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(whole)}\r\n"
        connection.sendall(f"{head}content-type: {BYTES_TYPE}\r\n\r\n".encode() + whole[:-60])
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408") and b"DeadlineError" in answer
    assert door.stage(begun.session_id, [TensorPiece(0, 0, 128, replaces=True)], OTHER.tobytes()).status_code == 200
    door.http.close()


def test_lent_memory_is_staged_in_place(door: Door, engine: Engine) -> None:
    begun, memory = door.begin(), UploadMemory(1024)
    memory.shared.view[64 : 64 + 128] = VALUES.tobytes()
    memory.sign(begun.token)
    ref = memory.shared.ref
    number = msgspec.msgpack.decode(door.ask("lend", LendAsk(begun.session_id, ref.path, ref.size)).content)
    beyond = StageLentAsk(begun.session_id, number, (BufferEntry(0, 1024 - 64, 0, 128),))
    assert told(door.ask("stage_lent", beyond))[:2] == (400, "WeightUpdateError"), "the token is no tensor's"
    unknown = StageLentAsk(begun.session_id, 5, ())
    assert told(door.ask("stage_lent", unknown)) == (400, "RequestError", "buffer")
    ours = StageLentAsk(begun.session_id, number, (BufferEntry(0, 64, 0, 128, replaces=True),))
    assert door.ask("stage_lent", ours).status_code == 200
    assert door.commit(begun.session_id).status_code == 200 and live(engine) == VALUES.tolist()
    assert told(door.ask("lend", LendAsk(begun.session_id, ref.path, ref.size)))[0] == 409


def test_only_memory_of_this_user_with_the_token_is_taken(door: Door, tmp_path: Path) -> None:
    begun = door.begin()
    file = tmp_path / "file"
    file.write_bytes(bytes(992) + begun.token)
    plain = open(file, "rb")  # noqa: SIM115
    read_end, write_end = os.pipe()
    unsealed = os.memfd_create("headrace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(unsealed, bytes(992) + begun.token)
    unsigned, signed = SharedBuffer.create(1024), SharedBuffer.create(1024)
    signed.view[992:] = begun.token
    own = f"/proc/{os.getpid()}/fd"
    refused = [
        (str(file), 1024),
        ("/etc/passwd", 1024),
        (f"{own}/{plain.fileno()}", 1024),
        (f"{own}/{read_end}", 1024),
        (f"{own}/{unsealed}", 1024),
        (unsigned.ref.path, 1024),
        (signed.ref.path, 1000),
        (signed.ref.path, 2048),
        (signed.ref.path, TOKEN_BYTES),
        (signed.ref.path, -1),
        (signed.ref.path, 1 << 40),
        (signed.ref.path + "\n", 1024),
        (signed.ref.path.replace("/fd/", "/../self/fd/"), 1024),
        ("/proc/self/fd/" + signed.ref.path.rpartition("/")[2], 1024),
        ("/proc/1/fd/0\0", 1024),
    ]
    num_open = len(os.listdir("/proc/self/fd"))
    for path, size in refused:
        assert told(door.ask("lend", LendAsk(begun.session_id, path, size))) == (400, "RequestError", "buffer"), path
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert door.ask("lend", LendAsk(begun.session_id, signed.ref.path, 1024)).status_code == 200
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert door.ask("lend", LendAsk(begun.session_id, f"{own}/{unsealed}", 1024)).status_code == 200
    for _ in range(6):
        assert door.ask("lend", LendAsk(begun.session_id, signed.ref.path, 1024)).status_code == 200
    assert told(door.ask("lend", LendAsk(begun.session_id, signed.ref.path, 1024)))[2] == "buffer"
    assert door.ask("abort_update", AbortAsk(begun.session_id)).status_code == 200
    assert len(os.listdir("/proc/self/fd")) == num_open, "a session that is over holds no memory"
    plain.close()
    for descriptor in (read_end, write_end, unsealed):
        os.close(descriptor)


def test_a_session_that_nobody_calls_is_forgotten_with_what_was_lent(door: Door, engine: Engine) -> None:
    begun, buffer = door.begin(timeout=0.4), SharedBuffer.create(1024)
    buffer.view[992:] = begun.token
    num_open = len(os.listdir("/proc/self/fd"))
    assert door.ask("lend", LendAsk(begun.session_id, buffer.ref.path, 1024)).status_code == 200
    assert len(os.listdir("/proc/self/fd")) == num_open + 1
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > num_open:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert told(door.commit(begun.session_id)) == (409, "UpdateConflictError", "session_id")
    again = door.begin()
    assert door.stage(again.session_id, [TensorPiece(0, 0, 128)], VALUES.tobytes()).status_code == 200
    assert door.commit(again.session_id).status_code == 200 and live(engine) == VALUES.tolist()


def test_half_an_update_of_one_client_is_not_completed_by_another(
    connect: CONNECT, engine: Engine, model_folder: Path
) -> None:
    first, second = connect(), connect()
    older, newer = (
        list(load_file(folder / "model.safetensors").items()) for folder in (model_folder, model_folder / "newer")
    )
    assert first.update_weights_from_bucket(older[:9], 7) is None
    assert second.update_weights_from_bucket(newer[9:], 7) is None
    report = second.update_weights_from_bucket(newer[:9], 7)
    assert report is not None and report.num_tensors == len(newer)
    assert all(np.array_equal(engine.get_weights_by_name(name).numpy(), each) for name, each in newer)
    assert first.update_weights_from_bucket(older[9:], 7) is None, "a half that is over is not gone on with"
    assert second.update_weights_from_tensor(newer, 8).version == "8"


@pytest.mark.parametrize("max_body_bytes", [2048, 20_000])
@pytest.mark.parametrize("shares_memory", [True, False])
def test_tensors_larger_than_a_body_go_in_pieces(
    connect: CONNECT, model_folder: Path, monkeypatch: pytest.MonkeyPatch, shares_memory: bool, max_body_bytes: int
) -> None:
    """And no road is taken in the other's place."""
    lent: list[BufferRef] = []
    take = BorrowedBuffer.__init__

    def note(self: BorrowedBuffer, ref: BufferRef, token: bytes) -> None:
        take(self, ref, token)
        lent.append(ref)

    monkeypatch.setattr(BorrowedBuffer, "__init__", note)
    client = connect({"shares_memory": shares_memory}, max_body_bytes=max_body_bytes)
    weights = load_file(model_folder / "newer" / "model.safetensors")
    weights = {name: each for name, each in weights.items() if max_body_bytes == 20_000 or "layers.1" in name}
    assert max(tensor.nbytes for tensor in weights.values()) > max_body_bytes
    for _ in range(2):
        assert client.update_weights_from_tensor(weights, "b", partial=True).num_tensors == len(weights)
    assert all(client.get_weights_by_name(name).numpy().tobytes() == each.tobytes() for name, each in weights.items())
    assert len(lent) == (2 if shares_memory else 0), "the memory of a client is lent once to each session"


def test_a_client_whose_memory_is_not_here_sends_bytes(
    connect: CONNECT, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(UploadMemory, "sign", lambda self, token: None)
        for values in (VALUES, OTHER):
            client.update_weights_from_tensor({NORM: values}, "b", partial=True)
            assert live(engine) == values.tolist()
    (memory,) = client.asynchronous._uploads._free
    assert memory.lent_to is None
    client.update_weights_from_tensor({NORM: VALUES}, "b", partial=True)
    assert live(engine) == VALUES.tolist() and memory.lent_to is not None, "each session asks once"


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_stage_that_fails_may_be_repeated(connect: CONNECT, engine: Engine, shares_memory: bool) -> None:
    """What it had sent is replaced; what a call before it had sent is not asked for again."""
    client = connect({"shares_memory": shares_memory}, max_body_bytes=2048)
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    tensor, last = np.full((64, 32), 2.0, np.float32), np.full((32, 64), 3.0, np.float32)

    def breaking() -> Iterator[tuple[str, Any]]:
        yield name, np.full((64, 32), 7.0, np.float32)
        yield other, last  # by now all of the first has been sent
        raise KeyError("the trainer's own")

    manifest = [(NORM, (32,), "float32"), (name, (64, 32), "float32"), (other, (32, 64), "float32")]
    session = client.begin_update("b", manifest, partial=True)
    client.stage(session, {NORM: VALUES})
    with pytest.raises(KeyError):
        client.stage(session, breaking())
    client.stage(session, {name: tensor, other: last})
    with pytest.raises(WeightUpdateError, match=NORM):
        client.stage(session, {NORM: VALUES})
    with pytest.raises(UpdateConflictError):
        connect().stage(session, {name: tensor})
    assert client.commit(session).num_tensors == 3
    assert session.num_bytes_staged == VALUES.nbytes + tensor.nbytes + last.nbytes
    assert engine.get_weights_by_name(name).unique().tolist() == [2.0]


def test_a_head_has_room_in_its_body() -> None:
    memory, data = UploadMemory(1 << 16, max_pieces=3), TensorBytes("tiny", np.zeros(1, np.float32))
    assert [memory.write(index, 0, data, replaces=False) for index in range(4)] == [True, True, True, False]
    memory.clear()
    assert memory.write(0, 0, data, replaces=False)
    largest = TensorPiece(MAX_TENSORS, 1 << 40, BUFFER_BYTES, True)
    for count in (14, MAX_PIECES):
        assert len(body_of(1 << 40, [largest] * count, b"")) <= (count + 2) * _HEAD_BYTES_PER_PIECE


def test_a_session_goes_over_by_another_one(connect: CONNECT) -> None:
    first, second = connect(), connect()
    session = first.begin_update("b", [(NORM, (32,), "float32")], partial=True)
    with pytest.raises(UpdateConflictError):
        second.begin_update("c", [(NORM, (32,), "float32")], partial=True)
    second.abort_update()
    for call in (lambda: first.stage(session, {NORM: VALUES}), lambda: first.commit(session)):
        with pytest.raises(UpdateConflictError):
            call()
    assert second.update_weights_from_tensor({NORM: VALUES}, "c", partial=True).version == "c"


def test_memory_lent_to_a_server_is_lent_again_to_the_next(model_folder: Path) -> None:
    uploads: Uploads | None = None
    for value in (1.0, 2.0):
        # another server at the same address, whose sessions are counted from the start again
        with Engine(model_folder, inprocess=True, **CONFIG) as engine, Client(serve(engine).url) as client:
            uploads = uploads or client.asynchronous._uploads
            uploads._ask, client.asynchronous._uploads = client.asynchronous._stage_part, uploads
            kept = uploads._free[:]
            client.update_weights_from_tensor({NORM: VALUES * value}, "v", partial=True)
            assert np.array_equal(client.get_weights_by_name(NORM).numpy(), VALUES * value)
            assert not kept or uploads._free == kept, "the same memory"
            client.asynchronous._uploads = Uploads(uploads._ask, shares_memory=True)
    assert uploads is not None
    uploads.close()


def test_a_fork_stages_in_memory_of_its_own(connect: CONNECT) -> None:
    client = connect()
    uploads = client.asynchronous._uploads
    client.update_weights_from_tensor({NORM: VALUES}, "v", partial=True)
    kept = uploads._free[0]
    kept.pid += 1  # as in a fork, whose parent has it
    client.update_weights_from_tensor({NORM: OTHER}, "w", partial=True)
    assert kept not in uploads._free and uploads._free[0].pid == os.getpid()
    assert np.array_equal(client.get_weights_by_name(NORM).numpy(), OTHER)
