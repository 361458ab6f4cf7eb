"""Top-k, top-p and min-p as one threshold on a row of logits. Owns their exact meaning, ties included.

A token is kept if its logit is at least the threshold, so equal logits are kept or dropped together:

    top_k    threshold = the k-th greatest logit: k tokens, and any that tie with the last
    top_p    over what top_k left, renormalised: the greatest threshold whose tokens hold at least top_p of the mass
    min_p    tokens at least min_p times as probable as the most probable one

The threshold is found by selection, never by sorting the vocabulary: bands are taken from the maximum down until they
hold enough, and the last band is halved until it is small (linear time in all). Must not know slots or batches.
"""

from __future__ import annotations

import math

import numpy as np

from headrace.types.request import Float32Array

NOTHING_DROPPED = np.float32(-np.inf)

_REACHES = (1.5, 3.0, 5.0, 7.0, 9.0, 12.0, 16.0, 24.0)
"""How far below the maximum to look first: natural-log units of probability for top-p, of logits for top-k."""
_SORT_AT_MOST = 2048


@np.errstate(over="ignore", under="ignore")  # what is that far below the maximum has no weight
def truncation_threshold(row: Float32Array, temperature: float, top_k: int, top_p: float, min_p: float) -> np.float32:
    """The least logit kept of row [V], before division by `temperature` > 0. Off are top_k 0, top_p 1, min_p 0."""
    maximum = row.max()
    if not math.isfinite(maximum):
        return NOTHING_DROPPED
    threshold = NOTHING_DROPPED
    if 0 < top_k < len(row):
        threshold = kth_greatest(row, top_k)
    if top_p < 1.0:
        threshold = _nucleus_threshold(row, float(maximum), temperature, top_p, threshold)
    if min_p > 0.0:
        threshold = max(threshold, _round_up(float(maximum) + temperature * math.log(min_p)))
    return threshold


def kth_greatest(row: Float32Array, k: int) -> np.float32:
    """The k-th greatest value of row [V], 1 <= k <= V, counting equal values separately."""
    maximum = row.max()
    for reach in _REACHES[1::2]:
        near = row[row >= maximum - np.float32(reach)]
        if len(near) >= k:
            return np.float32(np.partition(near, len(near) - k)[len(near) - k])
    return np.float32(np.partition(row, len(row) - k)[len(row) - k])


def _nucleus_threshold(
    row: Float32Array, maximum: float, temperature: float, top_p: float, at_least: np.float32
) -> np.float32:
    """Walk down from the maximum in bands until their mass reaches `top_p` of all, then select within the last band."""
    left = row if at_least == NOTHING_DROPPED else row[row >= at_least]
    needed = top_p * float(_weights(left, maximum, temperature).sum(dtype=np.float64))
    upper = np.float32(np.inf)
    for reach in (*_REACHES, math.inf) if len(left) > _SORT_AT_MOST else (math.inf,):
        lower = _round_up(maximum - reach * temperature)
        band = left[(left >= lower) & (left < upper)]
        mass = float(_weights(band, maximum, temperature).sum(dtype=np.float64))
        if len(band) and (mass >= needed or reach == math.inf):
            return _select_by_mass(band, maximum, temperature, needed)
        needed, upper = needed - mass, lower
    return at_least  # rounding left a mass of nearly nothing to find: nothing is dropped


def _select_by_mass(values: Float32Array, maximum: float, temperature: float, needed: float) -> np.float32:
    """The value at which the mass, added up from the greatest value down, first reaches `needed`."""
    while len(values) > _SORT_AT_MOST:
        middle = len(values) // 2
        parted = np.partition(values, middle)
        upper_mass = float(_weights(parted[middle:], maximum, temperature).sum(dtype=np.float64))
        if upper_mass >= needed:
            values = parted[middle:]
        else:
            values, needed = parted[:middle], needed - upper_mass
    descending = np.sort(values)[::-1]
    masses = np.cumsum(_weights(descending, maximum, temperature), dtype=np.float64)
    return np.float32(descending[min(int(np.searchsorted(masses, needed)), len(descending) - 1)])


def _weights(values: Float32Array, maximum: float, temperature: float) -> Float32Array:
    """exp((values - maximum) / temperature)."""
    scaled = (values - np.float32(maximum)) * np.float32(1.0 / temperature)
    return np.asarray(np.exp(scaled, out=scaled))


def _round_up(value: float) -> np.float32:
    """The least float32 that is at least `value`, so that comparing float32 logits with it is exact."""
    rounded = np.float32(value)
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))
