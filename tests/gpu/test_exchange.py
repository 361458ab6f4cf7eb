"""Shadow updates whose commit exchanges memory: what is live, what captured graphs and readers find, what is kept."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from headrace.runner.device_block import DeviceBlock
from headrace.runner.occupation import Occupation
from headrace.runner.step_runner import StepRunner
from headrace.types.weights import UpdateMode
from headrace.weights import live_reading
from headrace.weights.boxes import Box
from headrace.weights.memory import StagePiece
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import Derived, ParamSpec, WeightMap, whole_rows
from tests.gpu.builders import Checkpoints, Starter, check_greedy, greedy, random_ids
from tests.gpu.test_device_updates import named
from tests.gpu.test_engine_features import outputs
from tests.gpu.test_released_memory import free_memory, num_replays
from tests.weights.tiny import Tensors, manifest_of

MIB = 1 << 20
WIDTH = 4096
BLOCK_BYTES = 4 * (4100 + 3 * 2048 + 2) * WIDTH  # 160 MiB
SLACK = 48 * MIB  # what contexts and kernels that are loaded late take


@pytest.fixture(autouse=True)
def exchanged(monkeypatch: pytest.MonkeyPatch) -> list[DeviceBlock]:
    """The block of each exchange in this process."""
    found: list[DeviceBlock] = []
    real = DeviceBlock.exchange

    def exchange(block: DeviceBlock) -> None:
        found.append(block)
        real(block)

    monkeypatch.setattr(DeviceBlock, "exchange", exchange)
    return found


def large_map() -> WeightMap:
    """Parameters with padding, of several tensors, and derived."""
    params = [ParamSpec("embed", (4100, WIDTH), padding=(Box((4096, 0), (4, WIDTH)),)), ParamSpec("norm", (WIDTH,))]
    params.append(ParamSpec("qkv", (3 * 2048, WIDTH)))
    rules = [whole_rows("embed.weight", "embed", 0, (4096, WIDTH)), whole_rows("norm.weight", "norm", 0, (WIDTH,))]
    rules += [whole_rows(f"{name}.weight", "qkv", 2048 * at, (2048, WIDTH)) for at, name in enumerate("qkv")]
    return WeightMap(params, rules, derived=[Derived(ParamSpec("sum", (WIDTH,)), ("qkv",), lambda qkv: qkv.sum(0))])


def tensors_of(seed: int) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(seed)
    rules = large_map().rules_by_name
    return {name: torch.randn(rule.shape, generator=generator, device="cuda") for name, rule in rules.items()}


class Built:
    """A store over the blocks of this device."""

    def __init__(self) -> None:
        device = torch.zeros(1, device="cuda").device  # whose context is current then
        self.occupation = Occupation(device, is_saver=False)
        self.store = WeightStore(large_map(), torch.float32, device, allocate=self.occupation.parameters)

    def update(self, tensors: Tensors, mode: UpdateMode = "shadow", *, partial: bool = False) -> None:
        self.begin(tensors, mode, partial=partial)
        done(self.store.commit().is_done)

    def begin(self, tensors: Tensors, mode: UpdateMode = "shadow", *, partial: bool = False) -> None:
        """Up to the commit."""
        torch.cuda.synchronize()
        assert self.store.begin(manifest_of(tensors), mode, partial) == mode
        flat = (tensor.view(-1).view(torch.uint8) for tensor in tensors.values())
        copies = self.store.stage_all(StagePiece(at, data, None, True, False) for at, data in enumerate(flat))
        done(lambda: copies.advance(0.01))


def sums_of(store: WeightStore) -> torch.Tensor:
    """The sum of every parameter."""
    return torch.stack([each.sum() for each in store.live.values()])


def done(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_done():
        assert time.monotonic() < deadline


def cold(tensors: Tensors) -> tuple[dict[str, str], torch.Tensor]:
    """Digests and sums of a load into memory of torch's."""
    store = WeightStore(large_map(), torch.float32, torch.device("cuda", torch.cuda.current_device()))
    store.load(tensors.items())
    return store.digest(), sums_of(store)


@pytest.fixture
def built() -> Iterator[Built]:
    found = Built()
    yield found
    found.store.close()
    found.occupation.close()
    gc.collect()
    torch.cuda.empty_cache()


