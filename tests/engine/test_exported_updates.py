"""Updates of tensors that stay where they are, end to end on a CPU that passes for a device: what the front names, the
core maps, moves many at a time and lets go of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import Engine, TensorInfo, UnavailableError, WeightUpdateError
from headrace.engine import device_export, held_tensors
from headrace.engine.device_road import DeviceRoad
from headrace.engine.tensors import describe
from headrace.kernels.triton import weight_pieces
from headrace.weights import stage_buffers
from headrace.weights.device_staging import DeviceCopies
from headrace.weights.stage_buffers import DeviceBuffers
from headrace.weights.store import WeightStore
from tests.engine.builders import SETTINGS, model_of, named_tensors
from tests.engine.test_device_export import Stream
from tests.weights.test_device_staging import moved_one_by_one
from tests.weights.test_stage_buffers import Cudart

Tensors = list[tuple[str, torch.Tensor]]


class Seen:
    """What the core was told, and has mapped."""

    def __init__(self) -> None:
        self.opened: list[Any] = []
        self.buffers: list[DeviceBuffers] = []
        self.lets_go = threading.Event()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    start = WeightStore.__init__

    class Buffers(DeviceBuffers):
        def open(self, ref: Any) -> Any:
            found.opened.append(ref)
            return super().open(ref)

    def with_buffers(store: WeightStore, *args: Any, **settings: Any) -> None:
        start(store, *args, **settings)
        store._buffers = Buffers(store.device, store._side.settle)
        found.buffers.append(store._buffers)

    monkeypatch.setattr(WeightStore, "__init__", with_buffers)
    monkeypatch.setattr(WeightStore, "device_ids", ("GPU",))
    monkeypatch.setattr(weight_pieces, "move_rows", moved_one_by_one)
    monkeypatch.setattr(stage_buffers, "same_context", lambda: lambda: None)
    monkeypatch.setattr(device_export, "device_of", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return found


@pytest.fixture
def engine(seen: Seen, model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, inprocess=True, **SETTINGS) as found:
        yield found


@pytest.fixture
def new() -> Tensors:
    return named_tensors(model_of(1))


def digests(tensors: Tensors, model_folder: Path) -> dict[str, str]:
    """By the host's road, of an engine of its own."""
    with Engine(model_folder, inprocess=False, **SETTINGS) as other:
        other.update_weights_from_tensor([(name, each.clone()) for name, each in tensors], "v")
        return other.digest()


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("bytes_ahead", [1, 1 << 30])
def test_tensors_are_copied_from_where_they_are(
    engine: Engine,
    seen: Seen,
    new: Tensors,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
    bytes_ahead: int,
) -> None:
    monkeypatch.setattr(DeviceRoad, "bytes_ahead", lambda *_: bytes_ahead)
    for version in ("one", "two"):
        report = engine.update_weights_from_tensor(new, version, mode=mode)
        assert (report.version, report.mode, report.num_tensors) == (version, mode, len(new))
    storages = {(each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()) for _, each in new}
    named = {(area.offset, area.size) for ref in seen.opened for area in ref.areas}
    assert named == storages and len(seen.opened) == (1 if bytes_ahead > 1 else len(new)) + 1
    assert engine.digest() == digests(new, model_folder)


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors that are described one by one."""
    names: list[str] = []

    def noted(name: str, tensor: Any) -> TensorInfo:
        names.append(name)
        return describe(name, tensor)

    monkeypatch.setattr(held_tensors, "describe", noted)
    return names


def test_the_same_tensors_are_looked_at_once_and_sent_as_they_are_now(
    engine: Engine, seen: Seen, new: Tensors, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = looked_at(monkeypatch)
    for number in range(4):
        engine.update_weights_from_tensor(dict(new) if number % 2 else new, str(number), mode="inplace")
        assert len(names) == (0 if number else len(new))
        assert engine.digest() == digests(new, model_folder)
        names.clear()
        with torch.no_grad():
            for _, each in new:
                each.add_(0.5)
    engine.update_weights_from_tensor(new[::-1], "another order")
    assert len(names) == len(new) and engine.digest() == digests(new, model_folder)


def test_another_trainer_may_be_noted_meanwhile(engine: Engine, new: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, between the question whether all are as they were and the use of the answer."""
    others = [(name, each.clone()) for name, each in named_tensors(model_of(2))]
    road = engine.asynchronous.runtime.updater._road
    engine.update_weights_from_tensor(others, "others")
    of_others = road._plan
    engine.update_weights_from_tensor(new, "one")
    right, fits = engine.digest(), device_export.ExportPlan.fits

    def noted(plan: Any, listing: Any) -> bool:
        found = fits(plan, listing)
        road._plan = of_others
        return found

    monkeypatch.setattr(device_export.ExportPlan, "fits", noted)
    engine.update_weights_from_tensor(new, "two")
    assert engine.version == "two" and engine.digest() == right


