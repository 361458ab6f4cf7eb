"""Seeds of samples. Owns the hash that gives sample i of `n` its own seed and the seeds of requests that bring none.

The hash is the finalizer of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014). All values are unsigned 64-bit integers.
"""

from __future__ import annotations

import itertools

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers that scatters neighbours."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request with `seed`: the request's own for 0, mix(seed + i * golden) for i.

    So a reply's seed, given to a request with n = 1, draws that very sample again.
    """
    return seed if index == 0 else mix(seed + index * _GOLDEN)


class SeedSource:
    """Seeds for requests without one: the k-th request of an engine with seed s gets mix(mix(s) + k * golden)."""

    def __init__(self, engine_seed: int) -> None:
        self._base = mix(engine_seed)
        self._numbers = itertools.count(1)  # atomic: seeds are taken in several threads

    def take(self) -> int:
        return mix(self._base + next(self._numbers) * _GOLDEN)
