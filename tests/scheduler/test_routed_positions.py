"""The experts of a sequence's tokens: told in parts, told again from the start, delivered once each."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.scheduler.routed_positions import RoutedPositions
from headrace.types.plan import RoutedRow
from headrace.types.request import RoutedPart


def told(first: int, last: int, weights: int = 0) -> RoutedRow:
    """Of positions first..last-1, each number naming its position, place and weights."""
    positions = np.arange(first, last)[:, None, None]
    numbers = 100 * positions + 10 * np.arange(3)[:, None] + np.arange(2) + 5 * weights
    return RoutedRow(first, numbers.astype(np.int16))


def numbers_of(part: RoutedPart) -> list[int]:
    assert (part.num_layers, part.num_per_token) == (3, 2)
    found: list[int] = np.frombuffer(part.experts, "<i2").tolist()
    return found


def expected(first: int, last: int, weights: int = 0) -> list[int]:
    numbers: list[int] = told(first, last, weights).experts.ravel().tolist()
    return numbers


@pytest.mark.parametrize("start", [0, 4])
def test_what_is_told_is_delivered_once(start: int) -> None:
    positions = RoutedPositions(start)
    assert positions.take(9) == RoutedPart()
    positions.add(told(start, start), replaces=True)
    assert numbers_of(positions.take(9)) == []
    positions.add(told(start, 90), replaces=True)
    positions.add(told(90, 100), replaces=True)
    assert numbers_of(positions.take(99)) == expected(start, 99)
    assert numbers_of(positions.take(99)) == []
    positions.add(told(100, 101), replaces=False)
    assert numbers_of(positions.take(200)) == expected(99, 101)


def test_who_enters_a_slot_again_is_told_again() -> None:
    """Behind the first token its own word stays; before it the last one counts, and what was told further is void."""
    positions = RoutedPositions(0)
    positions.add(told(0, 8), replaces=True)
    positions.add(told(8, 12), replaces=True)
    positions.add(told(0, 10, weights=1), replaces=True)
    assert positions.end == 10
    positions.add(told(10, 12, weights=1), replaces=True)
    positions.add(told(0, 5, weights=2), replaces=False)
    positions.add(told(5, 14, weights=2), replaces=False)
    assert numbers_of(positions.take(14)) == expected(0, 12, weights=1) + expected(12, 14, weights=2)


def test_a_gap_is_a_bug() -> None:
    positions = RoutedPositions(3)
    positions.add(told(3, 5), replaces=True)
    with pytest.raises(AssertionError):
        positions.add(told(6, 7), replaces=False)
