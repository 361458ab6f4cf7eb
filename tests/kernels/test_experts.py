"""Experts: each set of kernels against the oracle, the invariant one bit for bit in any batch; how many products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.kernels import KernelSet, select_kernels
from headrace.kernels.experts import Routed, RouterRule
from headrace.kernels.products import Products

HIDDEN, WIDTH = 72, 44
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Block:
    """One router and its experts."""

    def __init__(self, num_experts: int, rule: RouterRule, dtype: torch.dtype = torch.float32) -> None:
        self.rule = rule
        self.norm = 1 + random(HIDDEN, dtype=dtype, seed=1) / 4
        self.router = random(num_experts, HIDDEN, dtype=dtype, seed=2) / 8
        self.gate_up = random(num_experts, 2 * WIDTH, HIDDEN, dtype=dtype, seed=3) / 8
        self.down = random(num_experts, HIDDEN, WIDTH, dtype=dtype, seed=4) / 6

    def route(self, kernels: KernelSet, x: Tensor) -> Routed:
        return kernels.experts.normed_route(x, self.norm, 1e-6, self.router, self.rule)

    def run(self, kernels: KernelSet, x: Tensor) -> Tensor:
        stream = x.clone()
        kernels.experts.experts_add_(stream, self.route(kernels, x), self.gate_up, self.down)
        return stream


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["fast", "invariant"])
@pytest.mark.parametrize(("num_experts", "num_per_token"), [(4, 1), (5, 2), (16, 4), (4, 4)])
@pytest.mark.parametrize(("normalizes", "rounds"), [(True, False), (False, True)])
def test_every_set_equals_the_oracle(
    dtype: torch.dtype, name: str, num_experts: int, num_per_token: int, normalizes: bool, rounds: bool
) -> None:
    block = Block(num_experts, RouterRule(num_per_token, normalizes, rounds), dtype)
    x = random(70, HIDDEN, dtype=dtype, seed=5)
    routed = block.route(select_kernels(name), x)
    assert routed.weights_TK.dtype == (dtype if rounds else torch.float32)
    assert (routed.weights_TK.diff(dim=1) <= 0).all() and (routed.experts_TK.sort(dim=1)[0].diff(dim=1) > 0).all()
    sums = routed.weights_TK.float().sum(1)
    assert (sums - 1).abs().max() < 1e-2 if normalizes or num_per_token == num_experts else (sums < 0.99).any()
    found, expected = (x.clone() for _ in range(2))
    select_kernels(name).experts.experts_add_(found, routed, block.gate_up, block.down)
    select_kernels("reference").experts.experts_add_(expected, routed, block.gate_up, block.down)
    torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert not torch.allclose(found, x, atol=0.1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_bits_of_the_invariant_set_do_not_depend_on_the_batch(dtype: torch.dtype, num_threads: int) -> None:
    """Alone, in any order, among any others, also where two experts are as probable."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        block, kernels = Block(7, RouterRule(3, True, False), dtype), select_kernels("invariant")
        block.router[5] = block.router[2]
        x = random(300, HIDDEN, dtype=dtype, seed=5)
        whole = block.run(kernels, x)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(6))
        assert torch.equal(block.run(kernels, x[order]), whole[order])
        for first, size in ((0, 1), (7, 1), (3, 16), (40, 17), (99, 150), (299, 1)):
            part = slice(first, first + size)
            assert torch.equal(block.run(kernels, x[part]), whole[part])
            assert torch.equal(block.run(kernels, x[part].repeat(2, 1))[size:], whole[part])
    finally:
        torch.set_num_threads(before)


class CountedProducts(Products):
    num_calls = 0

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        self.num_calls += 1
        return super().linear(x_TI, weight_OI, bias_O)


def test_the_number_of_products_is_bounded_by_that_of_experts_however_many_tokens_come() -> None:
    block = Block(8, RouterRule(2, True, False))
    counts = []
    for num_tokens in (1, 2, 64, 500):
        products = CountedProducts()
        block.run(select_kernels("fast", products), random(num_tokens, HIDDEN, seed=5))
        counts.append(products.num_calls)
    assert counts[0] == 1 + 2 * 2 and counts[1] <= 1 + 2 * 4  # the router, and two for each expert of any token
    assert counts[2:] == [1 + 2 * 8] * 2


@pytest.mark.parametrize("name", ["fast", "invariant", "reference"])
def test_no_tokens_and_no_numbers(name: str) -> None:
    """A step may keep no token in its last layer; what is no number goes somewhere, and harms no other row."""
    block, kernels = Block(5, RouterRule(2, True, False)), select_kernels(name)
    assert block.run(kernels, random(0, HIDDEN)).shape == (0, HIDDEN)
    x = random(20, HIDDEN)
    expected = block.run(kernels, x)
    x[3] = torch.nan
    found = block.run(kernels, x)
    assert found[3].isnan().all()
    kept = [row for row in range(20) if row != 3]
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=0)
