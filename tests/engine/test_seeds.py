from __future__ import annotations

from headrace.engine.seeds import SeedSource, mix, sample_seed


def test_mix_is_the_published_finalizer() -> None:
    """The first outputs of SplitMix64 seeded with 0 are mix(golden), mix(2 * golden), ..."""
    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF
    assert mix(2 * golden) == 0x6E789E6AA1B965F4
    assert mix(3 * golden) == 0x06C45D188009454F


def test_sample_zero_has_the_request_s_seed_and_others_their_own() -> None:
    seeds = [sample_seed(7, index) for index in range(4096)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4096
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_given_seeds_depend_on_the_engine_s_seed_and_the_order_only() -> None:
    first, again, other = SeedSource(1), SeedSource(1), SeedSource(2)
    taken = [first.take() for _ in range(100)]
    assert taken == [again.take() for _ in range(100)]
    assert not set(taken) & {other.take() for _ in range(100)}
