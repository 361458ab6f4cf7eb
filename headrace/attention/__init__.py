"""Attention backends behind `plan(inputs) -> step`, `step.run(layer, qkv, norms)`. Which one is chosen once."""

from headrace.attention.base import AttentionBackend, AttentionInputs, AttentionStep
from headrace.attention.heads import Heads
from headrace.attention.select import (
    CAPABILITIES,
    CHOICES,
    Capability,
    Choice,
    build_backend,
    build_device_backend,
    refusals,
)
from headrace.kernels.paged_kv import AttentionShape

__all__ = [
    "CAPABILITIES",
    "CHOICES",
    "AttentionBackend",
    "AttentionInputs",
    "AttentionShape",
    "AttentionStep",
    "Capability",
    "Choice",
    "Heads",
    "build_backend",
    "build_device_backend",
    "refusals",
]
