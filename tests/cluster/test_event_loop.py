from __future__ import annotations

import asyncio
import sys

import pytest
import uvloop

from headrace.cluster.event_loop import run


async def kind_of_loop() -> type:
    return type(asyncio.get_running_loop())


def test_it_is_uvloops_where_that_is_installed_and_else_asyncios(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(kind_of_loop()) is uvloop.Loop
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(kind_of_loop()) is not uvloop.Loop
