"""Weights: the map from Hugging Face names to parameters, the update transaction, checkpoints.

This module imports no torch; what holds tensors is in `headrace.weights.store` and `headrace.weights.checkpoint`.
"""

from headrace.weights.boxes import Box
from headrace.weights.session import OpenUpdate, WeightMachine
from headrace.weights.shard import Shard
from headrace.weights.weight_map import Derived, ParamSpec, Piece, WeightMap, WeightRule, whole_rows

__all__ = [
    "Box",
    "Derived",
    "OpenUpdate",
    "ParamSpec",
    "Piece",
    "Shard",
    "WeightMachine",
    "WeightMap",
    "WeightRule",
    "whole_rows",
]
