"""Ten thousand payloads with a few bytes changed; `python -m tests.weights.foreign_mutations 1000000` makes more."""

from __future__ import annotations

import random

import pytest

from tests.weights.foreign_mutations import UNDERSTOOD, Mutants, fuzz, outcome_of, real_payloads


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_payload_is_consistent_or_refused(seed: int) -> None:
    outcomes = fuzz(2_500, seed)
    assert outcomes.total() == 2_500
    # Mutants that are merely broken at once would prove little.
    assert outcomes["accepted"] > 50 and len(outcomes) > 60


def test_bytes_that_are_no_payload_are_refused() -> None:
    chance = random.Random(0)
    for _ in range(500):
        assert outcome_of(b"\x80\x04" + chance.randbytes(chance.randrange(200))) not in UNDERSTOOD


def test_every_beginning_of_a_payload_is_refused() -> None:
    for data in real_payloads():
        assert all(outcome_of(data[:end]) not in UNDERSTOOD for end in range(0, len(data), 3))


def test_mutants_repeat_by_seed() -> None:
    first = Mutants(7)
    second = Mutants(7, first.payloads)
    assert [first.next() for _ in range(50)] == [second.next() for _ in range(50)]
