"""The demo's task: adding two numbers. Owns the problems and their verifiable reward; knows no tokens and no model."""

from __future__ import annotations

import random
import re

import msgspec

LARGEST_OPERAND = 99
_ANSWER = re.compile(r"<answer>(\d{1,9})</answer>")


class Problem(msgspec.Struct, frozen=True):
    """One sum to work out. `question` is what the user says, `answer` what the reply must hold."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"{self.left}+{self.right}=?"

    @property
    def answer(self) -> int:
        return self.left + self.right


def draw_problems(source: random.Random, count: int) -> list[Problem]:
    """`count` problems, uniform over all pairs of operands in [0, LARGEST_OPERAND]."""
    return [Problem(source.randint(0, LARGEST_OPERAND), source.randint(0, LARGEST_OPERAND)) for _ in range(count)]


def reply(value: int) -> str:
    """A reply in the format the reward reads."""
    return f"<answer>{value}</answer>"


def read_reply(text: str) -> int | None:
    """The number a well-formed reply gives; None when the reply is anything else than exactly one tagged number."""
    found = _ANSWER.fullmatch(text.strip())
    return int(found[1]) if found else None


def reward(problem: Problem, text: str) -> float:
    """1.0 for a well-formed reply with the right number, else 0.0."""
    return float(read_reply(text) == problem.answer)
