"""Decoders: one file per architecture with its layer and its tensors, and what all of them have around that."""

from headrace.models.decoder import Decoder
from headrace.models.registry import build, weight_map

__all__ = ["Decoder", "build", "weight_map"]
