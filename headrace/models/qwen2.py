"""Qwen2 and Qwen2.5: query, key and value projections always have a bias, the output projection never."""

from headrace.models.family import QKV_BIAS, Family

FAMILY = Family(architecture="Qwen2ForCausalLM", parts=(QKV_BIAS,))
