"""The trainer's side: pushing weights, and a small GRPO demo. `push` and `arithmetic` load no torch of their own."""

from headrace.rl.push import PushReport, hf_named_tensors, push_weights
from headrace.rl.verl_engine import VerlEngine

__all__ = ["PushReport", "VerlEngine", "hf_named_tensors", "push_weights"]
