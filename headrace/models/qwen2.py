"""Qwen2 and Qwen2.5: query, key and value projections always have a bias, the output projection never."""

from headrace.models.family import QKV_BIAS, Family
from headrace.models.llama import LlamaLayer

FAMILY = Family("Qwen2ForCausalLM", LlamaLayer, parts=(QKV_BIAS,))
