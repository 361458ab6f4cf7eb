"""Memory given back on a device: the driver has it when the call returns, graphs stay valid, and no bit moves."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from typing import Any

import pytest
import torch

from headrace import Engine, SamplingParams
from headrace.types.errors import ConfigError, NeedsWeightsError, UnavailableError
from tests.gpu.builders import Checkpoints, Starter, bits

pytestmark = pytest.mark.alone

MIB = 1 << 20
PARAMS = SamplingParams(max_new_tokens=24, temperature=1.0, ignore_eos=True, seed=3)
PROMPTS = [[number + 1, *range(5, 60)] for number in range(16)]


def free_memory() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def answers(engine: Engine) -> list[Any]:
    found = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    return [(list(each.token_ids), list(each.logprobs)) for each in found]


def taken_bytes(engine: Engine, checkpoints: Checkpoints) -> int:
    """Of weights and KV."""
    resolved = engine.resolved
    weights: int = sum(p.numel() * p.element_size() for p in checkpoints.get().model.parameters())
    return weights + resolved.num_pages * resolved.engine.page_size * resolved.kv_bytes_per_token


def pool_bytes() -> int:
    """What torch has in this process for what was captured."""
    segments: Any = torch.cuda.memory_snapshot()
    return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) != (0, 0))


def pool_bytes_of_others() -> int:
    """The same before an engine starts, without what nobody uses any more."""
    gc.collect()
    torch.cuda.empty_cache()
    return pool_bytes()


def one_by_one(engine: Engine, num_prompts: int = 4) -> Any:
    """Of every prompt the bits of what comes when it is alone and nothing of it is cached."""
    engine.flush_cache()
    return [bits(engine.generate(input_ids=prompt, sampling_params=PARAMS)) for prompt in PROMPTS[:num_prompts]]


def num_replays(engine: Engine) -> float:
    return engine.metrics()["num_graph_replays"]


@pytest.mark.parametrize("attention_backend", ["triton", "reference"])
@pytest.mark.parametrize("restore", ["copy", "disk"])
def test_cycles_free_the_memory_and_move_no_bit(
    start: Starter, checkpoints: Checkpoints, attention_backend: str, restore: Any
) -> None:
    settings = {"memory_saver": True, "keep_weights_copy": restore == "copy", "attention_backend": attention_backend}
    engine = start(checkpoints.get(), **settings)
    expected, digests = answers(engine), engine.digest()
    floors = []
    for _ in range(8):
        before = free_memory()
        engine.release_memory_occupation()
        floors.append(free_memory())
        assert floors[-1] - before > 0.9 * taken_bytes(engine, checkpoints)
        engine.resume_memory_occupation(restore=restore)
        assert answers(engine) == expected and engine.digest() == digests
    assert max(floors) - min(floors) < 64 * MIB
    if attention_backend == "triton":
        assert engine.metrics()["num_compiled_after_ready"] == 0


def test_an_update_after_a_release(start: Starter, checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints.get()
    engine = start(checkpoint, memory_saver=True)
    expected, digests = answers(engine), engine.digest()
    engine.release_memory_occupation()
    engine.resume_memory_occupation(["weights"])
    with pytest.raises(NeedsWeightsError):
        answers(engine)
    engine.update_weights_from_disk(checkpoint.folder, "again")
    engine.resume_memory_occupation()
    assert answers(engine) == expected and engine.digest() == digests


def test_no_room_is_an_error_and_may_be_tried_again(start: Starter, checkpoints: Checkpoints) -> None:
    engine = start(checkpoints.get(), memory_saver=True, keep_weights_copy=True)
    expected = answers(engine)
    engine.release_memory_occupation()
    taken = torch.empty(free_memory() - 64 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(UnavailableError, match="MiB of the device are free") as caught:
        engine.resume_memory_occupation()
    assert caught.value.field == "tags"
    del taken
    torch.cuda.empty_cache()
    engine.resume_memory_occupation()
    assert answers(engine) == expected


def test_without_the_setting_a_release_is_refused_by_name(start: Starter, checkpoints: Checkpoints) -> None:
    engine = start(checkpoints.get())
    with pytest.raises(ConfigError) as caught:
        engine.release_memory_occupation()
    assert caught.value.field == "memory_saver"
    assert engine.status().released == ()


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_released_graphs_give_their_memory_back_and_come_back(
    start: Starter, checkpoints: Checkpoints, numerics: str
) -> None:
    """Steps run without them meanwhile, and move no bit. No setting is needed. What the first cycle finds is more than
    later ones: what torch had kept since the start goes too."""
    base = pool_bytes_of_others()
    engine = start(checkpoints.get(), numerics=numerics)
    held, expected = pool_bytes() - base, one_by_one(engine)
    assert held > 4 * MIB
    free, left = [], []
    for _ in range(6):
        before, replays = free_memory(), num_replays(engine)
        engine.release_memory_occupation(["cuda_graph"])
        free.append(free_memory())
        assert free[-1] - before >= held and pool_bytes() <= base
        assert one_by_one(engine) == expected and num_replays(engine) == replays
        engine.resume_memory_occupation(["cuda_graph"])
        assert abs(pool_bytes() - base - held) <= 48 * MIB  # torch may have the workspace of products in it
        assert one_by_one(engine) == expected and num_replays(engine) > replays
        left.append(free_memory())
    assert max(free[1:]) - min(free[1:]) < 32 * MIB and max(left[1:]) - min(left[1:]) < 32 * MIB
    assert engine.metrics()["num_compiled_after_ready"] == 0


@pytest.mark.parametrize(
    "order",
    [
        ("weights", "kv_cache", "cuda_graph"),
        ("cuda_graph", "kv_cache", "weights"),
        ("kv_cache", "cuda_graph", "weights"),
    ],
)
def test_the_last_tag_that_comes_back_brings_the_graphs(
    start: Starter, checkpoints: Checkpoints, order: tuple[Any, ...]
) -> None:
    base = pool_bytes_of_others()
    engine = start(checkpoints.get(), memory_saver=True, keep_weights_copy=True, numerics="invariant")
    held, expected, digests = pool_bytes() - base, answers(engine), engine.digest()
    for _ in range(2):
        before, replays = free_memory(), num_replays(engine)
        engine.release_memory_occupation()
        assert free_memory() - before > 0.9 * taken_bytes(engine, checkpoints) + held and pool_bytes() <= base
        for tag in order:
            assert pool_bytes() <= base
            engine.resume_memory_occupation([tag])
        assert pool_bytes() > base
        assert answers(engine) == expected and num_replays(engine) > replays and engine.digest() == digests


def test_a_prefix_that_is_cached_stays_so_without_graphs_and_with_them_again(
    start: Starter, checkpoints: Checkpoints
) -> None:
    """A capture writes to no page."""
    engine = start(checkpoints.get())
    prompt = [5 + number % 4000 for number in range(3000)]
    engine.generate(input_ids=prompt, sampling_params=PARAMS)
    expected = engine.generate(input_ids=prompt, sampling_params=PARAMS)
    assert expected[0].num_cached_tokens > 2900
    for call in (engine.release_memory_occupation, engine.resume_memory_occupation) * 2:
        call(["cuda_graph"])
        found = engine.generate(input_ids=prompt, sampling_params=PARAMS)
        assert found[0].num_cached_tokens == expected[0].num_cached_tokens and bits(found) == bits(expected)


def test_requests_run_on_while_graphs_go_and_come(start: Starter, checkpoints: Checkpoints) -> None:
    engine = start(checkpoints.get(), numerics="invariant")
    long = SamplingParams(max_new_tokens=1500, temperature=1.0, ignore_eos=True, seed=3)
    expected = bits(engine.generate(input_ids=PROMPTS, sampling_params=long))
    engine.flush_cache()
    found: list[Any] = []
    before = engine.metrics()["num_generated_tokens"]
    thread = threading.Thread(target=lambda: found.extend(engine.generate(input_ids=PROMPTS, sampling_params=long)))
    thread.start()
    deadline = time.monotonic() + 30
    while engine.metrics()["num_generated_tokens"] < before + 16:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    engine.release_memory_occupation(["cuda_graph"])
    assert thread.is_alive()
    engine.resume_memory_occupation(["cuda_graph"])
    thread.join(60)
    assert bits(found) == expected and {each.finish_reason for each in found} == {"length"}


def test_graphs_for_which_there_is_no_room_may_be_asked_for_again(start: Starter, checkpoints: Checkpoints) -> None:
    """It takes nothing, and steps run on without them."""
    base = pool_bytes_of_others()
    engine = start(checkpoints.get(), numerics="invariant")
    expected = answers(engine)
    engine.release_memory_occupation(["cuda_graph"])
    taken = [torch.empty(free_memory() - 64 * MIB, dtype=torch.uint8, device="cuda")]
    with contextlib.suppress(torch.OutOfMemoryError):
        while True:
            taken.append(torch.empty(12 * MIB, dtype=torch.uint8, device="cuda"))
    replays = num_replays(engine)
    with pytest.raises(UnavailableError, match="cuda_graph need 0 MiB and what graphs take") as caught:
        engine.resume_memory_occupation()
    assert caught.value.field == "tags" and engine.status().released == ("cuda_graph",) and pool_bytes() <= base
    del taken
    torch.cuda.empty_cache()
    assert answers(engine) == expected and num_replays(engine) == replays
    engine.resume_memory_occupation()
    assert answers(engine) == expected and num_replays(engine) > replays


def test_the_saver_moves_no_bit_and_gives_all_back_at_the_end(start: Starter, checkpoints: Checkpoints) -> None:
    """What the driver keeps for code that ran once, it takes with the first of two."""
    plain = start(checkpoints.get())
    expected = answers(plain)
    plain.shutdown()
    left = []
    for _ in range(2):
        saver = start(checkpoints.get(), memory_saver=True)
        assert answers(saver) == expected
        saver.shutdown()
        del saver
        left.append(free_memory())
    assert left[1] > left[0] - 64 * MIB
