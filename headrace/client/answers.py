"""What a server answers, read. Owns what is told of an answer that is none."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec

from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.errors import UnavailableError, UnreachableError
from headrace.types.http import LENGTH_BYTES, StreamPart

Result = TypeVar("Result")


def read(body: bytes | bytearray, kind: type[Result]) -> Result:
    """A result. `UnavailableError` for what no server of this version answers."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except DECODE_ERRORS as error:
        raise UnavailableError(f"the server's answer cannot be read: {error}", field="url") from None


async def stream_parts(chunks: AsyncGenerator[bytes]) -> AsyncGenerator[StreamPart]:
    """The parts of a streamed answer. `UnreachableError` if it breaks off."""
    rest = bytearray()
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            rest += chunk
            while len(rest) >= LENGTH_BYTES:
                end = LENGTH_BYTES + int.from_bytes(rest[:LENGTH_BYTES], "little")
                if len(rest) < end:
                    break
                part = read(rest[LENGTH_BYTES:end], StreamPart)
                del rest[:end]
                if part.is_last:
                    return
                yield part
    raise UnreachableError("stream: the server's answer broke off")
