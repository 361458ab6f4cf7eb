"""The one decoder stack: embedding, pre-norm layers, final norm, language-model head. Must not know plans or files.

Legend: T tokens, X hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from headrace.attention.base import AttentionShape, AttentionStep
from headrace.config import ModelSpec
from headrace.kernels import KernelSet, select_kernels
from headrace.kernels.rope_tables import rope_tables
from headrace.layers.attention import RopeRows, SelfAttention
from headrace.layers.linear import Embedding, GemmCounter, Linear
from headrace.layers.mlp import GatedMlp
from headrace.layers.norm import RmsNorm


class Layer:
    """One block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self, index: int, attention_norm: RmsNorm, attention: SelfAttention, mlp_norm: RmsNorm, mlp: GatedMlp
    ) -> None:
        self._index = index
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def run(self, hidden_TX: Tensor, rope: RopeRows, step: AttentionStep, tokens: Tensor | None = None) -> Tensor:
        """Update the residual stream in place and return it, or only its rows `tokens`, the rest being stale then."""
        attended_TX = self._attention.attend(self._attention_norm(hidden_TX), self._index, rope, step)
        if tokens is not None:
            hidden_TX, attended_TX = hidden_TX.index_select(0, tokens), attended_TX.index_select(0, tokens)
        self._attention.output.add_to(hidden_TX, attended_TX)
        self._mlp.add_to(hidden_TX, self._mlp_norm(hidden_TX))
        return hidden_TX


class Decoder:
    """A dense decoder over parameters that stay where they are; their contents may change between calls."""

    def __init__(
        self, spec: ModelSpec, params: Mapping[str, Tensor], *, numerics: str, context_length: int, counter: GemmCounter
    ) -> None:
        kernels = select_kernels(numerics)
        embed = params["embed"]
        self._embed = Embedding(embed)
        self._cos, self._sin = rope_tables(spec.rope, spec.head_dim, context_length, embed.dtype)
        self._layers = [_layer(spec, params, kernels, counter, index) for index in range(spec.num_layers)]
        self._final_norm = RmsNorm(kernels, params["final_norm.weight"], spec.rms_norm_eps)
        self._lm_head = Linear(kernels, counter, params.get("lm_head", embed))

    def forward(
        self, token_ids: Tensor, positions: Tensor, step: AttentionStep, tokens: Tensor | None = None
    ) -> Tensor:
        """Residual stream [T, X] after the last layer, not normed, of int64 [T] token ids at absolute positions.

        With `tokens` (int64 [S], packed indices) only those rows, [S, X]: the last layer computes keys and values for
        all tokens and the rest for these.
        """
        hidden_TX = self._embed(token_ids)
        rope = RopeRows(self._cos.index_select(0, positions), self._sin.index_select(0, positions))
        for layer in self._layers[:-1]:
            layer.run(hidden_TX, rope, step)
        return self._layers[-1].run(hidden_TX, rope, step, tokens)

    def logits(self, hidden_SX: Tensor) -> Tensor:
        """Rows of `forward`'s output -> float32 logits [S, V]."""
        return self._lm_head(self._final_norm(hidden_SX)).float()


def _layer(
    spec: ModelSpec, params: Mapping[str, Tensor], kernels: KernelSet, counter: GemmCounter, index: int
) -> Layer:
    def param(name: str) -> Tensor:
        return params[f"layers.{index}.{name}"]

    def linear(name: str) -> Linear:
        return Linear(kernels, counter, param(f"{name}.weight"), params.get(f"layers.{index}.{name}.bias"))

    def norm(name: str) -> RmsNorm:
        return RmsNorm(kernels, param(f"{name}.weight"), spec.rms_norm_eps)

    shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    head_norms = (norm("q_norm"), norm("k_norm")) if spec.qk_norm else (None, None)
    attention = SelfAttention(kernels, shape, linear("qkv"), linear("output"), *head_norms)
    return Layer(
        index, norm("attention_norm"), attention, norm("mlp_norm"), GatedMlp(kernels, linear("gate_up"), linear("down"))
    )
