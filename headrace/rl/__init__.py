"""The trainer's side: pushing weights, and a small GRPO demo. `push` and `arithmetic` load no torch of their own."""

from headrace.rl.push import PushReport, WeightPusher, push_weights
from headrace.rl.sources import hf_named_tensors

__all__ = ["PushReport", "WeightPusher", "hf_named_tensors", "push_weights"]
