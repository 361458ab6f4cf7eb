"""Updates of two ranks, each on a device of its own, from tensors that lie on either: every rank reads them there."""

from __future__ import annotations

import base64
import functools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from headrace import Engine, TensorInfo, UnavailableError, WeightUpdateError, serve
from headrace.engine import update as update_module
from headrace.parallel import device_sharing
from headrace.rl import VerlEngine
from headrace.rl.demo import checkpoint_digests
from headrace.types.messages import Stage
from headrace.types.weights import BufferRef, DeviceRef
from tests.gpu.builders import (
    SETTINGS,
    Checkpoint,
    Checkpoints,
    Starter,
    check_greedy,
    greedy,
    lay_otherwise,
    random_ids,
    start_engine,
)
from tests.gpu.test_ranks import TWO
from tests.rl.trainer_ranks import run_ranks
from tests.rl.verl_bodies import digest as digest_of
from tests.rl.verl_bodies import mesh_of, tensors_of
from tests.weights.foreign_sender import Sender

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device"),
]
DEVICES = ("cuda:0", "cuda:1")
PLAIN: dict[str, Any] = {**TWO, "dtype": "float32", "cuda_graphs": False}
PROMPT = random_ids(random.Random(1), 60)
Tensors = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def engine(checkpoints: Checkpoints) -> Iterator[Engine]:
    found = start_engine(checkpoints.get().folder, **PLAIN)
    yield found
    found.shutdown()


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where the tensors of an update were, as cores were told."""
    found: list[Any] = []

    def note(call_id: int, session_id: int, ref: Any, entries: Any) -> Stage:
        found.append(ref)
        return Stage(call_id, session_id, ref, entries)

    monkeypatch.setattr(update_module, "Stage", note)
    return found


def placed(checkpoint: Checkpoint, *places: str) -> Tensors:
    """Its tensors in memory of their own, on these devices in turn."""
    named = checkpoint.named_tensors()
    return [(name, tensor.to(places[number % len(places)], copy=True)) for number, (name, tensor) in enumerate(named)]


def digests_by_the_host(engine: Engine, checkpoint: Checkpoint) -> dict[str, str]:
    engine.update_weights_from_tensor(placed(checkpoint, "cpu"), "by the host")
    return engine.digest()


def check(engine: Engine, checkpoint: Checkpoint, digests: dict[str, str]) -> None:
    assert engine.digest() == digests
    check_greedy(checkpoint, PROMPT, engine.generate(input_ids=PROMPT, sampling_params=greedy(12))[0], 1e-3)


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("places", [DEVICES[:1], DEVICES[1:], DEVICES], ids=["first", "second", "both"])
def test_tensors_are_read_where_they_lie(
    engine: Engine, checkpoints: Checkpoints, staged: list[Any], mode: Any, places: tuple[str, ...]
) -> None:
    sets = (checkpoints.get(seed=1), checkpoints.get())
    digests = [digests_by_the_host(engine, each) for each in sets]
    assert digests[0] != digests[1]
    staged.clear()
    for version, checkpoint, expected in zip(("new", "old"), sets, digests, strict=True):
        report = engine.update_weights_from_tensor(placed(checkpoint, *places), version, mode=mode)
        assert report.mode == mode
        check(engine, checkpoint, expected)
    assert staged and all(isinstance(ref, DeviceRef) for ref in staged)


def test_tensors_that_do_not_lie_well_travel_beside_those_that_do(
    engine: Engine, checkpoints: Checkpoints, staged: list[Any]
) -> None:
    """Transposed ones on both devices, ones of the host, of another dtype, and parts of one allocation."""
    new = checkpoints.get(seed=1)
    tensors = placed(new, *DEVICES)
    lay_otherwise(tensors, DEVICES[1], in_one=(3,))
    engine.update_weights_from_tensor([(name, each.cpu().contiguous()) for name, each in tensors], "by the host")
    expected = engine.digest()
    digests_by_the_host(engine, checkpoints.get())
    staged.clear()
    engine.update_weights_from_tensor(tensors, "new")
    assert engine.digest() == expected
    assert {type(ref) for ref in staged} == {BufferRef, DeviceRef}


@pytest.mark.parametrize("why", ["one by one", "not shared"])
def test_what_cannot_be_named_goes_through_buffers_on_its_device(
    engine: Engine, checkpoints: Checkpoints, staged: list[Any], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """As of an iterator, or in memory that the driver does not share."""
    new = checkpoints.get(seed=1)
    expected = digests_by_the_host(engine, new)
    digests_by_the_host(engine, checkpoints.get())
    staged.clear()
    tensors = placed(new, *DEVICES)
    if why == "one by one":
        manifest = [(name, tuple(each.shape), "float32") for name, each in tensors]
        session = engine.begin_update("new", manifest, mode="inplace")
        engine.stage(session, iter(tensors))
        engine.commit(session)
    else:

        def refuse(address: int) -> tuple[int, int]:
            raise UnavailableError("the driver could not find an allocation: error 1", field="buffer")

        monkeypatch.setattr(device_sharing, "allocation_of", refuse)
        engine.update_weights_from_tensor(tensors, "new", mode="shadow")
    check(engine, new, expected)
    assert staged and all(isinstance(ref, DeviceRef) for ref in staged)


def test_digests_of_the_manifest_and_nan_are_found_by_name(engine: Engine, checkpoints: Checkpoints) -> None:
    new = checkpoints.get(seed=1)
    expected = digests_by_the_host(engine, new)
    old = digests_by_the_host(engine, checkpoints.get())
    tensors = placed(new, *DEVICES)
    manifest = [TensorInfo(name, tuple(each.shape), "float32", expected.get(name, "")) for name, each in tensors]
    for value in (1.0, float("nan")):
        bad = [(name, each.clone()) for name, each in tensors]
        bad[3][1].view(-1)[-1] += value  # on the second device, in the last rank's share
        session = engine.begin_update("bad", manifest, mode="shadow")
        with pytest.raises(WeightUpdateError, match="arrived with digest|NaN") as caught:
            engine.stage(session, bad)
        assert caught.value.field == bad[3][0]
        engine.abort_update(session)
        assert engine.digest() == old
    session = engine.begin_update("new", manifest)
    engine.stage(session, tensors)
    engine.commit(session)
    check(engine, new, expected)


def test_many_updates_hold_no_memory_of_either_device(engine: Engine, checkpoints: Checkpoints) -> None:
    """New tensors each time, whose memory is the devices' again, and what ranks had mapped of it is not."""
    old = checkpoints.get()
    free: list[list[int]] = []
    for count in range(50):
        fresh = placed(old, *DEVICES)
        engine.update_weights_from_tensor(fresh, str(count), mode=("shadow", "inplace")[count % 2])
        del fresh
        if count % 10 == 9:
            engine.generate(input_ids=PROMPT, sampling_params=greedy(4))
            time.sleep(0.5)  # the ranks let go of the last one's
            torch.cuda.empty_cache()
            free.append([torch.cuda.mem_get_info(device)[0] for device in DEVICES])
    for device in zip(*free, strict=True):
        assert max(device) - min(device) < 64 << 20, free


