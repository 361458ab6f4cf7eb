from __future__ import annotations

import pytest

from headrace.telemetry import DurationHistogram


def test_a_value_counts_under_the_least_bound_that_holds_it() -> None:
    histogram = DurationHistogram("name", "help", (0.1, 1, 10))
    for value in (0.0, 0.1, 0.2, 1.0, 10.5):
        histogram.observe(value)
    histogram.observe(5.0, 3)
    assert histogram.counts == [2, 2, 3, 1]
    assert histogram.total == pytest.approx(26.8)
