"""Device memory: the pool is what measurement leaves, a burst of the greatest steps fits, and all of it comes back."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace import Engine, SamplingParams
from headrace.types.errors import ConfigError
from tests.gpu.builders import DEVICE, Background, random_ids, start_engine

pytestmark = pytest.mark.alone

MIB = 1 << 20
GIB = 1 << 30
NUM_ROWS = 512
VOCAB_SIZE = 151_936
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
KV_BYTES = 2 * 8 * 8 * 128 * 2
"""Per token: so many that no fraction of a large device is enough for all rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few weights under a large vocabulary: what a step needs for logits outweighs the rest."""
    path = tmp_path_factory.mktemp("wide")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """Nothing that other tests left is counted, and what a process takes once has been taken."""
    torch.mm(*torch.ones(2, 64, 64, device=DEVICE))
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def free_memory() -> int:
    """Bytes of the device that no process holds. What this process's allocator keeps is held."""
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def start_wide(folder: Path, **settings: object) -> Engine:
    """With as many rows and tokens in a step as the defaults allow, and a pool of what is left."""
    sizes = {"max_running_requests": NUM_ROWS, "max_num_batched_tokens": 4096, "kv_pool_tokens": None}
    return start_engine(folder, **{"load_format": "dummy", **sizes, **settings})


def burst(engine: Engine) -> None:
    """Every row at once, prompts that fill steps, every processor, and all log-probabilities there are."""
    choose = random.Random(0)
    params = SamplingParams(
        max_new_tokens=48, ignore_eos=True, top_k=50, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1
    )
    many = [random_ids(choose, choose.randint(1, 60)) for _ in range(NUM_ROWS - 16)]
    rows = Background(engine, input_ids=many, sampling_params=params, top_logprobs=20)
    scored = Background(
        engine,
        input_ids=[random_ids(choose, 1200) for _ in range(16)],
        sampling_params=SamplingParams(max_new_tokens=8, ignore_eos=True),
        return_prompt_logprobs=True,
        top_logprobs=20,
        logprob_token_ids=[0, VOCAB_SIZE - 1],
    )
    found = rows.answer(120.0) + scored.answer(120.0)
    assert len(found) == NUM_ROWS
    assert all(piece.finish_reason == "length" for piece in found)
    assert all(len(piece.prompt_top_logprobs) == 1200 for piece in found[-16:])
    [deep] = engine.score(input_ids=[random_ids(choose, 100)], top_logprobs=1024)
    assert len(deep.prompt_top_logprobs[-1] or {}) == 1024
    metrics = engine.metrics()
    assert metrics["num_failed_steps"] == metrics["num_failed"] == 0


def crowd(num_left: int) -> Tensor:
    """Take device memory until `num_left` bytes are free."""
    return torch.empty(free_memory() - num_left, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(
    ("fraction", "inprocess", "num_left"),
    [(0.3, True, None), (0.9, False, None), (0.9, True, 10 * GIB)],
    ids=["0.3 in process", "0.9", "0.9 of 10 GiB"],
)
def test_a_pool_of_what_is_left_survives_the_greatest_burst(
    folder: Path, fraction: float, inprocess: bool, num_left: int | None
) -> None:
    others = crowd(num_left) if num_left is not None else None
    before = free_memory()
    with start_wide(folder, memory_fraction=fraction, inprocess=inprocess) as engine:
        ready = free_memory()
        assert ready >= (1 - fraction) * before - 256 * MIB
        num_bytes = engine.status().max_total_num_tokens * KV_BYTES
        assert num_bytes > 0.8 * (fraction * before - 4 * GIB), "the pool is most of the share"
        for _ in range(2):
            burst(engine)
        assert free_memory() >= (1 - fraction) * before - 256 * MIB
    del others


def test_a_pool_of_given_size(folder: Path) -> None:
    before = free_memory()
    with start_wide(folder, kv_pool_tokens=1 << 16) as engine:
        assert engine.status().max_total_num_tokens == 1 << 16
        burst(engine)
        taken = before - free_memory()
        assert taken < (1 << 16) * KV_BYTES + 5 * GIB, "the pool, the weights, and one step"


def test_engines_one_after_the_other_in_one_process(folder: Path) -> None:
    """Shut down, an engine gives back pool, weights and graphs, so the next finds as much."""
    before, sizes = free_memory(), []
    for _ in range(2):
        engine = start_wide(folder, memory_fraction=0.9, inprocess=True)
        sizes.append(engine.status().max_total_num_tokens)
        engine.generate(input_ids=[5, 6, 7], sampling_params=SamplingParams(max_new_tokens=4))
        engine.shutdown()
        del engine
        assert free_memory() >= before - 300 * MIB
    assert sizes[1] >= 0.99 * sizes[0]


def test_too_little_memory_is_said_at_start(folder: Path) -> None:
    others = crowd(6 * GIB)
    with pytest.raises(ConfigError) as caught:
        start_wide(folder, memory_fraction=0.03, inprocess=True)
    assert caught.value.field == "memory_fraction"
    del others
