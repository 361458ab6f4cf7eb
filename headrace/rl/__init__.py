"""The trainer's side: pushing weights, and a small GRPO demo. `push` and `arithmetic` load no torch of their own."""

from headrace.rl.push import PushReport, WeightPusher, push_weights
from headrace.rl.sources import hf_named_tensors
from headrace.rl.verl_engine import VerlEngine

__all__ = ["PushReport", "VerlEngine", "WeightPusher", "hf_named_tensors", "push_weights"]
