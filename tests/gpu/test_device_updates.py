"""Updates whose tensors are on the core's own device, or come through pinned memory: in one process and in two."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from headrace import Engine, TensorInfo, WeightUpdateError
from headrace.engine import device_road
from headrace.engine import update as update_module
from tests.gpu.builders import (
    Background,
    Checkpoint,
    Checkpoints,
    Starter,
    check_greedy,
    greedy,
    lay_otherwise,
    random_ids,
)
from tests.gpu.test_engine_features import outputs


def named(checkpoint: Checkpoint, place: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to(place)) for name, tensor in checkpoint.named_tensors()]


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("road", ["as they lie", "device buffers", "host buffers"])
@pytest.mark.parametrize("inprocess", [True, False])
@pytest.mark.parametrize("buffer_bytes", [1 << 16, 1 << 29])
def test_every_road_ends_in_a_cold_load(
    checkpoints: Checkpoints,
    start: Starter,
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
    road: str,
    inprocess: bool,
    buffer_bytes: int,
) -> None:
    """Small buffers cut tensors into pieces; of what comes one by one nothing can be read as it lies."""
    for module in (update_module, device_road):
        monkeypatch.setattr(module, "BUFFER_BYTES", buffer_bytes)
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", inprocess=inprocess, cuda_graphs=True)
    digests = [engine.digest()]
    for version, target in (("new", new), ("old", old), ("new again", new)):
        tensors = named(target, "cpu" if road == "host buffers" else "cuda")
        if road == "device buffers":
            manifest = [(name, tuple(each.shape), "float32") for name, each in tensors]
            session = engine.begin_update(version, manifest, mode=mode)
            engine.stage(session, iter(tensors))
            engine.commit(session)
        else:
            engine.update_weights_from_tensor(tensors, version=version, mode=mode)
        digests.append(engine.digest())
    outputs(engine, new)
    assert digests[0] == digests[2] != digests[1] == digests[3]
    assert bool(engine.asynchronous.runtime.updater._road._pools) == (road == "device buffers")
    engine.shutdown()
    assert start(new, dtype="float32", cuda_graphs=False).digest() == digests[1]


def test_an_iterator_may_fill_one_tensor_again_and_again(checkpoints: Checkpoints, start: Starter) -> None:
    """Between two tensors the caller's own stream goes on."""
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", inprocess=False)
    tensors = named(new, "cuda")
    session = engine.begin_update("new", [(name, tuple(each.shape), "float32") for name, each in tensors])
    scratch = torch.empty(max(each.numel() for _, each in tensors), device="cuda")

    def again() -> Any:
        for name, each in tensors:
            view = scratch[: each.numel()].view(each.shape)
            view.copy_(each)
            yield name, view
            scratch.fill_(7.0)

    engine.stage(session, again())
    engine.commit(session)
    found = engine.digest()
    engine.shutdown()
    assert start(new, dtype="float32").digest() == found


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_nan_is_refused_by_name_and_the_old_weights_serve_on(
    checkpoints: Checkpoints, start: Starter, place: str
) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", inprocess=False)
    before = engine.digest()
    bad = [(name, tensor.clone()) for name, tensor in named(new, place)]
    bad[5][1].view(-1)[-1] = float("nan")
    with pytest.raises(WeightUpdateError, match="NaN") as caught:
        engine.update_weights_from_tensor(bad, version="bad", mode="shadow")
    assert caught.value.field == bad[5][0]
    assert engine.digest() == before
    outputs(engine, old)
    engine.update_weights_from_tensor(named(new, place), version="new", mode="shadow")
    outputs(engine, new)


@pytest.mark.alone
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_requests_run_on_under_shadow_updates(checkpoints: Checkpoints, start: Starter, place: str) -> None:
    """What is kept goes on; every piece says of which weights it is, and memory stays as it was."""
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", inprocess=False, cuda_graphs=True)
    sets = {"old": named(old, place), "new": named(new, place)}
    prompts = [random_ids(random.Random(number), 20) for number in range(8)]
    background = Background(engine, input_ids=prompts, sampling_params=greedy(2500))
    free = []
    for count in range(30):
        version = ("new", "old")[count % 2]
        label = f"{version} {count}"
        engine.update_weights_from_tensor(sets[version], version=label, mode="shadow", in_flight="keep")
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    pieces = background.answer(120.0)
    assert abs(free[-1] - free[9]) < 64 << 20
    assert all(sum(count for _, count in piece.version_spans) == 2500 for piece in pieces)
    assert max(len(piece.version_spans) for piece in pieces) > 1
    outputs(engine, old)
    prompt = random_ids(random.Random(3), 20)
    check_greedy(old, prompt, engine.generate(input_ids=prompt, sampling_params=greedy(16))[0], 1e-4)


