"""Commands of whole tensors that are only moved, again and again: on a CPU that passes for a device."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch

from headrace.core.staging import StageJob, job_from_buffer
from headrace.kernels.triton import weight_pieces
from headrace.types.errors import WeightUpdateError
from headrace.types.messages import Stage
from headrace.types.weights import BufferEntry, DeviceArea, DeviceRef, TensorInfo
from headrace.weights import move_plan
from headrace.weights.device_staging import DeviceCopies
from headrace.weights.memory import Copies, StageBuffer
from headrace.weights.session import WeightMachine
from headrace.weights.stage_buffers import AreaBytes, DeviceBuffers, Opened
from headrace.weights.staging import StageWork, as_bytes, bytes_of
from headrace.weights.store import WeightStore
from tests.weights.test_device_staging import moved_one_by_one
from tests.weights.tiny import Tensors, live_bits, make_map, make_store, make_tensors, manifest_of

CPU = torch.device("cpu")
Moves = Callable[[StageBuffer], Copies]


@pytest.fixture(autouse=True)
def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_pieces, "move_rows", moved_one_by_one)
    monkeypatch.setattr(move_plan, "MAX_SLICE_PIECES", 3)


class Sender:
    """Tensors in areas of some of them each, in any order, with gaps between them."""

    def __init__(self, tensors: Tensors, choose: random.Random) -> None:
        order = list(range(len(tensors)))
        choose.shuffle(order)
        held = list(tensors.values())
        self.areas: list[torch.Tensor] = []
        self.places: list[tuple[int, int, int]] = []  # index; area and offset
        while order:
            offsets, size = list[tuple[int, int]](), 0
            for index in [order.pop() for _ in range(min(len(order), choose.randrange(1, 4)))]:
                size += choose.randrange(3) * 64
                offsets.append((index, size))
                size += held[index].nbytes
            self.places += ((index, len(self.areas), offset) for index, offset in offsets)
            self.areas.append(torch.zeros(size + choose.randrange(2) * 8, dtype=torch.uint8))
        self.fill(tensors)

    def fill(self, tensors: Tensors) -> None:
        held = list(tensors.values())
        for index, area, offset in self.places:
            data = held[index].contiguous().view(-1).view(torch.uint8)
            self.areas[area][offset : offset + len(data)] = data

    def move_away(self) -> None:
        """The same bytes, elsewhere."""
        self.areas = [area.clone() for area in self.areas]

    @property
    def ref(self) -> DeviceRef:
        return DeviceRef(tuple(DeviceArea(b"", area.data_ptr(), len(area)) for area in self.areas))

    def entries(self, manifest: Sequence[TensorInfo]) -> tuple[BufferEntry, ...]:
        starts = [sum(len(area) for area in self.areas[:number]) for number in range(len(self.areas))]
        sizes = [info.num_bytes for info in manifest]
        return tuple(BufferEntry(index, starts[area] + offset, 0, sizes[index]) for index, area, offset in self.places)

    def buffer(self) -> StageBuffer:
        areas = self.ref.areas
        return Opened(AreaBytes(areas, [None] * len(areas), CPU), lambda: None)


def made(dtype: torch.dtype = torch.float32) -> WeightStore:
    store = WeightStore(make_map(), dtype, CPU)
    store.load(make_tensors(make_map(), 100).items())
    return store


def sent(store: WeightStore, sender: Sender, manifest: Sequence[TensorInfo], *, are_right: bool) -> list[int] | None:
    """Indices in the order in which they are whole; None where the command is looked at piece by piece."""
    moves = store.moves(sender.entries(manifest), sender.ref, are_right=are_right)
    if moves is None:
        return None
    ((whole, copy),) = filter(None, moves(sender.buffer()))
    assert copy.advance(60.0) and copy.has_written
    return list(whole)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_worked_out_once_and_moves_what_is_there_now(seed: int) -> None:
    store, choose = made(), random.Random(seed)
    tensors = make_tensors(make_map(), seed)
    manifest, sender = manifest_of(tensors), Sender(tensors, choose)
    for number in range(3):
        store.begin(manifest, "inplace", False)
        assert bool(sent(store, sender, manifest, are_right=False)) == bool(number)
        if not number:
            assert sorted(sent(store, sender, manifest, are_right=True) or ()) == list(range(len(tensors)))
        assert store.commit().is_done()
        assert live_bits(store) == live_bits(make_store(make_map(), tensors))
        tensors = {name: tensor + 1 for name, tensor in tensors.items()}
        sender.move_away()
        sender.fill(tensors)


def command() -> tuple[Sender, list[TensorInfo]]:
    """All tensors, and who sends them."""
    tensors = make_tensors(make_map(), 1)
    return Sender(tensors, random.Random(1)), manifest_of(tensors)


def begun() -> tuple[WeightStore, Sender, list[TensorInfo]]:
    """Where the plan of a command is known."""
    store, (sender, manifest) = made(), command()
    store.begin(manifest, "inplace", False)
    assert sent(store, sender, manifest, are_right=True)
    assert store.commit().is_done()
    return store, sender, manifest


def test_another_command_is_another() -> None:
    store, sender, manifest = begun()
    store.begin(manifest, "inplace", False)
    entries, ref = sender.entries(manifest), sender.ref
    grown = DeviceRef((*ref.areas[:-1], DeviceArea(b"", ref.areas[-1].offset, ref.areas[-1].size + 8)))
    assert store.moves(entries, ref, are_right=False)
    assert not store.moves(entries[::-1], ref, are_right=False)
    assert not store.moves(entries[1:], ref, are_right=False)
    assert not store.moves(entries, grown, are_right=False)
    store.abort()
    store.begin(manifest, "shadow", False)  # where else it would go
    assert not store.moves(entries, ref, are_right=True)
    store.abort()
    store.begin(manifest[:3], "inplace", True)
    assert not store.moves(entries, ref, are_right=False)


def test_more_than_moving_is_done_piece_by_piece() -> None:
    store, sender, manifest = begun()
    entries, ref = sender.entries(manifest), sender.ref
    first = entries[0]
    half = BufferEntry(first.index, first.offset, 0, (first.num_bytes or 0) // 2)
    again = BufferEntry(first.index, first.offset, 0, first.num_bytes, True)
    beyond = BufferEntry(first.index, ref.size - 4, 0, first.num_bytes)
    store.begin(manifest, "inplace", False)
    for other in (half, again, beyond):
        assert not store.moves((other, *entries[1:]), ref, are_right=True)
    store.abort()
    store.begin([TensorInfo(each.name, each.shape, "float16") for each in manifest], "inplace", False)
    assert not store.moves(entries, ref, are_right=True)


@pytest.mark.parametrize("mode", ["inplace", "shadow"])
@pytest.mark.parametrize("seed", range(4))
def test_a_tensor_that_lies_there_is_moved_by_a_launch(mode: Literal["inplace", "shadow"], seed: int) -> None:
    """One by one, as a group brings them: bit-equal to a cold load, in any dtype; one that is not contiguous, or is
    nowhere on the device, is copied block by block."""
    store, choose = made(), random.Random(seed)
    store._buffers = DeviceBuffers(CPU, lambda: None)
    tensors = make_tensors(make_map(), seed)
    if seed % 2:
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    manifest = manifest_of(tensors)
    store.begin(manifest, mode, False)
    by_launch = 0
    for index, tensor in sorted(enumerate(tensors.values()), key=lambda _: choose.random()):
        is_odd = choose.random() < 0.3 and tensor.ndim == 2
        copy = store.stage(index, tensor.t().contiguous().t() if is_odd else tensor)
        by_launch += isinstance(copy, DeviceCopies)
        assert isinstance(copy, StageWork) == (is_odd and min(tensor.shape) > 1)
        assert copy.advance(60.0)
    assert by_launch > 0
    store.commit()
    cold = WeightStore(make_map(), torch.float32, CPU)
    cold.load(tensors.items())
    assert live_bits(store) == live_bits(cold)


def test_a_tensor_that_lies_there_is_looked_at_first() -> None:
    store = made()
    store._buffers = DeviceBuffers(CPU, lambda: None)
    tensors = make_tensors(make_map(), 1)
    manifest = manifest_of(tensors)
    store.begin(manifest, "inplace", False)
    first = next(iter(tensors.values()))
    for wrong in (first.half(), first[..., :-1].contiguous()):
        with pytest.raises(WeightUpdateError, match="the manifest says"):
            store.stage(0, wrong)
    with pytest.raises(WeightUpdateError, match="finite") as caught:
        store.stage(0, torch.full_like(first, torch.nan)).advance(60.0)
    assert caught.value.field == manifest[0].name


@pytest.mark.parametrize(
    ("shape", "strides"), [((1,), (5,)), ((1, 1), (0, 3)), ((), ()), ((2, 1), (1, 7)), ((0,), (9,))]
)
def test_bytes_of_what_torch_calls_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """One element is so whatever its strides: a slice of something larger, from a trainer or another engine."""
    tensor = torch.arange(4.0).as_strided(shape, strides, 2)
    assert tensor.is_contiguous()
    assert bytes_of(tensor).tobytes() == as_bytes(tensor).numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("what", ["nan", "digest"])
def test_a_tensor_that_is_not_right_is_refused_by_name(what: str) -> None:
    store, sender, manifest = begun()
    index, area, offset = sender.places[4]
    if what == "digest":
        digests = store.digest()
        manifest = [TensorInfo(each.name, each.shape, each.dtype, digests[each.name]) for each in manifest]
    for is_bad in (False, True):
        if is_bad:
            sender.areas[area][offset : offset + 4].view(torch.float32)[:] = torch.nan if what == "nan" else 7.0
        store.begin(manifest, "inplace", False)
        moves = store.moves(sender.entries(manifest), sender.ref, are_right=True)
        assert moves is not None
        ((_, copy),) = filter(None, moves(sender.buffer()))
        if not is_bad:
            assert copy.advance(60.0)
            store.abort()
            continue
        with pytest.raises(WeightUpdateError) as caught:
            copy.advance(60.0)
        assert caught.value.field == manifest[index].name


@pytest.mark.parametrize("is_known", [False, True])
def test_what_was_staged_meanwhile_is_refused_before_a_byte_moves(is_known: bool) -> None:
    """A command is taken while others before it wait: of what they stage nothing is overwritten by it."""
    store, sender, manifest = begun() if is_known else (made(), *command())
    store._buffers = DeviceBuffers(CPU, lambda: None)
    machine = WeightMachine(store)
    session_id = machine.begin("v", manifest, "inplace", now=0.0, timeout_s=60.0).session_id

    def job(sender: Sender, count: int) -> StageJob:
        return job_from_buffer(machine, Stage(1, session_id, sender.ref, sender.entries(manifest)[-count:]), 0.0)

    other = Sender(make_tensors(make_map(), 7), random.Random(1))
    for count, also in ((len(manifest), 2), (2, len(manifest))):
        first, second = job(sender, count), job(other, also)
        assert first.advance(60.0, 0.0)
        right = live_bits(store)
        with pytest.raises(WeightUpdateError, match="was staged twice"):
            second.advance(60.0, 0.0)
        assert live_bits(store) == right
        machine.abort(session_id)
        session_id = machine.begin("v", manifest, "inplace", now=0.0, timeout_s=60.0).session_id
