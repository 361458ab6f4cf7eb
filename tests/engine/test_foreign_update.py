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
from tests.weights.foreign_payloads import cuda_call, flattened, local, serialized


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


class Staged(Joined):
    """An update that has all staged at once; the updater of it keeps the payloads."""

    payloads: list[Payload]

    async def add(self, manifest: Any, terms: Any, stage: Any, **_: Any) -> None:
        self.payloads = []
        await stage(None, range(len(manifest)))

    async def stage_payload(self, session: Any, payload: Payload, indices: Any) -> None:
        self.payloads.append(payload)


def staged(*data: bytes, load_format: str | None = None) -> Payload:
    update: Any = Staged()
    encoded = [base64.b64encode(each).decode() for each in data]
    terms = terms_of_part("v", "auto", "keep", 5.0)
    asyncio.run(add_payload(update, update, encoded, load_format, terms, "cuda"))
    (payload,) = update.payloads
    assert isinstance(payload, Payload)
    return payload


def test_each_rank_has_its_own_payload_where_one_is_in_memory_of_a_device() -> None:
    one, other = torch.ones(3), torch.ones(3)
    handles = [serialized([("a", cuda_call(each, storage_device=index))]) for index, each in enumerate((one, other))]
    payload = staged(*handles)
    (second,) = payload.of_ranks
    assert [tensor.storage.device for each in (payload, second) for tensor in each.tensors] == [0, 1]  # type: ignore[union-attr]
    several = local({"a": [serialized(cuda_call(one)), serialized(cuda_call(one, storage_device=1))]})
    payload = staged(several, several)
    assert [tensor.storage.device for each in (payload, *payload.of_ranks) for tensor in each.tensors] == [0, 1]  # type: ignore[union-attr]
    payload = staged(serialized([("a", one)]), serialized([("a", other)]))
    assert payload.paths and not payload.of_ranks
    payload = staged(serialized([("a", one)]), handles[1])
    assert payload.paths and len(payload.of_ranks) == 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([("b", torch.ones(3))], "rank 1 has other tensors than that of rank 0"),
        ([("a", torch.ones(4))], "rank 1 has other tensors"),
        ([("a", torch.ones(3)), ("b", torch.ones(1))], "rank 1 has other tensors"),
        (None, "rank 1 is of another kind"),
    ],
)
def test_payloads_of_ranks_that_differ_are_refused(other: Any, words: str) -> None:
    second = flattened({"a": torch.ones(3)}) if other is None else serialized([(n, cuda_call(t)) for n, t in other])
    with pytest.raises(WeightUpdateError, match=words) as refusal:
        staged(serialized([("a", cuda_call(torch.ones(3)))]), second)
    assert refusal.value.field == "serialized_named_tensors"
