"""Qwen3: each query and key head is normed before rotation; biases only where the config asks for them."""

from headrace.models.family import OUTPUT_BIAS, QK_NORM, QKV_BIAS, Family

FAMILY = Family(architecture="Qwen3ForCausalLM", parts=(QKV_BIAS, OUTPUT_BIAS, QK_NORM))
