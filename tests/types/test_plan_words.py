"""A plan as one array: what comes out is what went in, to the last bit, and what is no plan is refused."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from headrace.types.plan import LAST_TOKEN, PlanRefused, SlotInit, StepPlan
from headrace.types.plan_words import decode, encode
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobMode, LogprobOptions

NUM_PLANS = 2000
MOST = (1 << 31) - 1
MODES: list[LogprobMode] = ["raw", "temperature", "sampled"]


def random_plan(chance: random.Random) -> StepPlan:
    """Any plan that has a place in the layout, with every field at its ends now and then."""
    lengths = [chance.choice((1, 1, chance.randint(1, 40))) for _ in range(chance.choice((0, 1, 3, 200)))]
    num_cells, num_groups = chance.choice((0, 1, 50)), chance.choice((0, 1, 4))
    return StepPlan(
        step_id=chance.choice((-1, 0, chance.randrange(1 << 63))),
        epoch=chance.choice((0, chance.randrange(1 << 63))),
        new_slots=tuple(random_slot(chance) for _ in range(chance.choice((0, 0, 1, 5)))),
        page_slots=numbers(chance, num_cells),
        page_columns=numbers(chance, num_cells),
        page_ids=numbers(chance, num_cells),
        row_slots=numbers(chance, len(lengths)),
        row_starts=numbers(chance, len(lengths)),
        row_lengths=np.array(lengths, np.int32),
        token_ids=numbers(chance, sum(lengths), least=LAST_TOKEN),
        row_samples=numbers(chance, len(lengths)) % 2 == 0,
        prefix_groups=numbers(chance, 3 * num_groups).reshape(-1, 3),
        waits_to_sample=chance.random() < 0.5,
        page_moves=random_moves(chance, chance.choice((0, 0, 3))),
    )


def random_moves(chance: random.Random, count: int) -> npt.NDArray[np.int32]:
    moves = numbers(chance, 3 * count).reshape(-1, 3)
    moves[:, 0] %= 2
    return moves


def random_slot(chance: random.Random) -> SlotInit:
    def number() -> int:
        return chance.choice((0, MOST, chance.randint(0, MOST)))

    def some() -> list[int]:
        return [number() for _ in range(chance.choice((0, 1, 7)))]

    return SlotInit(
        slot=number(),
        seed=chance.choice((0, (1 << 64) - 1, chance.randrange(1 << 64))),
        num_prompt_tokens=number(),
        token_ids=numbers(chance, chance.choice((1, 9, 300))),
        sampling=TokenSampling(
            temperature=chance.choice((0.0, 1.0, 1e4 * chance.random())),
            top_k=number(),
            top_p=chance.random(),
            min_p=chance.choice((0.0, chance.random())),
            repetition_penalty=chance.choice((1.0, 1e-6, 100 * chance.random())),
            presence_penalty=chance.uniform(-100, 100),
            frequency_penalty=chance.uniform(-100, 100),
            logit_bias=tuple((token, chance.uniform(-1e4, 1e4)) for token in some()),
        ),
        logprobs=LogprobOptions(
            chance.choice(MODES),
            chance.choice(MODES),
            chance.choice((None, 0, number())),
            number(),
            tuple(some()),
            number(),
            chance.choice((None, 0, number())),
        ),
        stop_token_ids=tuple(some()),
        min_length=number(),
        num_output_ids_in_prompt=number(),
    )


def numbers(chance: random.Random, count: int, least: int = 0) -> npt.NDArray[np.int32]:
    found = np.frombuffer(chance.randbytes(4 * count), np.int32) & MOST
    found[::7], found[3::7] = MOST, least
    return found


def same(found: Any, expected: Any) -> bool:
    """Field by field; arrays with their dtype and shape, floats by their bits."""
    if isinstance(expected, np.ndarray):
        return bool(found.dtype == expected.dtype and found.shape == expected.shape and (found == expected).all())
    if isinstance(expected, msgspec.Struct):
        return type(found) is type(expected) and all(
            same(getattr(found, name), getattr(expected, name)) for name in expected.__struct_fields__
        )
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and bool(found == expected)


def test_any_plan_comes_back_as_it_was() -> None:
    chance = random.Random(0)
    for _ in range(NUM_PLANS):
        plan = random_plan(chance)
        words = encode(plan)
        assert words.dtype == np.int32 and words.ndim == 1
        assert same(decode(words), plan)
        assert np.array_equal(encode(decode(words)), words)


def test_what_is_cut_off_lengthened_or_foreign_is_refused() -> None:
    chance = random.Random(1)
    for _ in range(NUM_PLANS // 4):
        words = encode(random_plan(chance))
        cut = words[: chance.randrange(len(words))]
        longer = np.append(words, np.int32(0))
        wrongs: list[Any] = [cut, longer, numbers(chance, len(words)), words.astype(np.int64), words[None]]
        for wrong in wrongs:
            with pytest.raises(PlanRefused, match="not a plan"):
                decode(wrong)


def test_a_changed_word_is_refused_or_makes_another_plan_that_is_one() -> None:
    """Whatever comes through can be sent on, as the same words: nothing is read past an end or passed over."""
    chance, num_refused = random.Random(2), 0
    for _ in range(NUM_PLANS // 2):
        words = encode(random_plan(chance))
        at = chance.randrange(chance.choice((12, len(words))))
        words[at] = chance.choice((-1, 0, 1, MOST, -MOST - 1, words[at] ^ 1 << chance.randrange(31)))
        try:
            plan = decode(words)
        except PlanRefused:
            num_refused += 1
        else:
            assert np.array_equal(encode(plan), words)
    assert num_refused > NUM_PLANS // 10


@pytest.mark.parametrize("field", ["slot", "num_prompt_tokens", "min_length", "num_output_ids_in_prompt"])
def test_a_number_without_a_place_is_refused(field: str) -> None:
    plan, init = random_plan(random.Random(3)), random_slot(random.Random(3))
    wrong: Any = msgspec.structs.replace(init, **{field: 1 << 31})
    with pytest.raises(PlanRefused, match="too great"):
        encode(msgspec.structs.replace(plan, new_slots=(wrong,)))
