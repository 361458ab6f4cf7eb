"""The published noise: words for a few (seed, position, token), and what they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.sampling.noise import exponential_of, gumbel_of, noise_keys, noise_words

MASK = (1 << 32) - 1

TEST_VECTOR = [
    (0, 0, 0, 0x89579C71, 0.26275015908473953),
    (1, 7, 42, 0xCEB8AD60, -0.49937275566312195),
    (0x0123456789ABCDEF, 4096, 151935, 0xF7D55DFE, -1.2369624516996685),
    (0xFFFFFFFFFFFFFFFF, 2147483647, 128255, 0xB59DBD70, -0.21183091611951413),
    (123456789, 1, 1, 0x0B2446A9, 3.1123159395044127),
    (42, 100, 2, 0x34C87722, 1.4657558171779903),
    (42, 101, 2, 0x793D95C1, 0.4436558353330251),
    (43, 100, 2, 0x998BB886, 0.08799940390044089),
    (1 << 32, 100, 2, 0x662284EA, 0.675109218836591),
]

# The known answers of Philox4x32-10 that its authors publish: counter, key, output.
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & MASK, (first >> 32) ^ c3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def lowbias32(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def reference_word(seed: int, position: int, token: int) -> int:
    k0, k1, _, _ = philox((position & MASK, position >> 32, 0, 0), (seed & MASK, seed >> 32))
    return lowbias32(lowbias32((token * 0x9E3779B1 + k0) & MASK) ^ k1)


def word(seed: int, position: int, token: int) -> int:
    keys = noise_keys(np.array([seed], np.uint64), np.array([position]))
    return int(noise_words(keys, np.array([[token]]))[0, 0])


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_the_reference_of_this_file_is_philox(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    assert philox(counter, key) == answer


@pytest.mark.parametrize(("seed", "position", "token", "expected", "gumbel"), TEST_VECTOR)
def test_the_published_vector(seed: int, position: int, token: int, expected: int, gumbel: float) -> None:
    assert word(seed, position, token) == expected == reference_word(seed, position, token)
    assert gumbel_of(np.array([expected], np.uint32))[0] == pytest.approx(gumbel, abs=1e-12)


def test_words_match_the_definition_everywhere() -> None:
    random = np.random.default_rng(0)
    seeds = random.integers(0, 1 << 64, 50, np.uint64)
    positions = random.integers(0, 1 << 40, 50)
    token_ids = random.integers(0, 1 << 31, (50, 20))
    words = noise_words(noise_keys(seeds, positions), token_ids)
    expected = [
        [reference_word(int(seed), int(position), int(token)) for token in tokens]
        for seed, position, tokens in zip(seeds, positions, token_ids, strict=True)
    ]
    assert words.tolist() == expected


def test_noise_is_finite_at_both_ends_of_a_word() -> None:
    ends = np.array([0, MASK], np.uint32)
    assert np.isfinite(gumbel_of(ends)).all()
    assert (exponential_of(ends) > 0).all()


def test_words_look_uniform_and_unrelated_across_positions() -> None:
    keys = noise_keys(np.full(64, 9, np.uint64), np.arange(64))
    words = noise_words(keys, np.arange(4096)[None])
    uniform = words.ravel() / 2.0**32
    counts = np.bincount((uniform * 256).astype(int), minlength=256)
    chi_square = ((counts - len(uniform) / 256) ** 2 / (len(uniform) / 256)).sum()
    assert chi_square < 340  # 255 degrees of freedom: the 99.98th percentile
    correlation = np.corrcoef(words[:-1].ravel() / 2.0**32, words[1:].ravel() / 2.0**32)[0, 1]
    assert abs(correlation) < 0.01
