"""Weights: the map from Hugging Face names to parameters, the update transaction, checkpoints.

This module imports no torch; what holds tensors is in `headrace.weights.store` and `headrace.weights.checkpoint`.
"""

from headrace.weights.session import UpdateSession, WeightMachine
from headrace.weights.weight_map import ParamSpec, WeightMap, WeightRule

__all__ = ["ParamSpec", "UpdateSession", "WeightMachine", "WeightMap", "WeightRule"]
