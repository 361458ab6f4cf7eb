"""Llama 2 and 3.x: the skeleton itself; biases only where the config asks for them."""

from headrace.models.family import MLP_BIAS, OUTPUT_BIAS, QKV_BIAS, Family

FAMILY = Family(architecture="LlamaForCausalLM", parts=(QKV_BIAS, OUTPUT_BIAS, MLP_BIAS))
