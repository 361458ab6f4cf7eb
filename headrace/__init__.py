"""Headrace: an LLM rollout engine for reinforcement learning.

Names are looked up where they live when they are first asked for: importing the package takes no time.
"""

import importlib

TYPE_CHECKING = False  # that of `typing`, which takes longer to import than this package
if TYPE_CHECKING:
    from typing import Any

    from headrace.client import AsyncClient, Client, Runtime
    from headrace.config import EngineConfig
    from headrace.engine import AsyncEngine, Engine, UpdateSession
    from headrace.server.blocking import serve
    from headrace.types.errors import (
        CheckpointError,
        ConfigError,
        DeadlineError,
        DeviceLostError,
        EngineDeadError,
        HeadraceError,
        InternalError,
        NeedsWeightsError,
        NonFiniteError,
        NotFoundError,
        PauseTimeoutError,
        PoisonedError,
        RequestError,
        RequestTooLargeError,
        ShutdownError,
        UnavailableError,
        UnreachableError,
        UnsupportedModelError,
        UpdateConflictError,
        WeightUpdateError,
    )
    from headrace.types.generation import ChatReply, Generation
    from headrace.types.sampling_params import SamplingParams
    from headrace.types.weights import SaveReport, TensorInfo, UpdateReport
    from headrace.weights.saved import check_saved_model

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncEngine",
    "ChatReply",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DeadlineError",
    "DeviceLostError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "Generation",
    "HeadraceError",
    "InternalError",
    "NeedsWeightsError",
    "NonFiniteError",
    "NotFoundError",
    "PauseTimeoutError",
    "PoisonedError",
    "RequestError",
    "RequestTooLargeError",
    "Runtime",
    "SamplingParams",
    "SaveReport",
    "ShutdownError",
    "TensorInfo",
    "UnavailableError",
    "UnreachableError",
    "UnsupportedModelError",
    "UpdateConflictError",
    "UpdateReport",
    "UpdateSession",
    "WeightUpdateError",
    "__version__",
    "check_saved_model",
    "serve",
]

_HOMES = {
    "AsyncClient": "headrace.client",
    "AsyncEngine": "headrace.engine",
    "ChatReply": "headrace.types.generation",
    "Client": "headrace.client",
    "Engine": "headrace.engine",
    "EngineConfig": "headrace.config",
    "Generation": "headrace.types.generation",
    "Runtime": "headrace.client",
    "SamplingParams": "headrace.types.sampling_params",
    "SaveReport": "headrace.types.weights",
    "TensorInfo": "headrace.types.weights",
    "UpdateReport": "headrace.types.weights",
    "UpdateSession": "headrace.engine",
    "check_saved_model": "headrace.weights.saved",
    "serve": "headrace.server.blocking",
}
"""Where the names of `__all__` live; those of errors in `headrace.types.errors`."""


def __getattr__(name: str) -> "Any":
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "headrace.types.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
