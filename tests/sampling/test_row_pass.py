"""The hot pass: exact Gumbel-max, exact reductions, and rows that never meet."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.sampling.noise import gumbel_of, noise_keys, noise_words
from headrace.sampling.row_pass import BLOCK_ELEMENTS, RowPass

SIZES = [1, 2, 7, 64, 1000, 5003, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 151936]


def make(num_rows: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((num_rows, size)) * 4).astype(np.float32)
    temperatures = random.uniform(0.1, 2.0, num_rows)
    keys = noise_keys(random.integers(0, 1 << 64, num_rows, np.uint64), random.integers(0, 10000, num_rows))
    return logits, temperatures, keys


@pytest.mark.parametrize("size", SIZES)
def test_the_winner_is_that_of_the_full_float64_computation(size: int) -> None:
    num_rows = 300 if size <= 1000 else 6
    logits, temperatures, keys = make(num_rows, size)
    drawn = RowPass(size).draw(logits, np.arange(num_rows), temperatures, keys)
    scores = logits / temperatures[:, None] + gumbel_of(noise_words(keys, np.arange(size)[None]))
    assert drawn.token_ids.tolist() == scores.argmax(axis=1).tolist()


def test_the_winner_is_exact_at_extreme_temperatures_and_with_dropped_tokens() -> None:
    logits, _, keys = make(400, 300)
    logits[:, ::3] = -np.inf
    temperatures = np.geomspace(1e-6, 1e4, 400)
    drawn = RowPass(300).draw(logits, np.arange(400), temperatures, keys)
    scores = logits / temperatures[:, None] + gumbel_of(noise_words(keys, np.arange(300)[None]))
    assert drawn.token_ids.tolist() == scores.argmax(axis=1).tolist()
    assert np.isfinite(drawn.reduced.log_sums).all()


def test_equals_are_drawn_by_their_noise_however_large_they_are() -> None:
    _, _, keys = make(200, 1)
    logits = np.full((200, 8), -1e10, np.float32)
    logits[:, 2:7] = np.geomspace(1e6, 3e38, 200, dtype=np.float32)[:, None]
    drawn = RowPass(8).draw(logits, np.arange(200), np.full(200, 1e-6), keys)
    expected = 2 + gumbel_of(noise_words(keys, np.arange(2, 7)[None])).argmax(axis=1)
    assert drawn.token_ids.tolist() == expected.tolist() and set(expected) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("size", SIZES)
def test_reductions_match_float64(size: int) -> None:
    logits, temperatures, _ = make(5, size)
    reduced = RowPass(size).reduce(logits, np.arange(5), temperatures)
    scaled = (logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperatures[:, None]
    assert reduced.argmax.tolist() == logits.argmax(axis=1).tolist()
    assert reduced.maxima.tolist() == logits.max(axis=1).tolist()
    assert np.allclose(reduced.log_sums, np.log(np.exp(scaled).sum(axis=1)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 3, 17, 100, 257, 1000, 4099, 32768, BLOCK_ELEMENTS + 5])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_row_is_bitwise_the_same_in_every_batch(size: int, num_threads: int) -> None:
    num_rows = 37
    logits, temperatures, keys = make(num_rows, size)
    row_pass = RowPass(size, num_threads)
    whole = row_pass.draw(logits, np.arange(num_rows), temperatures, keys)
    random = np.random.default_rng(1)
    subsets = [np.array([row]) for row in range(0, num_rows, 5)]
    subsets += [random.permutation(num_rows)[: random.integers(1, num_rows)] for _ in range(8)]
    for rows in subsets:
        for result in (
            row_pass.draw(logits, rows, temperatures[rows], keys[rows]),
            RowPass(size).draw(
                np.ascontiguousarray(logits[rows]), np.arange(len(rows)), temperatures[rows], keys[rows]
            ),
        ):
            assert result.token_ids.tolist() == whole.token_ids[rows].tolist()
            assert result.reduced.log_sums.tobytes() == whole.reduced.log_sums[rows].tobytes()
        assert row_pass.reduce(logits, rows, temperatures[rows]).log_sums.tobytes() == result.reduced.log_sums.tobytes()


def test_threads_change_nothing() -> None:
    logits, temperatures, keys = make(64, 20000)
    one, four = (RowPass(20000, n).draw(logits, np.arange(64), temperatures, keys) for n in (1, 4))
    assert one.token_ids.tolist() == four.token_ids.tolist()
    assert one.reduced.log_sums.tobytes() == four.reduced.log_sums.tobytes()


def test_a_broken_row_harms_no_other() -> None:
    logits, temperatures, keys = make(5, 500)
    expected = RowPass(500).draw(logits, np.arange(5), temperatures, keys)
    broken = np.concatenate((logits, np.full((2, 500), np.nan, np.float32), np.full((1, 500), -np.inf, np.float32)))
    broken[5, 3] = 1.0
    drawn = RowPass(500).draw(
        broken, np.arange(8), np.concatenate((temperatures, np.ones(3))), np.concatenate((keys, keys[:3]))
    )
    assert drawn.token_ids[:5].tolist() == expected.token_ids.tolist()
    assert np.isnan(drawn.reduced.log_sums[5:]).all()
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < 500)).all()


def test_no_rows_is_no_work() -> None:
    none = np.arange(0)
    drawn = RowPass(10).draw(np.zeros((0, 10), np.float32), none, np.zeros(0), np.zeros((0, 2), np.uint32))
    assert len(drawn.token_ids) == 0
