"""The trainer's side: pushing weights, one engine for all ranks of a trainer, and a small GRPO demo. `push` and
`arithmetic` load no torch of their own, and only `VerlEngine` the server."""

from typing import TYPE_CHECKING, Any

from headrace.rl.push import PushReport, WeightPusher, push_weights
from headrace.rl.sources import hf_named_tensors

if TYPE_CHECKING:
    from headrace.rl.verl_engine import VerlEngine

__all__ = ["PushReport", "VerlEngine", "WeightPusher", "hf_named_tensors", "push_weights"]


def __getattr__(name: str) -> Any:
    if name != "VerlEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from headrace.rl.verl_engine import VerlEngine

    return VerlEngine