MOVED = {
    "another place": lambda each: each.clone(),
    "another form": lambda each: each.t().contiguous().t(),
    "another dtype": lambda each: each.view(torch.int32).view(torch.float32).bfloat16(),
    "no plain tensor": lambda each: torch.nn.Buffer(each.clone()),
    "of numpy": lambda each: each.clone().numpy(),
}


@pytest.mark.parametrize("way", MOVED)
def test_where_one_of_them_is_another_all_are_looked_at(
    engine: Engine, new: Tensors, model_folder: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    engine.update_weights_from_tensor(new, "one")
    names, at = looked_at(monkeypatch), next(at for at, (_, each) in enumerate(new) if each.ndim == 2)
    changed: Any = [*new]
    changed[at] = new[at][0], MOVED[way](new[at][1] + 1.0)
    engine.update_weights_from_tensor(changed, "two")
    assert len(names) >= len(new)
    plain = [(name, torch.as_tensor(each)) for name, each in changed]
    assert engine.digest() == digests(plain, model_folder)


def test_what_was_freed_or_is_written_to_meanwhile_is_refused_by_name(
    engine: Engine, new: Tensors, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.update_weights_from_tensor(new, "one")
    advance = DeviceCopies.advance

    def written(copies: DeviceCopies, budget_s: float) -> bool:
        with torch.no_grad():
            new[3][1].add_(1.0)
        return advance(copies, budget_s)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceCopies, "advance", written)
        with pytest.raises(WeightUpdateError, match="was written to while it was sent") as caught:
            engine.update_weights_from_tensor(new, "two", mode="shadow")
    assert caught.value.field == new[3][0] and engine.version == "one"
    engine.update_weights_from_tensor(new, "three")
    new[5][1].untyped_storage().resize_(0)
    with pytest.raises(WeightUpdateError, match="its memory was freed") as caught:
        engine.update_weights_from_tensor(new, "four")
    assert caught.value.field == new[5][0] and engine.version == "three"
    new[5] = new[5][0], torch.ones(new[5][1].shape)
    engine.update_weights_from_tensor(new, "five")
    assert engine.digest() == digests(new, model_folder)


def test_what_went_once_and_cannot_be_mapped_again_goes_through_the_host(
    engine: Engine, seen: Seen, new: Tensors, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.update_weights_from_tensor(new, "one")

    def unmapped(*_: Any) -> Any:
        raise UnavailableError("the driver could not map another's memory: error 217", field="buffer")

    monkeypatch.setattr(stage_buffers.AreaBytes, "part", unmapped)
    with torch.no_grad():
        new[0][1].add_(1.0)
    seen.opened.clear()
    assert engine.update_weights_from_tensor(new, "two", mode="inplace").version == "two"
    assert {type(ref).__name__ for ref in seen.opened} == {"DeviceRef", "BufferRef"}
    assert engine.digest() == digests(new, model_folder)


def test_what_does_not_lie_well_comes_by_the_host(engine: Engine, seen: Seen, new: Tensors, model_folder: Path) -> None:
    mixed = [
        (name, each.t().contiguous().t() if n % 3 == 0 and each.ndim == 2 else each)
        for n, (name, each) in enumerate(new)
    ]
    mixed = [(name, each.bfloat16() if n % 3 == 1 else each) for n, (name, each) in enumerate(mixed)]
    engine.update_weights_from_tensor(mixed, "mixed")
    kinds = {type(ref).__name__ for ref in seen.opened}
    assert kinds == {"DeviceRef", "BufferRef"}
    assert engine.digest() == digests(mixed, model_folder)


def test_an_iterator_s_tensors_are_copied_before_the_next_is_asked_for(
    engine: Engine, seen: Seen, new: Tensors, model_folder: Path
) -> None:
    scratch = torch.empty(max(each.numel() for _, each in new))

    def again() -> Iterator[tuple[str, torch.Tensor]]:
        for name, each in new:
            yield name, scratch[: each.numel()].view(each.shape).copy_(each)
            scratch.fill_(7.0)

    session = engine.begin_update("new", [(name, tuple(each.shape), "float32") for name, each in new])
    engine.stage(session, again())
    engine.commit(session)
    assert {type(ref).__name__ for ref in seen.opened} == {"BufferRef"}
    assert engine.digest() == digests(new, model_folder)


@pytest.mark.parametrize("problem", ["NaN", "digest"])
def test_what_is_wrong_is_refused_by_name_and_may_come_again(engine: Engine, new: Tensors, problem: str) -> None:
    engine.update_weights_from_tensor(new, "right")
    right = engine.digest()
    known = right if problem == "digest" else {}
    manifest = [TensorInfo(name, tuple(each.shape), "float32", known.get(name, "")) for name, each in new]
    engine.update_weights_from_tensor(named_tensors(model_of(2)), "other")
    other = engine.digest()
    bad = [(name, each.clone()) for name, each in new]
    bad[4][1].view(-1)[3] += float("nan") if problem == "NaN" else 1.0
    session = engine.begin_update("bad", manifest, mode="shadow")
    with pytest.raises(WeightUpdateError, match="NaN|arrived with digest") as caught:
        engine.stage(session, bad)
    assert caught.value.field == bad[4][0] and engine.digest() == other != right
    engine.stage(session, new)
    engine.commit(session)
    assert engine.digest() == right


def test_nothing_stays_mapped_after_an_update(engine: Engine, seen: Seen, new: Tensors) -> None:
    for number in range(20):
        engine.update_weights_from_tensor([(name, each.clone()) for name, each in new], str(number))
    engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 2})
    (buffers,) = seen.buffers
    assert not buffers._mapped and not buffers._left