def test_one_rank_reads_from_another_device(start: Starter, checkpoints: Checkpoints, staged: list[Any]) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", inprocess=False, cuda_graphs=False)
    expected = digests_by_the_host(engine, new)
    digests_by_the_host(engine, old)
    staged.clear()
    engine.update_weights_from_tensor(placed(new, DEVICES[1]), "new", mode="shadow")
    check(engine, new, expected)
    assert staged and all(isinstance(ref, DeviceRef) for ref in staged)


def test_stages_read_what_lies_on_either_device(start: Starter, checkpoints: Checkpoints, staged: list[Any]) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, **(PLAIN | {"tp_size": 1, "pp_size": 2}))
    expected = digests_by_the_host(engine, new)
    digests_by_the_host(engine, old)
    staged.clear()
    engine.update_weights_from_tensor(placed(new, *DEVICES), "new", mode="inplace")
    assert engine.digest() == expected
    assert staged and all(isinstance(ref, DeviceRef) for ref in staged)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_to_share_is_had_and_given_back_in_any_thread(device: str) -> None:
    """Also in one that has used no device before."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        make = functools.partial(device_sharing.SharedDeviceMemory, shares_process=False)
        memory = one.submit(make, 1 << 20, torch.device(device)).result()
        memory.view(8, 4).fill_(7)
        memory.flush()
        assert memory.view(8, 4).tolist() == [7] * 4 and memory.ref.size == 1 << 20
        other.submit(memory.close).result()


@pytest.fixture
def senders() -> Iterator[list[Sender]]:
    """A trainer's ranks, each with a device of its own."""
    found = [Sender(device) for device in DEVICES]
    yield found
    for each in found:
        each.end()