def test_where_the_device_has_no_room_for_buffers_the_host_carries(
    checkpoints: Checkpoints, start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.parallel import device_sharing
    from headrace.types.errors import UnavailableError

    def refuse(*_: Any, **__: Any) -> None:
        raise UnavailableError("no room", field="buffer")

    monkeypatch.setattr(device_sharing, "SharedDeviceMemory", refuse)
    new = checkpoints.get(seed=1)
    engine = start(checkpoints.get(), dtype="float32", inprocess=False)
    tensors = named(new, "cuda")
    session = engine.begin_update("new", [(name, tuple(each.shape), "float32") for name, each in tensors])
    engine.stage(session, iter(tensors))
    engine.commit(session)
    outputs(engine, new)


def test_two_threads_stage_at_once(checkpoints: Checkpoints, start: Starter) -> None:
    """One session, half of the tensors from each, each on a stream of its own."""
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine: Engine = start(old, dtype="float32", inprocess=False)
    tensors = named(new, "cuda")
    session = engine.begin_update("new", [(name, tuple(each.shape), "float32") for name, each in tensors])
    errors: list[BaseException] = []
    torch.cuda.synchronize()

    def stage(part: list[tuple[str, torch.Tensor]]) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                engine.stage(session, part)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=stage, args=(tensors[start::2],)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    engine.commit(session)
    outputs(engine, new)


@pytest.mark.parametrize("inprocess", [True, False])
def test_tensors_that_do_not_lie_well_travel_beside_those_that_do(
    checkpoints: Checkpoints, start: Starter, inprocess: bool
) -> None:
    """Transposed ones, ones of the host, of another dtype, at odd addresses, and several in one allocation."""
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", inprocess=inprocess)
    tensors = named(new, "cuda")
    lay_otherwise(tensors, "cuda", in_one=(0, 3, 4))
    engine.update_weights_from_tensor(tensors, version="new")
    found = engine.digest()
    engine.shutdown()
    again = start(old, dtype="float32", inprocess=False)
    again.update_weights_from_tensor([(name, each.cpu().contiguous()) for name, each in tensors], version="new")
    assert again.digest() == found


def test_digests_of_the_manifest_are_checked_on_the_device(checkpoints: Checkpoints, start: Starter) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(new, dtype="float32", inprocess=False)
    digests = engine.digest()
    engine.update_weights_from_tensor(named(old, "cuda"), version="old")
    tensors = named(new, "cuda")
    manifest = [TensorInfo(name, tuple(each.shape), "float32", digests.get(name, "")) for name, each in tensors]
    bad = [(name, each.clone()) for name, each in tensors]
    bad[3][1].view(-1)[7] += 1.0
    session = engine.begin_update("bad", manifest)
    with pytest.raises(WeightUpdateError, match="arrived with digest") as caught:
        engine.stage(session, bad)
    assert caught.value.field == bad[3][0]
    engine.abort_update(session)
    session = engine.begin_update("new", manifest)
    engine.stage(session, tensors)
    engine.commit(session)
    assert engine.digest() == digests


@pytest.mark.alone
def test_a_thousand_updates_hold_no_more_memory(checkpoints: Checkpoints, start: Starter) -> None:
    """New tensors each time, and what they were in is the device's again afterwards."""
    old = checkpoints.get()
    engine = start(old, dtype="float32", inprocess=False)
    tensors = named(old, "cuda")
    free = []
    for count in range(1000):
        fresh = [(name, each.clone()) for name, each in tensors]
        engine.update_weights_from_tensor(fresh, version=str(count), mode=("shadow", "inplace")[count % 2])
        del fresh
        if count % 100 == 99:
            engine.generate(input_ids=[1, 2, 3], sampling_params=greedy(4))
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info()[0])
    assert max(free) - min(free) < 64 << 20, free
