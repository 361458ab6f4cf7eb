"""The residual stream where ranks sum what is added to it: later, but before anything is made of it, and once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.kernels import PartialSum, select_kernels
from headrace.layers.linear import GemmCounter, Linear
from headrace.layers.norm import Normed, RmsNorm
from headrace.layers.residual import Residual

KERNELS = select_kernels("reference")
WIDTH = 8


class Later:
    """Adds what it is made of when it is told to, and leaves norms if it can."""

    def __init__(self, part: Tensor, *, norms: bool) -> None:
        self.part, self.norms, self.num_added = part, norms, 0

    def add_(self, residual_TX: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor | None:
        residual_TX += self.part
        self.num_added += 1
        return KERNELS.rms_norm(residual_TX, *norm) if norm is not None and self.norms else None


class LateKernels:
    """Products that are added later."""

    def __init__(self, *, norms: bool) -> None:
        self.norms, self.parts = norms, list[Later]()
        self.normed_linear = KERNELS.normed_linear

    def linear_add_(self, _: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> PartialSum:
        self.parts.append(Later(KERNELS.linear(x_TI, weight_OI, bias_O), norms=self.norms))
        return self.parts[-1]


def linear(kernels: Any, seed: int) -> Linear:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Linear(kernels, GemmCounter(), weight)


@pytest.mark.parametrize("norms", [False, True])
def test_what_is_added_later_is_there_whenever_the_stream_is_used(norms: bool) -> None:
    for seed in range(300):
        choose, late = random.Random(seed), LateKernels(norms=norms)
        start = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
        found, expected = Residual(start.clone()), Residual(start.clone())
        norm, num_kept = RmsNorm(torch.rand(WIDTH), 1e-5), 5
        for number in range(choose.randrange(1, 9)):
            act = choose.choice(("add", "add", "normed", "keep", "stream"))
            x = torch.randn(num_kept, WIDTH, generator=torch.Generator().manual_seed(number))
            if act == "add":
                found.add(linear(late, number), x)
                expected.add(linear(KERNELS, number), x)
            elif act == "normed":
                normed = found.normed(norm)
                assert torch.equal(product_of(normed), product_of(expected.normed(norm)))
                assert (normed.weight_X is None) <= norms
            elif act == "keep" and num_kept > 1:
                num_kept -= 1
                kept = torch.arange(num_kept)
                assert torch.equal(found.keep(kept, x), expected.keep(kept, x))
            else:
                assert torch.equal(found.stream(), expected.stream())
        assert torch.equal(found.stream(), expected.stream())
        assert all(part.num_added == 1 for part in late.parts)


def product_of(normed: Normed) -> Tensor:
    return linear(KERNELS, 99)(normed)


def test_a_norm_that_comes_with_the_sum_is_not_computed_again() -> None:
    late = LateKernels(norms=True)
    x = Residual(torch.ones(2, WIDTH))
    x.add(linear(late, 0), torch.ones(2, WIDTH))
    values, weight, _ = x.normed(RmsNorm(torch.full((WIDTH,), 3.0), 1e-5))
    assert weight is None and torch.allclose(values.square().mean(-1).sqrt(), torch.tensor(3.0))


@pytest.mark.parametrize("name", ["reference", "fast", "invariant"])
def test_products_take_what_is_normed_already_as_it_is(name: str) -> None:
    kernels = select_kernels(name)
    x, weight, norm = torch.randn(4, WIDTH), torch.randn(2 * WIDTH, WIDTH), torch.rand(WIDTH)
    normed = kernels.rms_norm(x, norm, 1e-5)
    for product in (kernels.normed_linear, kernels.normed_gate):
        assert torch.equal(product(normed, None, 0.0, weight, None), product(x, norm, 1e-5, weight, None))
    assert torch.equal(kernels.normed_logits(normed, None, 0.0, weight), kernels.normed_logits(x, norm, 1e-5, weight))
