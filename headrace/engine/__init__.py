"""The engine's Python face: requests in, samples out, weights in between. Torch-free."""

from headrace.engine.async_engine import AsyncEngine
from headrace.engine.control import DEFAULT_UPDATE_TIMEOUT
from headrace.engine.engine import Engine
from headrace.engine.requests import GenerateItem, GenerateOptions
from headrace.engine.stream import Stream
from headrace.engine.update_session import UpdateSession

__all__ = [
    "DEFAULT_UPDATE_TIMEOUT",
    "AsyncEngine",
    "Engine",
    "GenerateItem",
    "GenerateOptions",
    "Stream",
    "UpdateSession",
]
