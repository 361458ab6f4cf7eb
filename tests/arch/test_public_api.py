"""The names that callers rely on, frozen. After a deliberate change: `python -m tests.arch.public_api > FILE`."""

from __future__ import annotations

import inspect
from pathlib import Path

import headrace
from tests.arch.public_api import public_api

FROZEN = Path(__file__).with_name("public_api.txt")


def test_public_names_and_signatures_are_the_frozen_ones() -> None:
    assert public_api() == FROZEN.read_text(encoding="utf-8")


def test_all_is_sorted_and_complete() -> None:
    assert headrace.__all__ == sorted(headrace.__all__)
    assert all(hasattr(headrace, name) for name in headrace.__all__)


def test_engine_methods_take_what_their_async_twins_take() -> None:
    methods = {name for name in vars(headrace.Engine) if not name.startswith("_")}
    for name in methods:
        ours, theirs = getattr(headrace.Engine, name), getattr(headrace.AsyncEngine, name, None)
        if callable(ours):
            assert theirs is not None, name
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
