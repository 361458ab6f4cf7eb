"""The one decoder stack: embedding, pre-norm layers, final norm, language-model head. Must not know plans or files.

Legend: T tokens, X hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from headrace.attention.base import AttentionShape, AttentionStep, HeadNorms, ProjectedStep
from headrace.config import ModelSpec
from headrace.kernels import KernelSet, LayerKernels
from headrace.kernels.rope_tables import rope_tables
from headrace.layers.attention import ProjectedAttention, RotatedStep, SelfAttention
from headrace.layers.linear import Embedding, GemmCounter, Linear
from headrace.layers.mlp import GatedMlp
from headrace.layers.norm import RmsNorm


class Attention(Protocol):
    """The attention of a layer, over whichever kind of step its decoder was built for."""

    output: Linear

    def attend(self, x_TX: Tensor, layer: int, step: Any) -> Tensor: ...


class Layer:
    """One block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, index: int, attention: Attention, mlp: GatedMlp) -> None:
        self._index = index
        self._attention = attention
        self._mlp = mlp

    def run(self, hidden_TX: Tensor, step: RotatedStep | ProjectedStep, tokens: Tensor | None = None) -> Tensor:
        """Update the residual stream in place and return it, or only its rows `tokens`, the rest being stale then."""
        attended_TX = self._attention.attend(hidden_TX, self._index, step)
        if tokens is not None:
            hidden_TX, attended_TX = hidden_TX.index_select(0, tokens), attended_TX.index_select(0, tokens)
        self._attention.output.add_to(hidden_TX, attended_TX)
        self._mlp.add_to(hidden_TX)
        return hidden_TX


class Decoder:
    """A dense decoder over parameters that stay where they are; their contents may change between calls.

    `cos_PD`, `sin_PD` are its rotary tables by position, `embedding` [V, X] its token embedding.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Mapping[str, Tensor],
        *,
        kernels: LayerKernels,
        context_length: int,
        counter: GemmCounter,
    ) -> None:
        embed = params["embed"]
        self._embed = Embedding(embed)
        tables = rope_tables(spec.rope, spec.head_dim, context_length, embed.dtype)
        self.cos_PD, self.sin_PD = (table.to(embed.device) for table in tables)
        self._layers = [_layer(spec, params, kernels, counter, index) for index in range(spec.num_layers)]
        self._final_norm = RmsNorm(params["final_norm.weight"], spec.rms_norm_eps)
        self._lm_head = Linear(kernels, counter, params.get("lm_head", embed))

    @property
    def embedding(self) -> Tensor:
        """[V, X]."""
        return self._embed.weight

    def forward(
        self, token_ids: Tensor, positions: Tensor, step: AttentionStep, tokens: Tensor | None = None
    ) -> Tensor:
        """Residual stream [T, X] after the last layer, not normed, of int64 [T] token ids at absolute positions.

        With `tokens` (int64 [S], packed indices) only those rows, [S, X]: the last layer computes keys and values for
        all tokens and the rest for these.
        """
        rotated = RotatedStep(step, self.cos_PD.index_select(0, positions), self.sin_PD.index_select(0, positions))
        return self.run_layers(self._embed(token_ids), rotated, tokens)

    def run_layers(self, hidden_TX: Tensor, step: RotatedStep | ProjectedStep, tokens: Tensor | None = None) -> Tensor:
        """`forward` without the embedding: the residual stream is updated in place and returned."""
        for layer in self._layers[:-1]:
            layer.run(hidden_TX, step)
        return self._layers[-1].run(hidden_TX, step, tokens)

    def logits(self, hidden_SX: Tensor) -> Tensor:
        """Rows of `forward`'s output -> float32 logits [S, V]."""
        return self._lm_head.logits_of_normed(hidden_SX, self._final_norm)


def _layer(
    spec: ModelSpec, params: Mapping[str, Tensor], kernels: LayerKernels, counter: GemmCounter, index: int
) -> Layer:
    def param(name: str) -> Tensor:
        return params[f"layers.{index}.{name}"]

    def linear(name: str) -> Linear:
        return Linear(kernels, counter, param(f"{name}.weight"), params.get(f"layers.{index}.{name}.bias"))

    def norm(name: str) -> RmsNorm:
        return RmsNorm(param(f"{name}.weight"), spec.rms_norm_eps)

    heads = HeadNorms(param("q_norm.weight"), param("k_norm.weight"), spec.rms_norm_eps) if spec.qk_norm else None
    attention: Attention
    if isinstance(kernels, KernelSet):
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        attention = SelfAttention(kernels, shape, norm("attention_norm"), linear("qkv"), linear("output"), heads)
    else:
        attention = ProjectedAttention(norm("attention_norm"), linear("qkv"), linear("output"), heads)
    return Layer(index, attention, GatedMlp(norm("mlp_norm"), linear("gate_up"), linear("down")))
