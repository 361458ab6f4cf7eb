"""What every layer of one step is given. Must not know plans, nor which backend attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from headrace.attention import AttentionStep
from headrace.kernels.experts import Routed


class KvPlace(NamedTuple):
    """Where a layer's keys and values are: a KV group, and the layer's number in it."""

    group: int
    layer: int


@dataclass(frozen=True)
class ForwardStep:
    """One step, the same for all layers.

    attention     by KV group; it knows the tokens' rows, padding, positions of rotation and pages
    kept_tokens   packed tokens whose hidden states anyone reads in the end, int64 [S]; None: all
    routed        where layers of experts list who was given which token, int64 [T, K] each; None: nobody asks
    """

    attention: Sequence[AttentionStep]
    kept_tokens: Tensor | None = None
    routed: list[Tensor] | None = None

    def noted(self, routed: Routed) -> Routed:
        """The same, listed if somebody asks."""
        if self.routed is not None:
            self.routed.append(routed.experts_TK)
        return routed
