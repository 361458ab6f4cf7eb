"""Attention backends behind `plan(inputs) -> step`, `step.run(layer, q, k, v)`. Which one is a value, chosen once."""

from headrace.attention.base import AttentionBackend, AttentionInputs, AttentionShape, AttentionStep
from headrace.attention.select import CAPABILITIES, Capability, build_backend, refusals

__all__ = [
    "CAPABILITIES",
    "AttentionBackend",
    "AttentionInputs",
    "AttentionShape",
    "AttentionStep",
    "Capability",
    "build_backend",
    "refusals",
]
