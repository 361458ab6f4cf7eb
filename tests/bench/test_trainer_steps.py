"""The arithmetic of `bench.trainer_steps`; its runs need frameworks."""

from __future__ import annotations

import pytest

from bench.trainer_steps import StepSplit, mean, table


def test_what_is_neither_the_trainers_nor_a_forward_step_is_own() -> None:
    first = StepSplit(whole=10.0, sampling=6.0, served=3.0, forward=2.0, update=1.5, gathered=1.0)
    second = StepSplit(whole=12.0, sampling=6.0, served=5.0, forward=4.0, update=0.5, gathered=0.0)
    assert (first.own, second.own) == (1.0 + 0.5, 1.0 + 0.5)
    both = mean([first, second])
    assert both == StepSplit(11.0, 6.0, 4.0, 3.0, 1.0, 0.5)
    cells = table("verl", both).strip("| ").split(" | ")
    name, *numbers, share = cells
    whole, trainer, forward, requests, weights, own = map(float, numbers)
    assert name == "verl" and share == "13.6%"
    assert (whole, own) == (11.0, 1.5) and trainer + forward + requests + weights == pytest.approx(whole)
