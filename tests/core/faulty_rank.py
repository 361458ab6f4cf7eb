"""A rank in which something goes wrong once: `headrace.core.rank_process` with the fault that FAULT names."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from headrace.core import follower, rank_member, rank_process, service
from headrace.runner.occupation import Occupation
from headrace.runner.runner import Runner
from headrace.types.errors import UnavailableError, WeightUpdateError
from headrace.weights import store

FAULT = "HEADRACE_TEST_FAULT"


def first_time(error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises the error the first time that it is called."""
    errors = [error]

    def call(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*args, **kwargs)

    return call


def die(*args: Any, **kwargs: Any) -> Any:
    """As one for whom there is no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def break_something(fault: str) -> None:
    kind, _, name = fault.partition(":")
    if kind == "die":
        owner = Occupation if hasattr(Occupation, name) else store.WeightStore
        setattr(owner, name, die)
    match fault:
        case "commit":
            store.WeightStore.commit = first_time(RuntimeError("broken"), store.WeightStore.commit)  # type: ignore[method-assign]
        case "begin":
            refusal = WeightUpdateError("no room for a shadow", field="mode")
            store.WeightStore.begin = first_time(refusal, store.WeightStore.begin)  # type: ignore[method-assign]
        case "join":
            rank_member.mesh_of = die  # type: ignore[attr-defined]
        case "torch":
            service.importlib = SimpleNamespace(import_module=first_time(OSError("no libtorch"), __import__))  # type: ignore
        case "step":
            Runner._run = first_time(torch.OutOfMemoryError("no memory"), Runner._run)  # type: ignore[method-assign]
        case "result":
            follower.digest_of = lambda result: 1  # type: ignore[attr-defined]
        case "resume":
            shortage = UnavailableError("no room for it", field="tags")
            Occupation.resume = first_time(shortage, Occupation.resume)  # type: ignore[method-assign]


if __name__ == "__main__":
    break_something(os.environ[FAULT])
    code = rank_process.main(sys.argv[1:])
    os._exit(code)
