"""The files that another engine's client names are taken over by the front, whatever becomes of the call."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import WeightUpdateError
from headrace.engine.control import terms_of_part
from headrace.engine.foreign_update import add_payload
from headrace.types.foreign import Payload
from headrace.weights.foreign import read_payload
from tests.weights.foreign_payloads import flattened


class Joined:
    """An update that takes nothing before it is told to."""

    def __init__(self) -> None:
        self.is_over = False
        self.asked = asyncio.Event()

    async def end(self) -> None:
        self.is_over = True

    async def add(self, *_: Any, **__: Any) -> None:
        self.asked.set()
        await asyncio.Event().wait()


def share() -> tuple[str, Payload]:
    """What a client sends that has freed its tensors."""
    data = flattened({"a": torch.ones(3)})
    gc.collect()
    return base64.b64encode(data).decode(), read_payload(data)


def names(*payloads: Payload) -> list[str]:
    return [file.handle for each in payloads for file in each.files if (Path("/dev/shm") / file.handle[1:]).exists()]


def add(joined: Joined, *encoded: str, load_format: str | None = "flattened_bucket") -> Any:
    terms = terms_of_part("v", "auto", "keep", 5.0)
    nothing: Any = None
    return add_payload(joined, nothing, encoded, load_format, terms, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("others", "load_format"), [(["%%"], "flattened_bucket"), (["AAAA"], "flattened_bucket"), ([], None)]
)
def test_whatever_is_wrong_with_one_payload_no_name_is_left_of_any(others: list[str], load_format: str | None) -> None:
    async def call() -> None:
        (first, one), (second, other) = share(), share()
        assert len(names(one, other)) == 2
        joined = Joined()
        with pytest.raises(WeightUpdateError):
            await add(joined, first, *others, second, load_format=load_format)
        assert joined.is_over and not names(one, other)

    asyncio.run(call())  # torch opens a socket once
    num_open = len(os.listdir("/proc/self/fd"))
    asyncio.run(call())
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_call_that_is_cancelled_holds_nothing() -> None:
    async def call() -> None:
        encoded, payload = share()
        num_open, joined = len(os.listdir("/proc/self/fd")), Joined()
        for waits in (True, False):  # until the files are taken, and before
            task = asyncio.create_task(add(joined, encoded))
            await asyncio.sleep(0)
            if waits:
                asked = asyncio.ensure_future(joined.asked.wait())
                await asyncio.wait([asked, task], return_when=asyncio.FIRST_COMPLETED)
                assert not task.done(), task.exception()
                assert not names(payload), "nobody needs the name any more"
                assert len(os.listdir("/proc/self/fd")) == num_open + 1
            task.cancel()
            with pytest.raises((asyncio.CancelledError, WeightUpdateError)):
                await task
            assert len(os.listdir("/proc/self/fd")) == num_open and not names(payload)
            encoded, payload = share()

    asyncio.run(call())
