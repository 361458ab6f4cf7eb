"""What a step may still compute, against a sum over single tokens."""

from __future__ import annotations

import random

import msgspec

from headrace.scheduler.limits import FEW_ROWS
from headrace.scheduler.step_budget import StepBudget
from tests.scheduler.builders import ROOMY


def cost(start: int, number: int, attended: int) -> float:
    """Of tokens one by one: each sees what is before it, and half of itself."""
    return sum(1 + (position + 0.5) / attended for position in range(start, start + number))


def test_prompts_beside_decoding_rows_cost_no_more_than_the_bound_and_nearly_that() -> None:
    random_ = random.Random(1)
    num_cut = 0
    for _ in range(3000):
        bound, attended = random_.choice((1, 10, 8192)), random_.choice((1, 50, 26_000))
        tokens = random_.choice((5, 300, 8192))
        limits = msgspec.structs.replace(
            ROOMY, max_num_batched_tokens=tokens, max_step_cost=bound, attended_per_token=attended
        )
        budget, num_singles = StepBudget(limits, 1), random_.randint(1, 3)
        budget.take_singles(num_singles)
        spent, num_taken, is_first = 0.0, num_singles, True
        while budget.tokens > 0:
            start, wanted = random_.randrange(100_000), random_.randint(1, 400)
            had = budget.tokens
            granted = budget.take(start, wanted)
            assert 0 <= granted <= min(wanted, had) and (granted or not is_first)
            paid = cost(start, granted, attended)
            assert spent + paid <= bound * (1 + 1e-9) or granted == int(is_first), "but for the first token"
            if granted < wanted:
                assert budget.tokens == 0
                dearer = spent + cost(start, granted + 1, attended)
                assert granted == had or dearer > bound * (1 - 1e-9), "one more would have fitted"
                num_cut += granted < had
            spent, num_taken, is_first = spent + paid, num_taken + granted, False
        assert num_taken <= tokens
    assert num_cut > 1000


def test_without_rows_that_decode_or_without_a_bound_tokens_alone_count() -> None:
    for bound, num_singles in ((0, 2), (5, 0)):
        budget = StepBudget(msgspec.structs.replace(ROOMY, max_step_cost=bound), 1)
        budget.take_singles(num_singles)
        assert budget.take(1_000_000, 40) == 40
        assert budget.take(0, 100) == ROOMY.max_num_batched_tokens - num_singles - 40
        assert budget.tokens == 0
        budget.give_back(7)
        budget.give_back(2)
        assert budget.take(0, 100) == 9


def test_while_few_run_a_step_has_more_tokens() -> None:
    limits = msgspec.structs.replace(ROOMY, max_num_batched_tokens=100, prefill_step_tokens=300)
    assert [StepBudget(limits, number).tokens for number in (0, FEW_ROWS, FEW_ROWS + 1)] == [300, 300, 100]
