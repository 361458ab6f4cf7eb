"""Which experts a token is given to, and what they make of it. Owns the routing and the grouped product.

Shape legend: T tokens, K experts per token, E experts, N = T K pairs of a token and an expert of its, sorted by expert;
X hidden size, F intermediate size, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RouterRule(NamedTuple):
    """Each token goes to its `num_per_token` most probable experts. Their probabilities become its weights: scaled to a
    sum of 1 where the model `normalizes` them, and then rounded to the dtype of all else where it `rounds` them."""

    num_per_token: int
    normalizes: bool
    rounds: bool


class Routed(NamedTuple):
    """Tokens, and the experts each is given to, the most probable first. hidden [T, X], normed; experts int64 [T, K];
    weights [T, K], float32 or the dtype of the tokens."""

    hidden_TX: Tensor
    experts_TK: Tensor
    weights_TK: Tensor


def route(hidden_TX: Tensor, logits_TE: Tensor, rule: RouterRule) -> Routed:
    """Pick by the router's logits; probabilities are float32. A row's result depends on that row alone."""
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, experts_TK = torch.topk(probabilities_TE, rule.num_per_token, dim=-1)
    if rule.normalizes:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routed(hidden_TX, experts_TK, weights_TK.to(logits_TE.dtype) if rule.rounds else weights_TK)


def add_grouped_(
    residual_TX: Tensor,
    routed: Routed,
    gate_up_E2FX: Tensor,
    down_EXF: Tensor,
    linear: Callable[[Tensor, Tensor, None], Tensor],
    silu_and_mul: Callable[[Tensor], Tensor],
) -> None:
    """residual += what each token's experts make of it, by weight, with two products per expert that has any tokens.

    What a token gets is summed in float32 in the order of its experts, whoever else is given to them.
    """
    num_tokens, num_per_token = routed.experts_TK.shape
    experts_N = routed.experts_TK.view(-1)
    pairs_N = experts_N.argsort(stable=True)
    sizes_E = experts_N.bincount(minlength=gate_up_E2FX.shape[0]).tolist()
    hidden_NX = routed.hidden_TX.index_select(0, pairs_N // num_per_token)
    gated_NF = silu_and_mul(_grouped(linear, hidden_NX, gate_up_E2FX, sizes_E))
    out_NX = _grouped(linear, gated_NF, down_EXF, sizes_E)
    places_TK = pairs_N.argsort().view(num_tokens, num_per_token)
    total_TX = torch.zeros_like(residual_TX, dtype=torch.float32)
    for rank in range(num_per_token):
        total_TX += out_NX.index_select(0, places_TK[:, rank]) * routed.weights_TK[:, rank, None]
    residual_TX.add_(total_TX.to(residual_TX.dtype))


def _grouped(
    linear: Callable[[Tensor, Tensor, None], Tensor], x_NI: Tensor, weight_EOI: Tensor, sizes_E: list[int]
) -> Tensor:
    """The rows of each expert times its own weight -> [N, O]."""
    out_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    first = 0
    for expert, size in enumerate(sizes_E):
        if size:
            group = slice(first, first + size)
            out_NO[group] = linear(x_NI[group], weight_EOI[expert], None)
            first += size
    return out_NO
