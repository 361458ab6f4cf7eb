"""Weight updates end to end on a real model."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import (
    DeadlineError,
    Engine,
    Generation,
    NotFoundError,
    PoisonedError,
    RequestError,
    SamplingParams,
    TensorInfo,
    UnavailableError,
    UpdateConflictError,
    WeightUpdateError,
)
from headrace.engine import reading as reading_module
from headrace.engine import update as update_module
from headrace.engine.update_session import manifest_of
from headrace.engine.upload_buffers import NUM_BUFFERS
from headrace.ipc import SharedBuffer
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model

PROMPTS = [[i + 1, i + 2, i + 3, i + 4, i + 5] for i in range(4)]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
NUM_LONG = 900

Starter = Callable[..., Engine]
Tensors = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def new() -> Tensors:
    return named_tensors(model_of(1))


@pytest.fixture(scope="module")
def spawned(model_folder: Path) -> Iterator[Engine]:
    """An engine with a core process, whose weights each test sets as it needs them."""
    with Engine(model_folder, **SETTINGS) as shared:
        yield shared


@pytest.fixture(scope="module")
def steady(model_folder: Path) -> Iterator[Engine]:
    """An engine whose bits do not depend on the steps that prompts share; its tests leave it as it was."""
    with Engine(model_folder, inprocess=True, numerics="invariant", **SETTINGS) as shared:
        yield shared


def outputs(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """Bit for bit, if its numerics are invariant."""
    return [(g.token_ids, g.logprobs) for g in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def is_ready(engine: Engine) -> bool:
    return engine.is_ready


class Load:
    """Eight requests that run across whatever the block does, and are aborted a few steps after it."""

    def __init__(self, engine: Engine, max_new_tokens: int = NUM_LONG) -> None:
        self.found: list[Generation] = []
        self._engine = engine
        self._params = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "seed": 1}
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        prompts = [[i + 1] * 9 for i in range(8)]
        self.found = self._engine.generate(input_ids=prompts, sampling_params=self._params, request_id="load")

    def __enter__(self) -> Load:
        self._thread.start()
        wait_for(lambda: self._engine.metrics()["num_running"] == 8)
        return self

    def __exit__(self, *_: object) -> None:
        if self._params["max_new_tokens"] == NUM_LONG:
            enough = self._engine.metrics()["num_steps"] + 6
            wait_for(lambda: not self._thread.is_alive() or self._engine.metrics()["num_steps"] > enough)
            assert self._engine.abort("load_", prefix=True) in (0, 8)
        self._thread.join(60)
        assert len(self.found) == 8
        for each in self.found:
            assert len(each.token_ids) == len(each.logprobs) == sum(count for _, count in each.version_spans)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.002)


@pytest.mark.parametrize("mode", ["auto", "shadow", "inplace"])
def test_an_update_equals_a_cold_load(start: Starter, new_folder: Path, new: Tensors, mode: Any) -> None:
    warm, cold = start(numerics="invariant"), start(new_folder, numerics="invariant")
    before = outputs(warm)
    report = warm.update_weights_from_tensor(new, version=7, mode=mode)
    assert (report.version, report.epoch, report.num_tensors) == ("7", 1, len(new))
    assert report.num_bytes == sum(tensor.numel() * 4 for _, tensor in new)
    assert warm.version == "7" and warm.is_ready
    assert warm.digest() == cold.digest()
    assert outputs(warm) == outputs(cold) != before
    assert warm.generate(input_ids=[1], sampling_params=GREEDY)[0].version_spans == [("7", 12)]


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("in_flight", ["keep", "recompute", "abort", "drain"])
def test_requests_in_flight_are_treated_as_asked(start: Starter, new: Tensors, mode: Any, in_flight: Any) -> None:
    engine = start()
    with Load(engine, 60 if in_flight == "drain" else NUM_LONG) as load:
        report = engine.update_weights_from_tensor(new, version="new", mode=mode, in_flight=in_flight)
        fresh = engine.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)[0]
    assert fresh.version_spans == [("new", 12)]
    for each in load.found:
        versions = [version for version, _ in each.version_spans]
        if in_flight in ("keep", "recompute"):
            assert versions == ["default", "new"]
        elif in_flight == "drain":
            assert versions == ["default"] and len(each.token_ids) == 60
        else:
            assert versions == ["default"] and each.finish_reason == "abort"
    assert report.num_aborted == (8 if in_flight == "abort" else 0)


def test_recomputed_requests_continue_as_if_new_weights_had_read_everything(
    start: Starter, new_folder: Path, new: Tensors
) -> None:
    engine, cold = start(), start(new_folder)
    with Load(engine) as load:
        engine.update_weights_from_tensor(new, version="new", in_flight="recompute")
    for each in load.found[:3]:
        num_old = each.version_spans[0][1]
        known = [each.prompt_index + 1] * 9 + each.token_ids
        scored = cold.score(input_ids=known, prompt_logprob_mode="raw")[0].prompt_logprobs[9 + num_old :]
        assert np.allclose(each.logprobs[num_old:], np.array(scored, dtype=float), atol=1e-4)


def test_steps_go_on_between_the_first_staged_byte_and_the_commit(spawned: Engine, new: Tensors) -> None:
    engine = spawned
    engine.update_weights_from_tensor(named_tensors(model_of(0)), version="old")
    staged_steps = engine.metrics()["staged_steps"]
    with Load(engine) as load:
        manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]
        session = engine.begin_update("new", manifest, mode="shadow", in_flight="keep")
        engine.stage(session, new[:5])
        at_first_byte = engine.metrics()["num_steps"]
        for pair in new[5:]:
            engine.stage(session, [pair])
        wait_for(lambda: engine.metrics()["num_steps"] > at_first_byte + 3)
        assert engine.version == "old" and engine.is_ready
        engine.commit(session)
    assert engine.metrics()["staged_steps"] > staged_steps + 3
    assert all([version for version, _ in each.version_spans] == ["old", "new"] for each in load.found)


def test_any_iterable_of_tensors_will_do(start: Starter, new: Tensors, new_folder: Path) -> None:
    engine, expected = start(), start(new_folder).digest()
    forms: list[Any] = [
        dict(new),
        iter(new),
        tuple((name, tensor.numpy()) for name, tensor in new),
        ((name, torch.nn.Parameter(tensor)) for name, tensor in reversed(new)),
        [(name, tensor.t().contiguous().t()) if tensor.dim() == 2 else (name, tensor) for name, tensor in new],
        [*new, ("lm_head.weight", dict(new)["model.embed_tokens.weight"])],
    ]
    for number, form in enumerate(forms):
        engine.update_weights_from_tensor(named_tensors(model_of(0)), version="back")
        assert engine.digest() != expected
        engine.update_weights_from_tensor(form, version=number)
        assert engine.digest() == expected, f"form {number}"


def test_bfloat16_tensors_are_cast_to_the_engine_s_dtype(start: Starter, new: Tensors) -> None:
    engine = start()
    half = [(name, tensor.to(torch.bfloat16)) for name, tensor in new]
    engine.update_weights_from_tensor(half, version="half")
    for name, tensor in half[:4]:
        assert torch.equal(engine.get_weights_by_name(name), tensor.float())


def test_tensors_travel_in_few_buffers_and_large_ones_alone(
    spawned: Engine, new: Tensors, model_folder: Path, start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With buffers of 8 KiB some tensors fill one many times over and most share one."""
    monkeypatch.setattr(update_module, "BUFFER_BYTES", 1 << 13)
    assert max(tensor.numel() * 4 for _, tensor in new) > 1 << 13
    for tensors in (new, named_tensors(model_of(2)), named_tensors(model_of(0))):
        spawned.update_weights_from_tensor(tensors, version="small buffers")
    assert spawned.digest() == start(model_folder).digest()


