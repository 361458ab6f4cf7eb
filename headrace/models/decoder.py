"""What every decoder has around its layers: embedding, final norm, language-model head. Must not know plans or files.

Legend: T tokens, S tokens kept, X hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor

from headrace.kernels import LayerKernels
from headrace.layers.linear import Embedding, Linear
from headrace.layers.norm import RmsNorm
from headrace.layers.params import Params
from headrace.layers.residual import Residual
from headrace.layers.step import ForwardStep


class Layer(Protocol):
    """One block of an architecture; the same code on every device."""

    def run(self, x: Residual, step: ForwardStep, kept_tokens: Tensor | None = None) -> None:
        """Attend and transform, onto the stream; with `kept_tokens` it goes on with these once all keys are stored."""


class Decoder:
    """Layers over parameters that stay where they are; their contents may change between calls. One stage of several
    has `embed` if it is the first, and norm and head if it is the last."""

    def __init__(
        self,
        params: Params,
        layers: Sequence[Layer],
        embed: Embedding | None,
        *,
        kinds: Sequence[Hashable],
        has_head: bool = True,
        own_kernels: LayerKernels | None = None,
    ) -> None:
        """`kinds`: of each layer, alike where they have the same shapes. `own_kernels`: of this rank alone; None: those
        of the parameters are."""
        self._embed = embed
        self._own_kernels = own_kernels or params.kernels
        self._layers = layers
        self._samples = [layers[index] for index in _sampled(kinds)]
        self._head: tuple[RmsNorm, Linear] | None = None
        if has_head:
            weight = params.tensors["lm_head" if "lm_head" in params.tensors else "embed"]
            self._head = params.norm("final_norm"), Linear(params.kernels, params.counter, weight)

    @property
    def embed(self) -> Embedding:
        """Of the first stage."""
        assert self._embed is not None, "only the first stage embeds"
        return self._embed

    def forward(self, hidden_TX: Tensor, step: ForwardStep) -> Tensor:
        """All layers, from embeddings to the residual stream [S, X] after the last one, not normed.

        The stream is updated in place, but for the last layer of a step that keeps some tokens only.
        """
        x = Residual(hidden_TX)
        for layer in self._layers[:-1]:
            layer.run(x, step)
        self._layers[-1].run(x, step, step.kept_tokens)
        return x.stream()

    def sample_layers(self, hidden_TX: Tensor, step: ForwardStep) -> None:
        """As `forward`, by the first layer of each kind and the one behind it, which launch what all layers do."""
        x = Residual(hidden_TX)
        for layer in self._samples:
            layer.run(x, step)
        x.stream()

    def logits(self, hidden_SX: Tensor) -> Tensor:
        """Rows of the last stage's `forward` -> float32 logits [S, V]."""
        assert self._head is not None, "only the last stage has logits"
        norm, head = self._head
        return head.logits(Residual(hidden_SX).normed(norm))

    def share_of_logits(self, hidden_SX: Tensor) -> Tensor:
        """As `logits`, of the rows of the vocabulary that this rank has, padding among them."""
        assert self._head is not None, "only the last stage has logits"
        norm, head = self._head
        return head.logits(Residual(hidden_SX).normed(norm), self._own_kernels)


def _sampled(kinds: Sequence[Hashable]) -> list[int]:
    """Numbers of the first layer of each kind and of the one behind it, in order."""
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return sorted({index for first in firsts for index in (first, first + 1) if index < len(kinds)})
