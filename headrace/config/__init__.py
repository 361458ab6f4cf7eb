"""Settings and model geometry, resolved once into a frozen value. Torch-free."""

from headrace.config.engine_config import EngineConfig
from headrace.config.model_spec import KvGroup, ModelSpec, RopeSpec
from headrace.config.resolve import ResolvedConfig, resolve

__all__ = ["EngineConfig", "KvGroup", "ModelSpec", "ResolvedConfig", "RopeSpec", "resolve"]
