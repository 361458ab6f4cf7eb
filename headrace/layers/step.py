"""What every layer of one step is given. Must not know plans, nor which backend attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from headrace.attention import AttentionStep


class KvPlace(NamedTuple):
    """Where a layer's keys and values are: a KV group, and the layer's number in it."""

    group: int
    layer: int


@dataclass(frozen=True)
class ForwardStep:
    """One step, the same for all layers.

    attention     by KV group; it knows the tokens' rows, padding, positions of rotation and pages
    kept_tokens   packed tokens whose hidden states anyone reads in the end, int64 [S]; None: all
    """

    attention: Sequence[AttentionStep]
    kept_tokens: Tensor | None = None
