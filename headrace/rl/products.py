"""The tools demo's task: multiplying two numbers, with a calculator. Owns the problems, the tool and the reward."""

from __future__ import annotations

import random
import re

import msgspec

from headrace.rl.arithmetic import read_reply

SMALLEST_FACTOR, LARGEST_FACTOR = 10, 99
_PRODUCT = re.compile(r"(\d{1,9})\*(\d{1,9})")


class Product(msgspec.Struct, frozen=True):
    """One product to work out. `question` is what the user says, `answer` what the last reply must hold."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"{self.left}*{self.right}=?"

    @property
    def answer(self) -> int:
        return self.left * self.right


def draw_products(source: random.Random, count: int) -> list[Product]:
    """`count` problems, uniform over all pairs of factors in [SMALLEST_FACTOR, LARGEST_FACTOR]."""
    bounds = SMALLEST_FACTOR, LARGEST_FACTOR
    return [Product(source.randint(*bounds), source.randint(*bounds)) for _ in range(count)]


def calculator(expression: str) -> int:
    """Works out a product.

    Args:
        expression: two whole numbers with a * between them
    """
    found = _PRODUCT.fullmatch(expression)
    if found is None:
        raise ValueError(f"{expression!r} is no product of two whole numbers")
    return int(found[1]) * int(found[2])


def product_reward(answer: int, text: str) -> float:
    """1.0 for a well-formed last reply with the right number, else 0.0."""
    return float(read_reply(text) == answer)
