"""Memory given back on a device: the driver has it when the call returns, graphs stay valid, and no bit moves."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from headrace import Engine, SamplingParams
from headrace.types.errors import ConfigError, NeedsWeightsError, UnavailableError
from tests.gpu.builders import Checkpoints, Starter

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
    engine.release_memory_occupation(["cuda_graph"])
    assert len(answers(engine)) == len(PROMPTS)


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
