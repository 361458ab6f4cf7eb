"""Attention backends behind `plan(inputs) -> step`, `step.run(layer, qkv, norms)`. Which one is chosen once."""

from headrace.attention.base import AttentionBackend, AttentionInputs, AttentionShape, AttentionStep
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
