"""What layers become where each rank of a mesh has a share of them. Owns what is summed over ranks and what is put side
by side; how ranks reach each other is the communicator's.

Outputs of products over a norm (heads, gates and ups) are each rank's own. Products that are added to the stream are
sums over inputs of which each rank has a part; the vocabulary's rows are shared too, so that embeddings are a sum of
which all but one rank's are zero, and logits are every rank's side by side, the same on all.

Legend as in `headrace.kernels.kernel_set`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels import ExpertKernels, LayerKernels
from headrace.kernels.experts import Routed
from headrace.layers.linear import Embedding
from headrace.parallel import Communicator, Mesh


@dataclass(frozen=True, eq=False)
class RankPart:
    """What this rank has of a sum, which is to be added to the stream. `in_order`: as in `ShardedKernels`."""

    communicator: Communicator
    partial_TX: Tensor
    bias_X: Tensor | None
    in_order: bool

    def add_(self, residual_TX: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor | None:
        """As `Communicator.reduce_add_`."""
        return self.communicator.reduce_add_(residual_TX, self.partial_TX, self.bias_X, norm, in_order=self.in_order)


class ShardedKernels:
    """The products of one rank. `in_order`: sums over ranks do not depend on batch mates (numerics="invariant")."""

    def __init__(self, kernels: LayerKernels, mesh: Mesh, vocab_size: int, *, in_order: bool) -> None:
        self.linear, self.normed_linear, self.normed_gate = kernels.linear, kernels.normed_linear, kernels.normed_gate
        whole = kernels.experts
        self.experts: ExpertKernels | None = whole and ShardedExperts(whole, mesh, in_order=in_order)
        self._kernels, self._communicator, self._in_order = kernels, mesh.communicator, in_order
        self._vocab_size = vocab_size

    def linear_add_(self, residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> RankPart:
        """The bias is whole on every rank, and added after the sum."""
        return RankPart(self._communicator, self._kernels.linear(x_TI, weight_OI, None), bias_O, self._in_order)

    def normed_logits(self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_VI: Tensor) -> Tensor:
        """Of the whole vocabulary; only the last rank's rows may end with padding."""
        parts = self._communicator.all_gather(self._kernels.normed_logits(x_TI, norm_I, eps, weight_VI))
        return joined(parts, self._vocab_size)


def joined(parts_NSW: Tensor, vocab_size: int) -> Tensor:
    """Logits [S, V] of what each rank has of the vocabulary, by rank, without the padding that may end the last."""
    *firsts, last_SW = parts_NSW
    return torch.cat([*firsts, last_SW[:, : vocab_size - len(firsts) * parts_NSW.shape[2]]], dim=1)


class ShardedExperts:
    """Every rank has a slice of the width of every expert, and the whole router: all ranks route alike."""

    def __init__(self, kernels: ExpertKernels, mesh: Mesh, *, in_order: bool) -> None:
        self.normed_route = kernels.normed_route
        self._kernels, self._communicator, self._in_order = kernels, mesh.communicator, in_order

    def experts_add_(self, residual_TX: Tensor, routed: Routed, gate_up_E2FX: Tensor, down_EXF: Tensor) -> RankPart:
        """A token's experts are summed on each rank, and then over the ranks."""
        partial_TX = torch.zeros_like(residual_TX)
        self._kernels.experts_add_(partial_TX, routed, gate_up_E2FX, down_EXF)
        return RankPart(self._communicator, partial_TX, None, self._in_order)


class ShardedEmbedding(Embedding):
    """A table of whose rows this rank has its share, as many as every other."""

    def __init__(self, weight: Tensor, mesh: Mesh) -> None:
        super().__init__(weight)
        self._communicator = mesh.communicator
        self._first = mesh.rank * len(weight)

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows = token_ids - self._first
        is_elsewhere = (rows < 0) | (rows >= len(self.weight))
        hidden_TX = super().__call__(rows.masked_fill_(is_elsewhere, 0)).masked_fill_(is_elsewhere[:, None], 0)
        self._communicator.all_reduce_(hidden_TX)
        return hidden_TX
