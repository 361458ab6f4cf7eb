"""Answers in at least so many pieces. How many there are is the machine's: a front that is late gets what came since in
one."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TypeVar

Answer = TypeVar("Answer", bound=Sized)


def in_pieces(
    ask: Callable[[], Answer], least: int = 2, pieces: Callable[[Answer], Sized] = lambda answer: answer
) -> Answer:
    """The first answer that comes in so many pieces; it is asked for 30 times at most."""
    for _ in range(30):
        answer = ask()
        if len(pieces(answer)) >= least:
            return answer
    raise AssertionError(f"not in {least} pieces in 30 times, the last time in {len(pieces(answer))}")
