"""The trainer's side: pushing weights, one engine for all ranks of a trainer, and a small GRPO demo.

Names are looked up where they live when they are first asked for: plug-ins of frameworks lie below this package, and
are loaded into processes that do nothing with them. `push` and `arithmetic` load no torch of their own, and only
`VerlEngine` the server."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.rl.push import PushReport, WeightPusher, push_weights
    from headrace.rl.sources import hf_named_tensors
    from headrace.rl.verl_engine import VerlEngine

__all__ = ["PushReport", "VerlEngine", "WeightPusher", "hf_named_tensors", "push_weights"]

_HOMES = {"VerlEngine": "headrace.rl.verl_engine", "hf_named_tensors": "headrace.rl.sources"}
"""Where the names of `__all__` live; the others in `headrace.rl.push`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "headrace.rl.push")), name)
    globals()[name] = value
    return value
