"""numerics="invariant": the same logits bit for bit however a sequence is computed, and whatever runs beside it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.parity.models import VOCAB_SIZE, Device, make_model
from tests.runner.plans import PlanBuilder

LENGTHS = (130, 64, 33, 17, 16, 5, 1, 90)


def sequences() -> dict[int, list[int]]:
    """Two thirds of the long ones share their first 48 tokens."""
    choose = random.Random(0)
    shared = [choose.randrange(VOCAB_SIZE) for _ in range(48)]
    made = {slot: [choose.randrange(VOCAB_SIZE) for _ in range(length)] for slot, length in enumerate(LENGTHS)}
    for slot in (0, 1):
        made[slot][:48] = shared
    return made


def alone(device: Device, tokens: list[int]) -> Tensor:
    """All logits of one sequence by itself in one step."""
    plans = PlanBuilder(page_size=16, num_pages=300)
    plans.enter(0, tokens)
    return device.run(plans.step([(0, len(tokens))]))[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize(("dtype", "page_sizes"), [(torch.float32, (1, 16, 64)), (torch.bfloat16, (4, 48))])
def test_any_batch_order_chunking_page_size_and_cache_state(
    family: str, dtype: torch.dtype, page_sizes: tuple[int, ...]
) -> None:
    model = make_model(family, num_attention_heads=6, hidden_size=72, intermediate_size=100, mlp_bias=family == "llama")
    whole = Device(model, numerics="invariant", dtype=dtype)
    expected = {slot: alone(whole, tokens) for slot, tokens in sequences().items()}
    choose = random.Random(1)
    for page_size in page_sizes:
        num_pages = 1 + 2 * sum(-(-length // page_size) for length in LENGTHS)
        device = Device(model, numerics="invariant", page_size=page_size, num_pages=num_pages, dtype=dtype)
        plans = PlanBuilder(page_size=page_size, num_pages=num_pages, seed=page_size)
        found: dict[int, list[Tensor]] = {slot: [] for slot in expected}
        for slot, tokens in sequences().items():
            plans.enter(slot, tokens)
        while pending := [slot for slot in expected if plans.remaining(slot)]:
            choose.shuffle(pending)
            rows = [
                (slot, min(plans.remaining(slot), choose.choice((1, 1, 2, 7, 15, 16, 17, 40))))
                for slot in pending[: choose.randint(1, len(pending))]
            ]
            for slot, logits in device.run(plans.step(rows)).items():
                found[slot].append(logits)
        for slot in expected:
            assert torch.equal(torch.cat(found[slot]), expected[slot]), f"page size {page_size}, slot {slot}"
        if 48 % page_size == 0:  # a prefix hit on slot 0's pages, in a pool full of old keys
            plans.enter(9, sequences()[1], share=(0, 48))
            hit = device.run(plans.step([(9, plans.remaining(9))]))[9]
            assert torch.equal(hit, expected[1][48:]), f"prefix hit, page size {page_size}"


def test_the_fast_mode_does_not_promise_this() -> None:
    """The test above can fail: in fast mode a row's bits do depend on its batch."""
    model = make_model("llama", hidden_size=256, intermediate_size=512)
    device = Device(model, numerics="fast")
    tokens = sequences()[0]
    plans = PlanBuilder(page_size=16, num_pages=300)
    plans.enter(0, tokens)
    steps = torch.cat([device.run(plans.step([(0, 1)]))[0] for _ in tokens])
    assert not torch.equal(steps, alone(device, tokens))
    torch.testing.assert_close(steps, alone(device, tokens), atol=1e-4, rtol=0)
