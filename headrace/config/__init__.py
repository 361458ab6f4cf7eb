"""Settings and model geometry, resolved once into a frozen value. Torch-free."""

from headrace.config.devices import CudaDevice, Software, cuda_devices
from headrace.config.engine_config import EngineConfig, SettledConfig
from headrace.config.layer_spec import KvGroup, LayerSpec
from headrace.config.model_spec import ModelSpec
from headrace.config.resolve import ResolvedConfig, Takeover, resolve
from headrace.config.rope import RopeSpec
from headrace.config.shares import PipelineStage, share_of, stages_of

__all__ = [
    "CudaDevice",
    "EngineConfig",
    "KvGroup",
    "LayerSpec",
    "ModelSpec",
    "PipelineStage",
    "ResolvedConfig",
    "RopeSpec",
    "SettledConfig",
    "Software",
    "Takeover",
    "cuda_devices",
    "resolve",
    "share_of",
    "stages_of",
]