def test_bytes_in_flight_are_bounded_whatever_is_sent_or_read(
    start: Starter, new: Tensors, new_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory that exists at one time, in bytes, while an update of tensors far larger is sent and read back."""
    limit = 1 << 12
    for module, name in ((update_module, "BUFFER_BYTES"), (reading_module, "PART_BYTES")):
        monkeypatch.setattr(module, name, limit)
    engine, held, peaks = start(), dict[int, int](), list[int]()
    create, close = SharedBuffer.create, SharedBuffer.close

    def created(size: int) -> SharedBuffer:
        buffer = create(size)
        held[id(buffer)] = size
        peaks.append(sum(held.values()))
        return buffer

    def closed(buffer: SharedBuffer) -> None:
        held.pop(id(buffer), None)
        close(buffer)

    monkeypatch.setattr(SharedBuffer, "create", created)
    monkeypatch.setattr(SharedBuffer, "close", closed)
    assert sum(tensor.numel() * 4 for _, tensor in new) > 20 * limit
    engine.update_weights_from_tensor(new, version="new")
    assert max(peaks) <= NUM_BUFFERS * limit
    name, largest = max(new, key=lambda pair: pair[1].numel())
    assert largest.numel() * 4 > 2 * limit
    peaks.clear()
    assert torch.equal(engine.get_weights_by_name(name), largest)
    assert max(peaks) <= (NUM_BUFFERS + 1) * limit
    assert engine.digest() == start(new_folder).digest()


def test_staging_may_be_cut_anywhere(start: Starter, new: Tensors, new_folder: Path) -> None:
    engine = start()
    manifest = [(name, tensor.shape, tensor.dtype) for name, tensor in new]
    session = engine.begin_update("new", manifest, mode="shadow")  # type: ignore[arg-type]
    for start_index in range(0, len(new), 6):
        engine.stage(session, new[start_index : start_index + 6])
    engine.commit(session)
    assert engine.digest() == start(new_folder).digest()


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("buffer_bytes", [4096, 1 << 26], ids=["pieces", "one buffer"])
def test_a_stage_that_failed_may_be_tried_again(
    start: Starter, new: Tensors, new_folder: Path, mode: Any, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other values, in another order, several times; in the end all is what the call that succeeded sent."""
    monkeypatch.setattr("headrace.engine.update.BUFFER_BYTES", buffer_bytes)
    updated = start()
    session = updated.begin_update("new", manifest_of((n, t.shape, str(t.dtype)) for n, t in new), mode=mode)
    for count in (5, len(new), 12):
        with pytest.raises(OSError):
            updated.stage(session, breaking([(name, tensor + count) for name, tensor in new], count))
    with pytest.raises(WeightUpdateError, match="staged twice"):
        updated.stage(session, [*new, new[0]])
    updated.stage(session, reversed(new))
    for _ in range(2):  # a refused call does not make it another's to replace
        with pytest.raises(WeightUpdateError, match="staged twice"):
            updated.stage(session, new[:1])
    updated.commit(session)
    assert updated.digest() == start(new_folder).digest()


def breaking(pairs: Tensors, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from pairs[:count]
    raise OSError("the source broke")


def test_a_stage_that_was_cancelled_may_be_tried_again(start: Starter, new: Tensors, new_folder: Path) -> None:
    updated = start()
    engine = updated.asynchronous

    async def scenario() -> int:
        num_cancelled = 0
        for turn in range(20):
            session = await engine.begin_update("new", manifest_of((n, t.shape, str(t.dtype)) for n, t in new))
            try:
                await asyncio.wait_for(engine.stage(session, [(n, t + 1) for n, t in new]), 0.00015 * turn)
            except TimeoutError:
                num_cancelled += 1
                await engine.stage(session, new)
                await engine.commit(session)
            else:
                await engine.abort_update(session)
        return num_cancelled

    assert asyncio.run(scenario()) > 2
    assert updated.digest() == start(new_folder).digest()


def test_an_iterator_may_reuse_its_memory(start: Starter, new: Tensors, new_folder: Path) -> None:
    """A tensor has been copied before the next one is asked for."""
    engine = start()
    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]

    def reused() -> Iterator[tuple[str, torch.Tensor]]:
        memory = torch.empty(max(tensor.numel() for _, tensor in new))
        for name, tensor in new:
            view = memory[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            memory.fill_(float("nan"))

    session = engine.begin_update("new", manifest)
    engine.stage(session, reused())
    engine.commit(session)
    assert engine.digest() == start(new_folder).digest()


def test_the_iterator_is_read_in_the_caller_s_thread(engine: Engine) -> None:
    threads: set[str] = set()

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in named_tensors(model_of(0)):
            threads.add(threading.current_thread().name)
            yield pair

    engine.update_weights_from_tensor(pairs(), version="default")
    assert threads == {threading.current_thread().name}


BROKEN: list[tuple[str, Callable[[Tensors], Any], str]] = [
    ("misshapen", lambda t: [*t[:7], (t[7][0], t[7][1][:1]), *t[8:]], "{7}"),
    ("unknown", lambda t: [*t, ("model.extra.weight", t[0][1])], "model.extra.weight"),
    ("missing", lambda t: t[:7] + t[8:], "{7}"),
    ("doubled", lambda t: [*t, t[7]], "{7}"),
    ("integers", lambda t: [*t[:7], (t[7][0], t[7][1].long()), *t[8:]], "{7}"),
    ("no tensor", lambda t: [*t[:7], (t[7][0], [1.0])], "{7}"),
    ("no pairs", lambda t: [tensor for _, tensor in t], "named_tensors"),
    ("no iterable", lambda t: 5, "named_tensors"),
]


@pytest.mark.parametrize(("breaks", "named"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_wrong_update_leaves_the_old_weights(steady: Engine, new: Tensors, breaks: Any, named: str) -> None:
    before, digest, version = outputs(steady), steady.digest(), steady.version
    name = new[7][0] if named == "{7}" else named
    with pytest.raises(WeightUpdateError, match=name.replace(".", r"\.")):
        steady.update_weights_from_tensor(breaks(new), version="never")
    assert (outputs(steady), steady.digest(), steady.version) == (before, digest, version)
    assert steady.is_ready and not steady.status().updating


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_a_source_that_breaks_serves_old_bits_or_nothing(
    start: Starter, new: Tensors, new_folder: Path, mode: Any
) -> None:
    engine = start(numerics="invariant")
    before = outputs(engine)

    class Lost(Exception):
        pass

    def cut() -> Iterator[tuple[str, torch.Tensor]]:
        yield from new[:9]
        raise Lost

    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]
    session = engine.begin_update("never", manifest, mode=mode)
    engine.stage(session, new[:3])
    assert is_ready(engine) == (mode == "shadow")
    with pytest.raises(Lost):
        engine.stage(session, cut())
    with pytest.raises(WeightUpdateError, match="not staged"):
        engine.commit(session)
    engine.abort_update(session)
    assert engine.version == ("default" if mode == "shadow" else "")
    if mode == "shadow":
        assert is_ready(engine) and outputs(engine) == before
        return
    assert not is_ready(engine) and engine.is_alive and engine.status().state == "poisoned"
    with pytest.raises(PoisonedError):
        outputs(engine)
    with pytest.raises(WeightUpdateError):
        engine.update_weights_from_tensor(new[:9], version="part", partial=True)
    engine.update_weights_from_tensor(new, version="healed")
    assert is_ready(engine) and engine.digest() == start(new_folder).digest()


def test_a_buffer_that_is_not_staged_in_time_is_read_no_more(start: Starter, new: Tensors, new_folder: Path) -> None:
    """It waits behind the requests in flight; what its caller was told of the deadline holds when they have ended."""
    engine = start(control_timeout=0.4)
    updater = engine.asynchronous.runtime.updater
    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]
    with Load(engine):
        session = engine.begin_update("new", manifest, mode="inplace", in_flight="drain")
        for part in (new[:4], new[4:8]):
            with pytest.raises(DeadlineError):
                engine.stage(session, [(name, torch.zeros_like(tensor)) for name, tensor in part])
            assert len(updater._host._free) == updater._host._num_buffers
    with pytest.raises(WeightUpdateError, match="not staged"):
        engine.commit(session)
    engine.stage(session, new)
    engine.commit(session)
    assert engine.version == "new" and engine.digest() == start(new_folder).digest()


def test_updates_that_are_cancelled_anywhere_cost_nothing(
    spawned: Engine, new: Tensors, new_folder: Path, start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No buffer and no session is lost, whatever the script was waiting for: the next one finds none open."""
    monkeypatch.setattr(update_module, "BUFFER_BYTES", 1 << 13)
    engine, updater = spawned.asynchronous, spawned.asynchronous.runtime.updater

    async def cancelled(seconds: float) -> bool:
        update = engine.update_weights_from_tensor(new, version="never", mode="shadow")
        try:
            await asyncio.wait_for(update, seconds)
        except TimeoutError:
            return True
        return False

    async def many() -> int:
        return sum([await cancelled(turn * 0.0005) for turn in range(50)])

    assert asyncio.run(many()) > 2
    wait_for(lambda: not spawned.status().updating)
    wait_for(lambda: len(updater._host._free) == updater._host._num_buffers)
    spawned.update_weights_from_tensor(new, version="last")
    assert spawned.digest() == start(new_folder).digest()


def test_failed_allocations_cost_no_buffer(start: Starter, new: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors, out of memory: told as such, and what comes later finds all its buffers."""
    engine = start()
    create = SharedBuffer.create

    def fails(size: int) -> SharedBuffer:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(SharedBuffer, "create", fails)
    for _ in range(NUM_BUFFERS + 1):
        with pytest.raises(UnavailableError, match="Too many open files") as caught:
            engine.update_weights_from_tensor(new, version="never")
        assert caught.value.field == "named_tensors"
    with pytest.raises(UnavailableError, match="Too many open files"):
        engine.get_weights_by_name("model.norm.weight")
    monkeypatch.setattr(SharedBuffer, "create", create)
    assert engine.update_weights_from_tensor(new, version="next").version == "next"
    assert engine.get_weights_by_name("model.norm.weight").shape == dict(new)["model.norm.weight"].shape


@pytest.mark.parametrize("where", ["own loop", "another thread"])
def test_a_source_that_breaks_keeps_no_buffer(
    start: Starter, new: Tensors, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Also when the upload it had just sent has not begun."""
    monkeypatch.setattr(update_module, "BUFFER_BYTES", 1 << 13)
    engine = start()
    updater = engine.asynchronous.runtime.updater
    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]

    def breaks(after: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from new[:after]
        raise ZeroDivisionError

    for after in range(1, 12):
        session = engine.begin_update("never", manifest, mode="shadow")
        with pytest.raises(ZeroDivisionError):
            if where == "own loop":
                engine.asynchronous.runtime.wait(engine.asynchronous.stage(session, breaks(after)))
            else:
                engine.stage(session, breaks(after))
        engine.abort_update(session)
        wait_for(lambda: len(updater._host._free) == updater._host._num_buffers)
    assert engine.update_weights_from_tensor(new, version="next").version == "next"


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uploads_are_bounded_in_bytes_whatever_the_tensors(
    start: Starter, new: Tensors, monkeypatch: pytest.MonkeyPatch, mode: Any, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(update_module, "BUFFER_BYTES", 1 << 10)
    engine = start()
    updater = engine.asynchronous.runtime.updater
    sizes: list[int] = []
    create = SharedBuffer.create

    def noted(size: int) -> SharedBuffer:
        sizes.append(size)
        return create(size)

    monkeypatch.setattr(SharedBuffer, "create", noted)
    sent = [(name, tensor.to(dtype)) for name, tensor in new]
    assert max(tensor.nbytes for _, tensor in sent) > 16 << 10
    assert engine.update_weights_from_tensor(sent, version="pieces", mode=mode).num_tensors == len(new)
    assert sizes == [1 << 10] * len(sizes) and len(sizes) <= NUM_BUFFERS
    assert len(updater._host._free) == updater._host._num_buffers
    for name, tensor in sent:
        assert torch.equal(engine.get_weights_by_name(name), tensor.float())


def test_a_tensor_larger_than_what_travels_at_once_is_read_back(
    start: Starter, new: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "PART_BYTES", 1000)
    engine = start()
    old = dict(named_tensors(model_of(0)))
    name = max(old, key=lambda each: old[each].numel())
    assert torch.equal(engine.get_weights_by_name(name), old[name])
    rows = engine.asynchronous.runtime.wait(engine.asynchronous.read_weight(name, 3))
    assert rows.info.shape == (3, old[name].shape[1]) and bytes(rows.data) == old[name][:3].numpy().tobytes()
    stop = threading.Event()
    found: list[torch.Tensor] = []

    def read() -> None:
        while not stop.is_set():
            found.append(engine.get_weights_by_name(name))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(6):
        engine.update_weights_from_tensor(new if number % 2 == 0 else old, version=number)
    stop.set()
    reader.join(30)
    assert found and all(torch.equal(each, old[name]) or torch.equal(each, dict(new)[name]) for each in found)


def test_an_upload_that_failed_keeps_no_buffer(spawned: Engine, new: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "BUFFER_BYTES", 1 << 13)
    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]
    updater = spawned.asynchronous.runtime.updater

    def aborted_between() -> Iterator[tuple[str, torch.Tensor]]:
        for index, pair in enumerate(sorted(new, key=lambda pair: -pair[1].numel())):
            if index == 1:
                spawned.abort_update(session)
            yield pair

    for _ in range(4):
        session = spawned.begin_update("never", manifest, mode="shadow")
        with pytest.raises(UpdateConflictError):
            spawned.stage(session, aborted_between())
    wait_for(lambda: len(updater._host._free) == updater._host._num_buffers)
    assert spawned.update_weights_from_tensor(new, version="last").num_tensors == len(new)


def test_a_session_that_would_open_too_late_is_not_opened(start: Starter, new: Tensors) -> None:
    engine = start(inprocess=False, control_timeout=1.0)
    os.kill(engine.asynchronous.runtime.host.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineError, match="BeginUpdate"):
            engine.update_weights_from_tensor(new, version="late")
    finally:
        os.kill(engine.asynchronous.runtime.host.pid, signal.SIGCONT)

    engine.update_weights_from_tensor(new, version="next")  # the late session would have had ten minutes
    assert engine.version == "next"


def test_a_commit_without_an_answer_does_not_land_later(start: Starter, new: Tensors) -> None:
    engine = start(control_timeout=1.0, numerics="invariant")
    before = outputs(engine)
    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]
    session = engine.begin_update("late", manifest, mode="shadow", in_flight="drain")
    engine.stage(session, new)
    with Load(engine), pytest.raises(DeadlineError):
        engine.commit(session)
    wait_for(lambda: not engine.status().updating)
    assert engine.version == "default" and outputs(engine) == before
    with pytest.raises(UpdateConflictError, match="was aborted"):
        engine.commit(session)
    assert engine.update_weights_from_tensor(new, version="next").epoch == 1


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_an_update_slower_than_its_time_says_so(start: Starter, new: Tensors, mode: Any) -> None:
    engine = start()

    def slow() -> Iterator[tuple[str, torch.Tensor]]:
        yield new[0]
        wait_for(lambda: not engine.status().updating)
        yield from new[1:]

    session = engine.begin_update("late", manifest_of((n, t.shape, "float32") for n, t in new), mode=mode, timeout=0.1)
    with pytest.raises(DeadlineError, match=r"was aborted 0\.1 s after its last command"):
        engine.stage(session, slow())
    with pytest.raises(DeadlineError, match=r"was aborted 0\.1 s after its last command"):
        engine.commit(session)
    engine.update_weights_from_tensor(new, version="next")


def test_a_tensor_unlike_its_announcement_is_refused_by_name(engine: Engine, new: Tensors) -> None:
    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new]
    session = engine.begin_update("never", manifest)
    name, tensor = new[3]
    for wrong in ((name, tensor.double()), (name, tensor.reshape(-1, 1)), ("nobody", tensor)):
        with pytest.raises(WeightUpdateError, match=wrong[0].replace(".", r"\.")):
            engine.stage(session, [wrong])
    engine.stage(session, [(name, tensor)])
    with pytest.raises(WeightUpdateError, match="twice"):
        engine.stage(session, [(name, tensor)])
    with pytest.raises(UpdateConflictError):
        engine.begin_update("second", manifest)
    engine.abort_update(session)
    with pytest.raises(UpdateConflictError):
        engine.commit(session)


def test_bad_arguments_of_an_update(engine: Engine, new: Tensors) -> None:
    for arguments, field in (
        ({"mode": "fast"}, "mode"),
        ({"in_flight": "retract"}, "in_flight"),
        ({"version": ""}, "version"),
        ({"version": None}, "version"),
        ({"version": True}, "version"),
        ({"version": 1.5}, "version"),
    ):
        with pytest.raises((RequestError, WeightUpdateError)) as caught:
            engine.update_weights_from_tensor(new, **{"version": "x", **arguments})  # type: ignore[arg-type]
        assert caught.value.field == field
    for manifest in ([5], [("a", 3, "float32")], [("a", (1,))]):
        with pytest.raises(WeightUpdateError, match="manifest"):
            engine.begin_update("x", manifest)  # type: ignore[arg-type]


def test_a_partial_update_changes_exactly_what_it_names(start: Starter, new: Tensors) -> None:
    engine = start()
    before = engine.digest()
    engine.update_weights_from_tensor(new[3:5], version="part", partial=True)
    changed = {name for name, value in engine.digest().items() if before[name] != value}
    assert changed == {name for name, _ in new[3:5]}


def test_an_update_from_disk(spawned: Engine, start: Starter, new_folder: Path, tmp_path: Path) -> None:
    engine = spawned
    engine.update_weights_from_tensor(named_tensors(model_of(0)), version="old")
    report = engine.update_weights_from_disk(new_folder, version="disk", in_flight="keep")
    assert report.version == engine.version == "disk"
    assert engine.digest() == start(new_folder).digest()
    with pytest.raises(Exception, match="empty") as caught:
        (tmp_path / "empty").mkdir()
        engine.update_weights_from_disk(tmp_path / "empty", version="none")
    assert type(caught.value).__module__ == "headrace.types.errors"
    assert engine.version == "disk" and engine.is_ready


def test_weights_are_read_back_in_their_shapes(engine: Engine) -> None:
    expected = dict(named_tensors(model_of(0)))
    for name, tensor in expected.items():
        assert torch.equal(engine.get_weights_by_name(name), tensor)
    assert torch.equal(engine.get_weights_by_name("lm_head.weight"), expected["model.embed_tokens.weight"])
    with pytest.raises(NotFoundError, match="nothing"):
        engine.get_weights_by_name("nothing")


def test_a_label_changes_and_nothing_else(start: Starter) -> None:
    engine = start()
    digest = engine.digest()
    engine.generate(input_ids=[3] * 40, sampling_params=GREEDY)
    engine.set_weight_version(12)
    assert engine.version == "12" and engine.digest() == digest
    again = engine.generate(input_ids=[3] * 40, sampling_params=GREEDY)[0]
    assert again.version_spans == [("12", 12)] and again.num_cached_tokens > 0


def test_the_checker_sees_a_reset_and_its_repair(start: Starter) -> None:
    engine = start()
    names = set(engine.digest())
    engine.weights_checker("snapshot")
    assert engine.weights_checker("compare") == {}
    engine.weights_checker("reset_tensors")
    assert not engine.is_ready and engine.status().state == "needs_weights"
    assert set(engine.weights_checker("compare")) == names and engine.version == ""
    engine.update_weights_from_tensor(named_tensors(model_of(0)), version="again")
    assert engine.weights_checker("compare") == {} and engine.is_ready


def test_many_updates_hold_no_more_descriptors(spawned: Engine, new: Tensors) -> None:
    engine = spawned
    engine.update_weights_from_tensor(new, version="warm")
    core = engine.asynchronous.runtime.host.pid

    def held() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), core)]

    before = held()
    for version in range(30):
        engine.update_weights_from_tensor(new, version=version)
    assert held() == before
