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
from headrace.engine import device_export
from headrace.engine.device_road import DeviceRoad
from headrace.kernels.triton import weight_pieces
from headrace.weights import stage_buffers
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
    assert named == storages and len(seen.opened) == 2 * (1 if bytes_ahead > 1 else len(new))
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
