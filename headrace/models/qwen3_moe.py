"""Qwen3-MoE: Qwen3 whose feed-forward block is experts, in most layers: a router gives each token to a few of many."""

from __future__ import annotations

from torch import Tensor

from headrace.config.layer_spec import ExpertsSpec
from headrace.layers.params import Params
from headrace.layers.residual import Residual
from headrace.layers.step import ForwardStep, KvPlace


class Qwen3MoeLayer:
    """x += attention(norm(x)); x += experts(norm(x)). The weights of a token's experts are rounded to the dtype."""

    def __init__(self, params: Params, kv: KvPlace, spec: ExpertsSpec) -> None:
        self.kv = kv
        self.attention_norm = params.norm("attention_norm")
        self.qkv = params.linear("qkv")
        self.head_norms = params.head_norms("q_norm", "k_norm")
        self.output = params.linear("output")
        self.mlp_norm = params.norm("mlp_norm")
        self.router = params.router("router", spec, rounds=True)
        self.experts = params.experts("experts_gate_up", "experts_down")

    def run(self, x: Residual, step: ForwardStep, kept_tokens: Tensor | None = None) -> None:
        """As `Layer.run`."""
        qkv = self.qkv(x.normed(self.attention_norm))
        attended = step.attention[self.kv.group].run(self.kv.layer, qkv, self.head_norms)
        x.add(self.output, x.keep(kept_tokens, attended))
        x.add_experts(self.experts, step.noted(self.router(x.normed(self.mlp_norm))))
