"""A model on one rank, two and four is one model: logits, tokens, scores, digests, updates, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.weights.position_sum import add_digests
from tests.parallel.pool import RankPool
from tests.parity.models import CONFIGS, make_model, save_model

TOLERANCE = 2e-4
NUM_TOKENS = 5
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 4, "vocab_size": 104}),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True, "num_attention_heads": 8}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 102}),
    "qwen3": ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 4, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {"attention_bias": True}),
    "mixtral": ("mixtral", {"num_key_value_heads": 1}),
}
"""Vocabularies of which none or all ranks have as many rows, fewer key-value heads than ranks, biases, a tied head."""

# Rows that pad a step compute something from whatever memory held; numpy, which interprets them, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Folders = dict[tuple[str, int], str]
UPDATES = [("llama-one-kv-head", "shadow"), ("qwen2-tied", "inplace"), ("mixtral", "shadow"), ("mixtral", "inplace")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Checkpoints by shape and seed."""
    return {
        (name, seed): str(save_model(make_model(family, seed=seed, **sizes), tmp_path_factory.mktemp(name)))
        for name, (family, sizes) in SHAPES.items()
        for seed in (0, 1)
    }


def test_every_family_is_among_the_shapes() -> None:
    assert {family for family, _ in SHAPES.values()} == set(CONFIGS)


def check_equal(found: Any, expected: Any) -> None:
    """The same tokens; logits, log-probabilities and prompt scores within the tolerance."""
    assert found["ids"] == expected["ids"]
    for key in ("logprobs", "scores"):
        assert found[key].keys() == expected[key].keys()
        for slot, values in expected[key].items():
            np.testing.assert_allclose(found[key][slot], values, atol=TOLERANCE, rtol=0)
    for slot, rows in expected["logits"].items():
        for mine, other in zip(found["logits"][slot], rows, strict=True):
            first, second = np.frombuffer(mine, np.float32), np.frombuffer(other, np.float32)
            np.testing.assert_allclose(first, second, atol=TOLERANCE, rtol=0)


def check_ranks(answers: list[Any], expected: Any) -> None:
    """All ranks have the same bits, and they are near what is expected."""
    assert all(answer == answers[0] for answer in answers)
    check_equal(answers[0], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_ranks_computes_the_same(pool: RankPool, folders: Folders, shape: str) -> None:
    """Prompts whole and in chunks, one on another's pages, greedy tokens, prompt scores."""

    def tell(num_ranks: int, chunk: int, num_tokens: int) -> list[Any]:
        return pool.run(
            num_ranks, "generate", folder=folders[shape, 0], chunk=chunk, num_tokens=num_tokens, settings={}
        )

    (expected,) = tell(1, 64, NUM_TOKENS)
    assert all(len(ids) == NUM_TOKENS for ids in expected["ids"].values()) and len(expected["ids"]) == 4
    assert {slot: len(scores) for slot, scores in expected["scores"].items()} == {0: 22, 2: 8}
    check_ranks(tell(2, 64, NUM_TOKENS), expected)
    check_ranks(tell(4, 9, NUM_TOKENS), expected)


def test_so_do_three_ranks(pool: RankPool, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 99}
    arguments = {"folder": str(save_model(make_model("llama", **sizes), tmp_path)), "chunk": 9, "num_tokens": 4}
    (expected,) = pool.run(1, "generate", **arguments, settings={})
    check_ranks(pool.run(3, "generate", **arguments, settings={}), expected)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("qwen3", {"numerics": "invariant"}),
        ("qwen3_moe", {"numerics": "invariant"}),
        ("llama-biases", {"attention_backend": "reference"}),
        ("mixtral", {"attention_backend": "reference"}),
    ],
)
def test_other_kernels_do_too(pool: RankPool, folders: Folders, shape: str, settings: dict[str, Any]) -> None:
    arguments = {"folder": folders[shape, 0], "chunk": 9, "num_tokens": 3, "settings": settings}
    (expected,) = pool.run(1, "generate", **arguments)
    check_ranks(pool.run(4, "generate", **arguments), expected)


