"""Live weights read back by the front. Owns the buffer of a read, which the core fills part by part between steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import msgspec
import numpy as np

from headrace.engine.client import CoreClient
from headrace.ipc import SharedBuffer
from headrace.types.errors import UnavailableError
from headrace.types.messages import GetWeight, WeightPart
from headrace.types.weights import TensorInfo, WeightBytes

PART_BYTES = 8 << 20
"""What travels at once: more than a busy core copies between two steps, and little for the front's loop to take."""


async def read_weight(
    client: CoreClient, name: str, max_rows: int | None = None, check: Callable[[TensorInfo], None] | None = None
) -> WeightBytes:
    """One live tensor, or its first rows, all of one version: an update in between begins the reading again.

    `check` may refuse what the tensor turns out to be. Raises the core's error, `DeadlineError` after the client's
    control timeout, `UnavailableError` when there is no memory for a buffer.
    """
    deadline = time.monotonic() + client.control_timeout
    try:
        buffer = SharedBuffer.create(PART_BYTES)
    except OSError as error:
        raise UnavailableError(f"no shared memory to read weights in: {error}") from None
    with buffer:
        data, stamp, start = memoryview(b""), -1, 0
        while True:
            command = functools.partial(GetWeight, name=name, buffer=buffer.ref, start=start, max_rows=max_rows)
            part = await client.call(command, WeightPart, deadline - time.monotonic())
            if start == 0:
                if check is not None:
                    check(part.info)
                data, stamp = np.empty(part.total, np.uint8).data, part.stamp  # untouched, unlike a bytearray
            elif part.stamp != stamp:
                start = 0
                continue
            data[start : start + part.num_bytes] = buffer.view[: part.num_bytes]
            start += part.num_bytes
            if start == part.total:
                break
    shape = part.info.shape if max_rows is None else (min(max_rows, part.info.shape[0]), *part.info.shape[1:])
    return WeightBytes(msgspec.structs.replace(part.info, shape=shape), data)
