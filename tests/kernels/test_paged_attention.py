"""The paged store and attention over it: right against a dense oracle, and bit for bit alone in any batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from headrace.kernels.paged_attention import SampledAttention
from headrace.kernels.paged_kv import KvGeometry, KvPool, store_rows, token_rows
from headrace.runner.occupation import Occupation
from headrace.types.errors import ConfigError

GEOMETRY = KvGeometry(num_layers=2, num_pages=40, num_kv_heads=2, page_size=8, head_dim=20)
NUM_HEADS = 6


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def filled_pool() -> KvPool:
    pool = KvPool(GEOMETRY, torch.float32)
    generator = torch.Generator().manual_seed(0)
    page_rows = GEOMETRY.num_kv_heads * GEOMETRY.page_size
    for flat in (*pool.keys, *pool.values):
        flat[page_rows:] = torch.randn(flat[page_rows:].shape, generator=generator)
    return pool


def attend(pool: KvPool, pages: Tensor, contexts: Tensor, q: Tensor, width: int) -> Tensor:
    rows = token_rows(GEOMETRY, pages, width)
    attention = SampledAttention(
        rows, contexts, NUM_HEADS, GEOMETRY.num_kv_heads, GEOMETRY.page_size, GEOMETRY.num_rows, 0.3
    )
    return attention.run(q, pool.keys[1], pool.values[1])


def queries() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    contexts = torch.tensor([1, 2, 9, 15, 16, 17, 31, 32, 33, 64, 80, 100])
    pages = torch.stack([torch.randperm(39, generator=generator)[:24] + 1 for _ in contexts])
    return pages, contexts, torch.randn(len(contexts), NUM_HEADS, GEOMETRY.head_dim, generator=generator)


def test_store_puts_tokens_where_token_rows_finds_them() -> None:
    pool = KvPool(GEOMETRY, torch.float32)
    k, v = torch.randn(3, 2, 20), torch.randn(3, 2, 20)
    pages, offsets = torch.tensor([7, 3, 3]), torch.tensor([7, 0, 1])
    pool.store(1, store_rows(GEOMETRY, pages, offsets), k, v)
    rows = token_rows(GEOMETRY, torch.tensor([[3, 7]]), 16)[0]
    for head in range(2):
        at = rows[[15, 0, 1]] + head * GEOMETRY.page_size
        assert torch.equal(pool.keys[1][at], k[:, head]) and torch.equal(pool.values[1][at], v[:, head])
    assert pool.keys[1].count_nonzero() == k.numel() and not pool.keys[0].any()


def test_the_pool_is_aligned_and_zero() -> None:
    pool = KvPool(GEOMETRY, torch.bfloat16)
    assert pool.keys[0].data_ptr() % 64 == 0 and not pool.keys[0].any() and pool.keys[0].dtype == torch.bfloat16


def test_attention_equals_softmax_over_gathered_rows() -> None:
    pool, (pages, contexts, q) = filled_pool(), queries()
    found = attend(pool, pages, contexts, q, 112).view(len(contexts), NUM_HEADS, -1)
    for n, context in enumerate(contexts.tolist()):
        rows = token_rows(GEOMETRY, pages[n : n + 1], context)[0]
        for head in range(NUM_HEADS):
            at = rows + head // 3 * GEOMETRY.page_size
            weights = torch.softmax(pool.keys[1][at].double() @ q[n, head].double() * 0.3, 0)
            expected = (weights @ pool.values[1][at].double()).float()
            torch.testing.assert_close(found[n, head], expected, atol=1e-5, rtol=0)


def test_bits_do_not_depend_on_batch_order_or_padding(num_threads: int) -> None:
    pool, (pages, contexts, q) = filled_pool(), queries()
    alone = torch.cat([
        attend(pool, pages[n : n + 1], contexts[n : n + 1], q[n : n + 1], int(contexts[n] + 15) // 16 * 16)
        for n in range(len(contexts))
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for width in (112, 128, 160, 192):
        for num_queries in (1, 2, 5, 12):
            order = torch.randperm(len(contexts), generator=generator)[:num_queries]
            found = attend(pool, pages[order], contexts[order], q[order], width)
            assert torch.equal(found, alone[order])


def test_what_lies_beyond_a_context_is_never_read() -> None:
    pool, (pages, contexts, q) = filled_pool(), queries()
    expected = attend(pool, pages[:3], contexts[:3], q[:3], 16)
    unseen = set(range(1, 40)) - {int(page) for n in range(3) for page in pages[n, :2]}
    for page in unseen:
        at = page * GEOMETRY.num_kv_heads * GEOMETRY.page_size
        pool.keys[1][at : at + 16] = float("nan")
        pool.values[1][at : at + 16] = float("nan")
    assert torch.equal(attend(pool, pages[:3], contexts[:3], q[:3], 48), expected)


@pytest.mark.parametrize("num_pages", [1 << 44, 1 << 60])
def test_a_pool_that_no_memory_holds_names_the_setting(num_pages: int) -> None:
    with pytest.raises(ConfigError, match="does not fit in memory") as caught:
        zeros = partial(Occupation(torch.device("cpu"), is_saver=False).zeros, "kv_cache")
        KvPool(dataclasses.replace(GEOMETRY, num_pages=num_pages), torch.float32, zeros=zeros)
    assert caught.value.field == "kv_pool_tokens"


def test_a_pool_that_a_device_does_not_hold_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ConfigError) as caught:
        KvPool(GEOMETRY, torch.float32, torch.device("meta"))
    assert caught.value.field == "kv_pool_tokens"