def load(sender: Sender, checkpoint: Checkpoint) -> None:
    path = str(checkpoint.folder / "model.safetensors")
    sender.ask(f"kept.clear() or kept.update(__import__('safetensors.torch').torch.load_file({path!r}, sys.argv[1]))")


@pytest.mark.parametrize("style", ["slime", "verl"])
def test_each_rank_reads_the_payload_of_its_own_device(
    engine: Engine, checkpoints: Checkpoints, senders: list[Sender], style: str
) -> None:
    """One entry for each rank, by its place in the list; every sender gets its memory back."""
    sets = (checkpoints.get(seed=1), checkpoints.get())
    digests = [digests_by_the_host(engine, each) for each in sets]
    handle = serve(engine)
    sent = "flattened(kept)" if style == "slime" else "serialized(list(kept.items()))"
    load_format = "flattened_bucket" if style == "slime" else None

    def post() -> httpx.Response:
        entries = [sender.ask(sent) for sender in senders]
        assert all(base64.b64decode(each) for each in entries)
        body = {"serialized_named_tensors": entries, "load_format": load_format, "weight_version": "v"}
        return httpx.post(handle.url + "/update_weights_from_tensor", json=body, timeout=60)

    held: list[list[int]] = []
    try:
        for checkpoint, expected in (*zip(sets, digests, strict=True), *zip(sets, digests, strict=True)):
            for sender in senders:
                load(sender, checkpoint)
            reply = post()
            assert reply.status_code == 200, reply.text
            check(engine, checkpoint, expected)
            for sender in senders:
                sender.ask("kept.clear()")
                sender.ask("torch.cuda.ipc_collect()")
            held.append([int(sender.ask("torch.cuda.memory_allocated()")) for sender in senders])
        for sender in senders:
            load(sender, sets[0])
        name = "model.layers.0.mlp.up_proj.weight"
        senders[1].ask(f"kept[{name!r}][-1, -1].fill_(float('nan'))")  # in the share of rank 1, whose payload has it
        reply = post()
        assert reply.status_code == 400 and reply.json()["param"] == name, reply.text
        assert "NaN" in reply.text and "on rank 1" in reply.text
        assert engine.digest() == digests[1]
    finally:
        handle.stop()
    assert held[1] == held[-1], held


def test_ranks_of_a_trainer_share_an_engine_that_reads_their_devices(checkpoints: Checkpoints) -> None:
    """Of tensors that all of them have whole, rank 0's are read where they lie."""
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    seen = run_ranks(2, update_from_devices, str(old.folder), str(new.folder))
    (kinds, digest), (no_kinds, no_digest) = seen
    assert kinds == ["DeviceRef"] and digest == checkpoint_digests(new.folder)
    assert no_kinds == [] and no_digest is None


def update_from_devices(rank: int, folder: str, newer: str) -> tuple[list[str], dict[str, str] | None]:
    """What one of two ranks sees: where its engine was told that tensors are, and what that holds then."""
    kinds: set[str] = set()

    def note(call_id: int, session_id: int, ref: Any, entries: Any) -> Stage:
        kinds.add(type(ref).__name__)
        return Stage(call_id, session_id, ref, entries)

    vars(update_module)["Stage"] = note
    settings = {**SETTINGS, **PLAIN, "rank_timeout": 60}
    with VerlEngine(mesh_of(2), model_path=folder, **settings) as engine:
        tensors = [(name, tensor.to(DEVICES[rank])) for name, tensor in tensors_of(newer).items()]
        for version in ("one", "two"):
            engine.update_weights_from_tensor(tensors, weight_version=version)
        return sorted(kinds), digest_of(engine)
