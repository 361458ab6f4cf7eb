"""How many random cases tests try: the same few each time, or HEADRACE_ROUNDS times as many where that is set."""

from __future__ import annotations

import os


def rounds(num: int) -> int:
    return num * int(os.environ.get("HEADRACE_ROUNDS", "1"))