@pytest.mark.parametrize("shape", ["qwen3_moe", "llama-biases"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ranks_are_as_exact_in_narrow_dtypes_as_one(pool: RankPool, folders: Folders, shape: str, dtype: str) -> None:
    """Beside float32; and all ranks have the same bits."""

    def tell(num_ranks: int, dtype: str) -> list[dict[str, Any]]:
        arguments = {"folder": folders[shape, 0], "chunk": 64, "num_tokens": 1, "settings": {"dtype": dtype}}
        return pool.run(num_ranks, "generate", **arguments)

    def logits_of(told: dict[str, Any]) -> Any:
        return np.stack([np.frombuffer(rows[0], np.float32) for rows in told["logits"].values()])

    (exact,), (alone,), ranks = tell(1, "float32"), tell(1, dtype), tell(4, dtype)
    assert all(told == ranks[0] for told in ranks)
    error, error_alone = (np.abs(logits_of(told) - logits_of(exact)).mean() for told in (ranks[0], alone))
    assert error < 1.5 * error_alone


NARROW = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_the_build_for_a_device_does_too(pool: RankPool, tmp_path: Path, numerics: str) -> None:
    """Through Triton's interpreter: its embedding, partial products and samplers; one key-value head on both ranks."""
    folder = save_model(make_model("llama", **NARROW, attention_bias=True, tie_word_embeddings=True), tmp_path)
    settings = {"attention_backend": "triton", "numerics": numerics, "max_num_batched_tokens": 8}
    arguments = {"folder": str(folder), "chunk": 4, "num_tokens": 2, "settings": settings | {"max_running_requests": 4}}
    (expected,) = pool.run(1, "generate", **arguments, lengths=[5, 1])
    check_ranks(pool.run(2, "generate", **arguments, lengths=[5, 1]), expected)


@pytest.mark.parametrize("vocab_size", [101, 4208])
@pytest.mark.parametrize("top_k", [-1, 5])
def test_ranks_that_sample_their_share_know_all_tokens(
    pool: RankPool, tmp_path: Path, top_k: int, vocab_size: int
) -> None:
    """Their share of the rows, or of a vocabulary of which the first has a whole block; it does not divide, and the
    last rows are padding. The next step begins with what others have sampled. As many products are counted as in steps
    that are not shared."""
    folder = save_model(make_model("llama", **NARROW, vocab_size=vocab_size), tmp_path)
    settings = {"attention_backend": "triton", "max_num_batched_tokens": 12, "max_running_requests": 4}
    arguments = {"folder": str(folder), "settings": settings, "num_rows": 3, "top_k": top_k}
    (expected,) = pool.run(1, "sample_in_shares", **arguments)
    answers = pool.run(2, "sample_in_shares", **arguments)
    check_ranks(answers, expected)
    assert answers[0]["num_products"] == expected["num_products"]


@pytest.mark.parametrize(("shape", "num_ranks"), [("llama-biases", 2), ("qwen3_moe", 4)])
def test_with_invariant_numerics_batch_mates_move_no_bit(
    pool: RankPool, folders: Folders, shape: str, num_ranks: int
) -> None:
    answers = [
        pool.run(
            num_ranks,
            "generate_among",
            folder=folders[shape, 0],
            num_mates=num_mates,
            settings={"numerics": "invariant"},
        )
        for num_mates in (0, 7)
    ]
    assert all(answer == answers[0][0] for ranks in answers for answer in ranks)


@pytest.mark.parametrize(("shape", "mode"), UPDATES)
def test_updates_give_the_bits_of_a_cold_start(pool: RankPool, folders: Folders, shape: str, mode: str) -> None:
    arguments = {"folder": folders[shape, 0], "other": folders[shape, 1], "mode": mode, "settings": {}}
    (expected,) = pool.run(1, "update", **arguments)
    first, second, third = expected["digests"]
    assert first == third and first.keys() == second.keys() and first != second
    for num_ranks in (2, 4):
        answers = pool.run(num_ranks, "update", **arguments)
        for whole, *parts in zip(expected["digests"], *(answer["digests"] for answer in answers), strict=True):
            assert {name: add_digests(*(part[name] for part in parts)) for name in whole} == whole
