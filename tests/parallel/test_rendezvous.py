"""How a group of NCCL's is made, in a process that may be a trainer's."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C import _distributed_c10d as c10d

from headrace.parallel.rendezvous import Rendezvous

NAMES = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kept", [(None, None), ("1", "3"), (None, "2")])
def test_torch_is_told_to_end_no_process_and_the_trainers_own_groups_are_as_before(
    monkeypatch: pytest.MonkeyPatch, kept: tuple[str | None, str | None], fails: bool
) -> None:
    seen: list[Any] = []

    class Group:
        def __init__(self, store: Any, rank: int, num_ranks: int, options: Any) -> None:
            seen.append(({name: os.environ.get(name) for name in NAMES}, rank, num_ranks, options._timeout))
            if fails:
                raise RuntimeError("no device")

        Options = SimpleNamespace

    monkeypatch.setattr(c10d, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    for name, value in zip(NAMES, kept, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    rendezvous = Rendezvous.host()
    try:
        rendezvous.group(1, 2, device="cuda")
    except RuntimeError:
        assert fails
    assert seen == [({NAMES[0]: "0", NAMES[1]: None}, 1, 2, timedelta(days=1))]
    assert tuple(os.environ.get(name) for name in NAMES) == kept
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