def test_buckets_of_an_update_are_copied_from_where_they_are(
    engine: Engine, seen: Seen, new: Tensors, model_folder: Path
) -> None:
    for part in (new[:3], new[3:9], new[9:]):
        engine.update_weights_from_bucket(part, "joined")
    assert engine.version == "joined" and len(seen.opened) == 3
    assert engine.digest() == digests(new, model_folder)


@pytest.mark.parametrize("is_dict", [False, True])
def test_where_the_core_cannot_map_them_the_host_carries_them_from_then_on(
    engine: Engine,
    seen: Seen,
    new: Tensors,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_dict: bool,
) -> None:
    """In the very update in which that shows, whatever of it was copied before."""
    part = stage_buffers.AreaBytes.part
    asked: list[int] = []

    def unmapped(areas: Any, offset: int, size: int) -> Any:
        asked.append(size)
        if len(asked) > 3:
            raise UnavailableError("the driver could not map another's memory: error 217 (on rank 1)", field="buffer")
        return part(areas, offset, size)

    monkeypatch.setattr(stage_buffers.AreaBytes, "part", unmapped)
    engine.update_weights_from_tensor(dict(new) if is_dict else new, "one", mode="inplace")
    assert {type(ref).__name__ for ref in seen.opened} == {"DeviceRef", "BufferRef"}
    assert engine.digest() == digests(new, model_folder)
    assert [each for each in caplog.messages if "go through the host from now on" in each and "error 217" in each]
    seen.opened.clear()
    engine.update_weights_from_tensor(new, "two", mode="shadow")
    assert {type(ref).__name__ for ref in seen.opened} == {"BufferRef"} and len(asked) == 4
    assert engine.digest() == digests(new, model_folder)
