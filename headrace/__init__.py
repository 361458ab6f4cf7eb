"""Headrace: an LLM rollout engine for reinforcement learning."""

from headrace.config import EngineConfig
from headrace.engine import AsyncEngine, Engine, UpdateSession
from headrace.types.errors import (
    CheckpointError,
    ConfigError,
    DeadlineError,
    EngineDeadError,
    HeadraceError,
    InternalError,
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
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "Generation",
    "HeadraceError",
    "InternalError",
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
