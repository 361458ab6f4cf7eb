"""A model in one stage, two and four is one model, to the bit: each layer computes what it would alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.weights.position_sum import add_digests
from tests.parallel.pool import RankPool
from tests.parallel.test_tensor_parallel import SHAPES, UPDATES, Folders
from tests.parity.models import make_model, save_model

LAYERS = {"num_hidden_layers": 4}

# Rows that pad a step compute something from whatever memory held; numpy, which interprets them, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Checkpoints by shape and seed."""
    return {
        (name, seed): str(save_model(make_model(family, seed=seed, **sizes, **LAYERS), tmp_path_factory.mktemp(name)))
        for name, (family, sizes) in SHAPES.items()
        for seed in (0, 1)
    }


def check_stages(pool: RankPool, num_ranks: int, num_stages: int, arguments: dict[str, Any]) -> None:
    """So many ranks as so many stages give the bits of those of one stage."""
    expected = pool.run(num_ranks // num_stages, "generate", **arguments)[0]
    known = {slot: ids[:-1] for slot, ids in expected["ids"].items()}
    *others, last = pool.run(num_ranks, "generate", num_stages=num_stages, known=known, **arguments)
    assert last == expected
    for rank, other in enumerate(others):
        assert other == (last if rank >= num_ranks - num_ranks // num_stages else dict.fromkeys(last, {}))


@pytest.mark.parametrize(
    ("num_ranks", "num_stages", "shape"),
    [
        *((2, 2, shape) for shape in SHAPES),
        *((4, 2, shape) for shape in ("llama-one-kv-head", "mistral-tied", "qwen3_moe")),
        *((4, 4, shape) for shape in ("llama", "qwen2-tied", "qwen3_moe")),
    ],
)
def test_any_number_of_stages_computes_the_same(
    pool: RankPool, folders: Folders, num_ranks: int, num_stages: int, shape: str
) -> None:
    """Prompts in chunks, one on another's pages, greedy tokens, prompt scores; each stage alone or shared by two.
    Stages in the middle have layers only: of four, plain ones, experts, and those between the ends of a tied head."""
    arguments = {"folder": folders[shape, 0], "chunk": 9, "num_tokens": 4, "settings": {}}
    check_stages(pool, num_ranks, num_stages, arguments)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("qwen3_moe", {"numerics": "invariant"}),
        ("llama-biases", {"attention_backend": "reference"}),
        ("qwen2-tied", {"dtype": "bfloat16"}),
    ],
)
def test_other_kernels_do_too(pool: RankPool, folders: Folders, shape: str, settings: dict[str, Any]) -> None:
    arguments = {"folder": folders[shape, 0], "chunk": 9, "num_tokens": 3, "settings": settings}
    check_stages(pool, 2, 2, arguments)


def test_stages_may_have_unequal_numbers_of_layers(pool: RankPool, tmp_path: Path) -> None:
    folder = save_model(make_model("llama", num_hidden_layers=5), tmp_path)
    check_stages(pool, 3, 3, {"folder": str(folder), "chunk": 9, "num_tokens": 3, "settings": {}})


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_the_build_for_a_device_does_too(pool: RankPool, tmp_path: Path, numerics: str) -> None:
    """Through Triton's interpreter; a tied head, which both ends have."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    folder = save_model(make_model("llama", **sizes, **heads, tie_word_embeddings=True), tmp_path)
    settings = {"attention_backend": "triton", "numerics": numerics, "max_num_batched_tokens": 8}
    settings |= {"max_running_requests": 4}
    arguments = {"folder": str(folder), "chunk": 4, "num_tokens": 2, "settings": settings, "lengths": [5, 1]}
    check_stages(pool, 2, 2, arguments)


@pytest.mark.parametrize(("shape", "mode"), UPDATES)
def test_updates_give_the_bits_of_a_cold_start(pool: RankPool, folders: Folders, shape: str, mode: str) -> None:
    """And what all ranks hold counts once, tied heads too."""
    arguments: dict[str, Any] = {"folder": folders[shape, 0], "other": folders[shape, 1], "mode": mode, "settings": {}}
    (expected,) = pool.run(1, "update", **arguments)
    for num_ranks, num_stages in ((2, 2), (4, 2)):
        answers = pool.run(num_ranks, "update", num_stages=num_stages, **arguments)
        for whole, *parts in zip(expected["digests"], *(answer["digests"] for answer in answers), strict=True):
            assert {name: add_digests(*(part[name] for part in parts)) for name in whole} == whole
