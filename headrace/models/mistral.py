"""Mistral: Llama without any bias. Its sliding window bounds the context length, so no layer sees past it."""

from headrace.models.family import Family
from headrace.models.llama import LlamaLayer

FAMILY = Family("MistralForCausalLM", LlamaLayer)
