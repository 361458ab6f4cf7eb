"""Dense decoders: one stack, one small file per family saying what differs, and the weight map of each as data."""

from headrace.models.decoder import Decoder
from headrace.models.registry import build, family_of, weight_map

__all__ = ["Decoder", "build", "family_of", "weight_map"]
