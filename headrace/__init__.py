"""Headrace: an LLM rollout engine for reinforcement learning.

Names are looked up where they live when they are first asked for: importing the package takes no time.
"""

import importlib

TYPE_CHECKING = False  # that of `typing`, which takes longer to import than this package
if TYPE_CHECKING:
    from typing import Any

    from headrace.config import EngineConfig
    from headrace.engine import AsyncEngine, Engine, UpdateSession
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
        UnsupportedModelError,
        UpdateConflictError,
        WeightUpdateError,
    )
    from headrace.types.generation import Generation
    from headrace.types.sampling_params import SamplingParams
    from headrace.types.weights import TensorInfo, UpdateReport

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CheckpointError",
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
    "SamplingParams",
    "ShutdownError",
    "TensorInfo",
    "UnavailableError",
    "UnsupportedModelError",
    "UpdateConflictError",
    "UpdateReport",
    "UpdateSession",
    "WeightUpdateError",
    "__version__",
]

_HOMES = {
    "AsyncEngine": "headrace.engine",
    "Engine": "headrace.engine",
    "EngineConfig": "headrace.config",
    "Generation": "headrace.types.generation",
    "SamplingParams": "headrace.types.sampling_params",
    "TensorInfo": "headrace.types.weights",
    "UpdateReport": "headrace.types.weights",
    "UpdateSession": "headrace.engine",
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
