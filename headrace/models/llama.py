"""Llama 2 and 3.x, Mistral, Qwen2 and Qwen2.5, which differ in their biases only."""

from __future__ import annotations

from torch import Tensor

from headrace.config import LayerSpec
from headrace.layers.params import Params
from headrace.layers.residual import Residual
from headrace.layers.step import ForwardStep, KvPlace


class LlamaLayer:
    """x += attention(norm(x)); x += mlp(norm(x)). Query, key and value heads are one product, gates and ups another."""

    def __init__(self, params: Params, kv: KvPlace, spec: LayerSpec) -> None:
        self.kv = kv
        self.attention_norm = params.norm("attention_norm")
        self.qkv = params.linear("qkv")
        self.output = params.linear("output")
        self.mlp_norm = params.norm("mlp_norm")
        self.gate_up = params.linear("gate_up")
        self.down = params.linear("down")

    def run(self, x: Residual, step: ForwardStep, kept_tokens: Tensor | None = None) -> None:
        """As `Layer.run`."""
        qkv = self.qkv(x.normed(self.attention_norm))
        attended = step.attention[self.kv.group].run(self.kv.layer, qkv, None)
        x.add(self.output, x.keep(kept_tokens, attended))
        x.add(self.down, self.gate_up.gate(x.normed(self.mlp_norm)))
