"""What another engine's client shares, staged on one replica: whatever comes of it, nothing holds the memory then."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.core.commands import stage_payload
from headrace.core.fake_executor import FreeExecutor, FreeWeights
from headrace.types.foreign import Payload
from headrace.types.messages import AbortUpdate, CommitUpdate, Digest, ExtendUpdate, GiveUp, StagePayload
from headrace.types.weights import UpdateReport
from headrace.weights.foreign import read_payload
from headrace.weights.foreign_files import TakenFiles
from tests.core.harness import VOCAB_SIZE, Core, digest_of, new_tensors
from tests.weights.foreign_payloads import flattened, serialized

NEW = new_tensors(3.0)
FORMS: list[Callable[[dict[str, torch.Tensor]], bytes]] = [flattened, lambda sent: serialized(list(sent.items()))]


def share(form: Callable[[dict[str, torch.Tensor]], bytes], tensors: dict[str, torch.Tensor]) -> Payload:
    """A payload whose sender has freed its tensors, and whose files the front has taken."""
    sent = read_payload(form({name: tensor.clone() for name, tensor in tensors.items()}))
    gc.collect()
    taken = TakenFiles(sent)
    assert taken.payload.paths and not any((Path("/dev/shm") / file.handle[1:]).exists() for file in sent.files)
    fronts.append(taken)
    return taken.payload


fronts: list[TakenFiles] = []


@pytest.fixture(autouse=True)
def front() -> Iterator[None]:
    """Holds files until a test is over."""
    yield
    for taken in fronts:
        taken.close()
    fronts.clear()


def is_held(payload: Payload) -> bool:
    """By anybody but the front."""
    names = [os.readlink(path) for path in payload.paths]
    num_open = sum(_link(f"/proc/self/fd/{number}") in names for number in os.listdir("/proc/self/fd"))
    return num_open > len(names)


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def begin(core: Core, payload: Payload, mode: str) -> int:
    session = core.begin_open(mode)
    core.call(ExtendUpdate, session, tuple(payload.manifest()), kind=Any)
    return session


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_a_payload_is_staged_and_let_go_of(form: Any, mode: str) -> None:
    core = Core()
    for value in (3.0, 4.0):
        tensors = new_tensors(value)
        payload = share(form, tensors)
        session = begin(core, payload, mode)
        core.call(StagePayload, session, payload, tuple(range(5)))
        assert not is_held(payload)
        core.call(CommitUpdate, session, kind=UpdateReport)
        assert core.call(Digest, kind=dict[str, str]) == {name: digest_of(tensor) for name, tensor in tensors.items()}


def test_a_tensor_that_comes_again_replaces_the_first() -> None:
    core = Core()
    session = begin(core, share(flattened, NEW), "shadow")
    for value, replaced in ((4.0, ()), (3.0, (0, 1, 2, 3, 4))):
        core.call(StagePayload, session, share(flattened, new_tensors(value)), tuple(range(5)), replaced)
    core.call(CommitUpdate, session, kind=UpdateReport)
    assert core.call(Digest, kind=dict[str, str]) == {name: digest_of(tensor) for name, tensor in NEW.items()}


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_the_session_is_refused_and_let_go_of(form: Any) -> None:
    core = Core()
    session = begin(core, share(form, NEW), "shadow")
    for indices, field in (((0, 1, 2, 3), "indices"), ((0, 1, 2, 3, 3), "indices"), ((0, 1, 2, 3, 9), "index")):
        payload = share(form, NEW)
        error = core.refused(StagePayload, session, payload, indices)
        assert (error.code, error.field) == ("WeightUpdateError", field)
        assert not is_held(payload)
    payload = share(form, NEW)
    error = core.refused(StagePayload, session, payload, (1, 0, 2, 3, 4))  # a tensor in another's place
    assert "the manifest says" in error.message and not is_held(payload)


def test_memory_that_nobody_holds_any_more_is_refused() -> None:
    core = Core()
    payload = share(flattened, NEW)
    session = begin(core, payload, "shadow")
    fronts.pop().close()
    error = core.refused(StagePayload, session, payload, tuple(range(5)))
    assert error.field == "serialized_named_tensors" and "cannot be opened" in error.message


@pytest.mark.parametrize("end", ["abort", "give up", "deadline", "close"])
def test_whatever_ends_the_upload_nothing_holds_the_memory(end: str) -> None:
    core = Core()
    payload = share(flattened, NEW)
    session = begin(core, payload, "shadow")
    control = core.loop.replica.update
    command = StagePayload(99, session, payload, tuple(range(5)), deadline=core.clock.now + 1.0)
    stage_payload(core.loop.replica, command, core.clock.now)  # queued, and no turn has come to it
    assert is_held(payload)
    if end == "abort":
        core.call(AbortUpdate, session)
    elif end == "give up":
        core.call(GiveUp, 99)
    elif end == "deadline":
        control.expire(core.clock.now + 1.0)
    else:
        control.close()
    assert not is_held(payload)


def test_an_executor_without_weights_takes_any() -> None:
    core = Core(FreeExecutor(VOCAB_SIZE, weights=FreeWeights()))
    payload = share(flattened, NEW)
    session = begin(core, payload, "auto")
    core.call(StagePayload, session, payload, tuple(range(5)))
    core.call(CommitUpdate, session, kind=UpdateReport)
