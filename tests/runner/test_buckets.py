"""Sizes that steps are padded to."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest
import torch

from headrace.attention.base import Bucket
from headrace.kernels.triton.ordered_products import matrix_tile
from headrace.kernels.triton.product_choice import ProductKind, choose_product
from headrace.runner.buckets import Buckets, row_sizes, token_sizes


def test_every_step_finds_a_bucket_that_holds_it_and_is_captured_if_small() -> None:
    choose = random.Random(0)
    for _ in range(300):
        max_rows = choose.choice((1, 3, 8, 100, 256, 512, 700))
        max_tokens = max(max_rows, choose.choice((1, 64, 2048, 5000)))
        max_graph_tokens = choose.choice((1, 256, 2048))
        buckets = Buckets(max_rows, max_tokens, max_graph_tokens)
        captured = set(buckets.captured)
        num_rows = choose.randint(1, max_rows)
        num_tokens = choose.choice((num_rows, choose.randint(num_rows, max_tokens)))
        bucket = buckets.of_step(num_tokens, num_rows)
        assert bucket.num_tokens >= num_tokens and bucket.num_rows >= num_rows
        assert bucket.is_decode == (num_tokens == num_rows)
        assert bucket in captured or num_tokens > max_graph_tokens
        assert buckets.num_sampled(num_rows) in buckets.sampled


def test_a_step_beyond_the_captured_sizes_is_hardly_padded() -> None:
    buckets = Buckets(max_rows=8, max_tokens=5000, max_graph_tokens=2048)
    assert buckets.of_step(3001, 3) == Bucket(3001, 4, False)
    assert buckets.greatest == Bucket(5000, 8, False)


def test_padding_is_bounded() -> None:
    for sizes, most in ((row_sizes(512), 512), (token_sizes(2048), 2048)):
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        for size, following in zip(sizes, sizes[1:], strict=False):
            assert following - size <= max(16, size) and (size < 256 or following - size <= size // 4 + 64)


def test_the_largest_launches_are_captured_first() -> None:
    buckets = Buckets(max_rows=64, max_tokens=512, max_graph_tokens=512)
    tokens = [bucket.num_tokens for bucket in buckets.captured]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == 512 and 1 in tokens
    assert buckets.sampled[0] == 64 and buckets.sampled[-1] == 1


@pytest.mark.parametrize("numerics", ["fast", "invariant", "invariant, by TMA"])
def test_a_start_runs_every_size_at_which_another_kernel_is_picked(numerics: str) -> None:
    """Whatever is captured: a step of any size then finds its products compiled."""
    products: list[tuple[ProductKind, int, int]] = [
        *(("plain", 4096, 1024), ("add", 1024, 2048), ("gate", 3072, 1024), ("add", 1024, 3072)),
        *(("plain", 6144, 4096), ("add", 4096, 4096), ("gate", 12288, 4096), ("add", 4096, 12288)),
    ]

    @functools.cache
    def picked(kind: ProductKind, num_outputs: int, num_inputs: int, num_rows: int) -> Any:
        if numerics != "fast":
            width = num_outputs * (2 if kind == "gate" else 1)
            return matrix_tile(num_rows, width, torch.bfloat16, fetches=numerics.endswith("TMA"))
        return choose_product(kind, num_rows, num_outputs, num_inputs, torch.bfloat16)

    for max_rows, max_tokens, max_graph_tokens in itertools.product((1, 8, 32, 512), (64, 2048, 8192), (16, 64, 2048)):
        buckets = Buckets(max_rows, max(max_rows, max_tokens), max_graph_tokens)
        visited = {bucket.num_tokens for bucket in (*buckets.captured, *buckets.uncaptured, buckets.greatest)}
        needed = {buckets.of_step(size, min(size - 1, max_rows)).num_tokens for size in range(2, max_tokens + 1)}
        for kind, num_outputs, num_inputs in products:
            missed = {picked(kind, num_outputs, num_inputs, size) for size in needed}
            missed -= {picked(kind, num_outputs, num_inputs, size) for size in visited}
            assert not missed, (kind, num_outputs, num_inputs)
