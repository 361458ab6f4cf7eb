"""A server that stands for `headrace serve` with weights: they are a label, which every token that it makes has.
Tokens are made one by one, each a function of prompt, seed and position.

`python -m tests.cluster.weighted PORT` is one as a process.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace.types.carried import CarriedBefore, CarriedPart, Piece
from headrace.types.generation import Generation
from headrace.types.http import framed
from headrace.types.weights import SaveReport, UpdateReport
from tests.arch.source import ROOT, child_environment
from tests.cluster.replica import FakeReplica, Headers

TOKEN_SECONDS = 0.002
SAVED = "version"
END = b"data: [DONE]\n\n"


def token_at(prompt: list[int], seed: int, position: int) -> int:
    """The token that follows `position` ids of which `prompt` is the beginning."""
    return (31 * sum(prompt) + 17 * seed + 7 * position * position) % 9973


class WeightedReplica(FakeReplica):
    """An update fails at the port that it says (`fails_at`)."""

    async def _answer(self, writer: asyncio.StreamWriter, target: str, body: bytes, headers: Headers) -> bool:
        path = target.partition("?")[0]
        if path == "/generate":
            return await self._generate(writer, body, headers)
        if path == "/update_weights_from_disk":
            asked = json.loads(body)
            await asyncio.sleep(asked.get("seconds", 0.01))
            if asked.get("fails_at") == self.port:
                await self._reply(writer, 400, {"message": "no", "retryable": False, "err_type": "WeightUpdateError"})
                return True
            self.weight_version = asked["weight_version"]
            report = {"version": self.weight_version, "epoch": 1}
            await self._reply(writer, 200, {"success": True, "report": report})
        elif path == "/headrace/save_model":
            folder = Path(msgspec.msgpack.decode(body)["path"])
            folder.mkdir()
            (folder / SAVED).write_text(self.weight_version)
            await self._packed(writer, SaveReport(str(folder), self.weight_version, 1, 1, 1, 1))
        elif path == "/headrace/update_weights_from_disk":
            self.weight_version = (Path(msgspec.msgpack.decode(body)["path"]) / SAVED).read_text()
            await self._packed(writer, UpdateReport(self.weight_version, 1, 1, 1, "shadow", 0.0))
        else:
            await self._reply(writer, 200, {"path": target})
        return True

    async def _packed(self, writer: asyncio.StreamWriter, value: Any) -> None:
        data = msgspec.msgpack.encode(value)
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        await writer.drain()

    async def _generate(self, writer: asyncio.StreamWriter, body: bytes, headers: Headers) -> bool:
        carry, before = headers.get("x-headrace-carry", ""), CarriedBefore([], 0.0, "", 0, 0)
        if size := int(headers.get("x-headrace-continues", "0")):
            before, body = msgspec.msgpack.decode(body[:size], type=CarriedBefore), body[size:]
        asked = json.loads(body)
        params, ids, num_before = asked["sampling_params"], asked["input_ids"], asked.get("num_output_ids_in_prompt", 0)
        prompt, seed = ids[: len(ids) - num_before], params.get("sampling_seed", self.port)
        is_stream = asked.get("stream")
        is_incremental = is_stream and asked.get("incremental_streaming_output")
        made: list[int] = []
        spans: list[list[Any]] = []
        for packed in before.pieces:
            _, piece = msgspec.msgpack.decode(packed, type=Piece)
            made, seed = made + piece.token_ids, piece.seed
            for version, count in piece.version_spans:
                spans = with_span(spans, version, count)
        first, told = len(made), dict[str, Any]()
        if is_stream and is_incremental:
            made, spans = [], []
        kind = "stream" if is_stream else "whole" if carry == "all" else ""
        if kind:
            await self._begin(writer, kind if carry else "")
        for number in range(first + 1, params["max_new_tokens"] + 1):
            await asyncio.sleep(params.get("token_seconds", TOKEN_SECONDS))
            made.append(token_at(prompt, seed, len(ids) + number - 1))
            spans = with_span(spans, self.weight_version, 1)
            is_last = number == params["max_new_tokens"]
            told = self._told(asked, made, spans, seed, number, before.num_moves, is_last=is_last)
            if not kind and is_last:
                await self._reply(writer, 200, told)
            elif kind:
                event = b"data: %b\n\n" % json.dumps(told).encode() if is_stream else b""
                await self._part(writer, CarriedPart(event, 1, self._piece(made[-1], seed)) if carry else event)
            if is_incremental:
                made, spans = [], []
        if kind == "stream":
            await self._part(writer, CarriedPart(END, is_last=True) if carry else END)
        elif kind:
            head = {"content-type": "application/json"}
            await self._part(writer, CarriedPart(json.dumps(told).encode(), status=200, headers=head, is_last=True))
        if kind:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return True

    async def _begin(self, writer: asyncio.StreamWriter, carried: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        if carried:
            writer.write(f"X-Headrace-Carried: {carried}\r\n".encode())
        writer.write(b"X-Headrace-Instance: %b\r\ntransfer-encoding: chunked\r\n\r\n" % self.instance.encode())

    def _piece(self, token: int, seed: int) -> bytes:
        made: dict[str, Any] = {"token_ids": [token], "logprobs": [-0.5], "version_spans": [(self.weight_version, 1)]}
        piece = Generation(request_id="own", version_epochs=[1], seed=seed, **made)
        return msgspec.msgpack.encode((0, msgspec.structs.astuple(piece)))

    def _told(
        self,
        asked: dict[str, Any],
        made: list[int],
        spans: list[list[Any]],
        seed: int,
        number: int,
        num_moves: int,
        *,
        is_last: bool,
    ) -> dict[str, Any]:
        meta = {
            **({"num_resumed": num_moves} if num_moves else {}),
            "id": asked.get("rid", "own"),
            "finish_reason": {"type": "length", "length": number} if is_last else None,
            "prompt_tokens": len(asked["input_ids"]),
            "completion_tokens": number,
            "weight_version": self.weight_version,
            "version_spans": spans,
            "version_epochs": [1] * len(spans),
            "seed": seed,
        }
        if asked.get("return_logprob"):
            meta["output_token_logprobs"] = [[-0.5, token, None] for token in made]
            meta["output_token_logprobs_length"] = len(made)
        return {"text": "".join(f"<{token}>" for token in made), "output_ids": made, "meta_info": meta}

    async def _part(self, writer: asyncio.StreamWriter, part: CarriedPart | bytes) -> None:
        data = part if isinstance(part, bytes) else framed(msgspec.msgpack.encode(part))
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()


def with_span(spans: list[list[Any]], version: str, count: int) -> list[list[Any]]:
    if spans and spans[-1][0] == version:
        return [*spans[:-1], [version, spans[-1][1] + count]]
    return [*spans, [version, count]]


class WeightedServer:
    """One as a process, as a fleet has it."""

    def __init__(
        self,
        model: str,
        config: Mapping[str, Any],
        words: Sequence[str] = (),
        *,
        port: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "tests.cluster.weighted", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=child_environment())
        self.pid = self.process.pid

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def wait_started(self, timeout: float) -> str:
        assert self.process.stdout is not None
        return f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


async def serve_for_ever(port: int) -> None:
    replica = WeightedReplica()
    replica.instance = secrets.token_hex(8)
    await replica.start(port)
    print(replica.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve_for_ever(int(sys.argv[1])))