def test_each_of_twenty_updates_is_a_cold_load_and_captured_graphs_read_it(
    built: Built, exchanged: list[DeviceBlock]
) -> None:
    sets = [tensors_of(seed) for seed in range(3)]
    expected = [cold(tensors) for tensors in sets]
    built.update(sets[0])
    addresses = [each.data_ptr() for each in built.store.live.values()]
    sums_of(built.store)
    found, graph = torch.zeros(len(addresses), device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.copy_(sums_of(built.store))
    for number in range(1, 21):
        built.update(sets[number % 3])
        graph.replay()
        digests, sums = expected[number % 3]
        assert torch.equal(found, sums) and torch.equal(sums_of(built.store), sums)
        assert built.store.digest() == digests
        assert not built.store.live["embed"][4096:].any()
        assert torch.equal(built.store.live["sum"], built.store.live["qkv"].sum(0))
    assert len(exchanged) == 21 and addresses == [each.data_ptr() for each in built.store.live.values()]


def test_updates_of_every_kind_follow_each_other(built: Built, exchanged: list[DeviceBlock]) -> None:
    tensors = tensors_of(0)
    built.store.load(tensors.items())
    choose = random.Random(0)
    for seed in range(1, 25):
        new, kind = tensors_of(seed), choose.choice(["shadow", "shadow", "some", "some in place", "inplace", "abort"])
        if kind.startswith("some"):
            new = {name: new[name] for name in choose.sample(list(new), 2)}
            built.update(new, "inplace" if kind == "some in place" else "shadow", partial=True)
        elif kind == "abort":
            built.begin(new)
            built.store.abort()
            new = {}
        else:
            built.update(new, "inplace" if kind == "inplace" else "shadow")
        tensors = {**tensors, **new}
        assert built.store.digest() == cold(tensors)[0], kind
    assert exchanged


def test_a_commit_waits_for_steps_and_readers_go_on(
    built: Built, exchanged: list[DeviceBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_reading, "DEVICE_SLICE_BYTES", 32 * MIB)
    old, new = tensors_of(0), tensors_of(1)
    built.store.load(old.items())
    built.begin(new)
    reading = built.store.digest_in_slices()
    next(reading)
    seen = torch.zeros(WIDTH, device="cuda")
    torch.cuda._sleep(200_000_000)  # a tenth of a second
    seen.copy_(built.store.live["norm"])
    done(built.store.commit().is_done)
    assert exchanged and torch.equal(seen, old["norm.weight"])
    assert len(list(reading)) > 2
    assert built.store.digest() == cold(new)[0]


def drivers_bytes() -> int:
    """What the device has given to others than torch: blocks, twins, contexts."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@pytest.mark.alone
def test_a_hundred_updates_hold_one_twin_and_a_release_gives_it_back(
    built: Built, exchanged: list[DeviceBlock]
) -> None:
    sets = [tensors_of(seed) for seed in range(2)]
    built.store.load(sets[0].items())
    digests = [cold(tensors)[0] for tensors in sets]
    built.update(sets[1])
    built.occupation.let_twins_go()
    one_block, taken, allocated = drivers_bytes(), [], []
    for number in range(100):
        built.update(sets[number % 2])
        taken.append(drivers_bytes() - one_block)
        allocated.append(torch.cuda.memory_allocated())
    assert max(taken) - min(taken) < SLACK and abs(taken[-1] - BLOCK_BYTES) < SLACK, taken
    assert max(allocated) - min(allocated) < MIB, allocated
    for _ in built.occupation.release(["weights"], keeps_copy=True):
        pass
    assert abs(drivers_bytes() - one_block + BLOCK_BYTES) < SLACK
    for _ in built.occupation.resume(["weights"], "copy"):
        pass
    assert abs(drivers_bytes() - one_block) < SLACK and built.store.digest() == digests[1]
    built.update(sets[0])
    assert built.store.digest() == digests[0]
    built.store.close()
    built.occupation.close()
    exchanged.clear()  # the list holds them too
    assert abs(drivers_bytes() - one_block + BLOCK_BYTES) < SLACK


@pytest.mark.alone
def test_without_room_for_a_twin_the_commit_copies(built: Built, exchanged: list[DeviceBlock]) -> None:
    new = tensors_of(1)
    digests = cold(new)[0]
    built.store.load(tensors_of(0).items())
    kept = [torch.empty(BLOCK_BYTES + 300 * MIB, dtype=torch.uint8, device="cuda")]
    kept.append(torch.empty(free_memory() - 200 * MIB, dtype=torch.uint8, device="cuda"))
    del kept[0]  # torch's for a shadow, and no twin's
    built.update(new)
    assert not exchanged and built.store.digest() == digests


@pytest.mark.parametrize("inprocess", [True, False])
@pytest.mark.parametrize("is_saver", [True, False])
def test_an_engine_serves_each_set_of_weights(
    checkpoints: Checkpoints, start: Starter, exchanged: list[DeviceBlock], inprocess: bool, is_saver: bool
) -> None:
    """In a caller's process only with the saver: what an update leaves is his then at once."""
    sets = [checkpoints.get(), checkpoints.get(seed=1)]
    settings: dict[str, Any] = {"dtype": "float32", "cuda_graphs": True, "inprocess": inprocess}
    engine = start(sets[0], memory_saver=is_saver, keep_weights_copy=is_saver, **settings)
    digests = [engine.digest()]
    prompt = random_ids(random.Random(3), 20)
    for number in range(1, 20):
        target, replays = sets[number % 2], num_replays(engine)
        engine.update_weights_from_tensor(named(target, "cuda"), version=str(number), mode="shadow")
        digests.append(engine.digest())
        check_greedy(target, prompt, engine.generate(input_ids=prompt, sampling_params=greedy(8))[0], 1e-4)
        assert num_replays(engine) > replays
    assert digests == [digests[0], digests[1]] * 10 and digests[0] != digests[1]
    assert len(exchanged) == (19 if inprocess and is_saver else 0)
    name, tensor = named(sets[0], "cuda")[3]
    session = engine.begin_update("part", [(name, tuple(tensor.shape), "float32")], mode="shadow", partial=True)
    engine.stage(session, [(name, tensor)])
    engine.commit(session)
    changed = {each for each, digest in engine.digest().items() if digest != digests[1][each]}
    assert changed == {name}
    if is_saver:
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
    engine.update_weights_from_tensor(named(sets[1], "cuda"), version="again", mode="shadow")
    outputs(engine, sets[1])


def test_a_step_that_finds_no_memory_gets_what_is_kept(
    checkpoints: Checkpoints, start: Starter, exchanged: list[DeviceBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = checkpoints.get(seed=1)
    engine = start(checkpoints.get(), dtype="float32", memory_saver=True)
    engine.update_weights_from_tensor(named(target, "cuda"), version="new", mode="shadow")
    (block,) = exchanged
    assert block.has_twin
    real, faults = StepRunner.launch, [torch.OutOfMemoryError("CUDA out of memory")]

    def launch(steps: StepRunner, plan: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(steps, plan)

    monkeypatch.setattr(StepRunner, "launch", launch)
    outputs(engine, target)
    assert not faults and not block.has_twin
