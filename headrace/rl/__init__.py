"""The trainer's side: pushing weights, and a small GRPO demo. `push` and `arithmetic` load no torch of their own."""

from headrace.rl.push import PushReport, hf_named_tensors, push_weights

__all__ = ["PushReport", "hf_named_tensors", "push_weights"]
