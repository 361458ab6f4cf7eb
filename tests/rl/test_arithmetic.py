"""The demo's task and its reward."""

from __future__ import annotations

import random

import pytest

from headrace.rl.arithmetic import LARGEST_OPERAND, Problem, draw_problems, read_reply, reply, reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>42</answer>", 1.0),
        ("  <answer>42</answer>\n", 1.0),
        ("<answer>042</answer>", 1.0),
        ("<answer>41</answer>", 0.0),
        ("<answer>-42</answer>", 0.0),
        ("<answer>42</answer><answer>42</answer>", 0.0),
        ("<answer>42", 0.0),
        ("42", 0.0),
        ("", 0.0),
        ("<answer></answer>", 0.0),
        ("<answer>4 2</answer>", 0.0),
        ("so <answer>42</answer>", 0.0),
        ("<answer>" + "4" * 5000 + "</answer>", 0.0),
    ],
)
def test_reward_is_for_one_well_formed_right_number(text: str, expected: float) -> None:
    assert reward(Problem(17, 25), text) == expected


def test_a_reply_reads_back() -> None:
    assert [read_reply(reply(value)) for value in (0, 7, 198)] == [0, 7, 198]


def test_problems_are_a_function_of_the_seed_and_cover_the_operands() -> None:
    problems = draw_problems(random.Random(3), 5000)
    assert problems == draw_problems(random.Random(3), 5000)
    assert {problem.left for problem in problems} == set(range(LARGEST_OPERAND + 1))
    assert problems[0].question == f"{problems[0].left}+{problems[0].right}=?"
