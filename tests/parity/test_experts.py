"""Random small models of experts, computed in random steps, give the logits of transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.parity.models import VOCAB_SIZE, Device, make_model, reference_logits
from tests.runner.plans import PlanBuilder


def settings_of(choose: random.Random, family: str) -> dict[str, Any]:
    num_layers = choose.randint(1, 5)
    num_heads, num_kv_heads = choose.choice([(4, 2), (4, 4), (6, 1), (6, 3)])
    made = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": choose.choice([8, 12, 16]),
        "hidden_size": choose.choice([32, 48, 64]),
        "tie_word_embeddings": choose.random() < 0.4,
        "num_experts_per_tok": choose.randint(1, 4),
    }
    if family == "mixtral":
        return made | {"num_local_experts": choose.randint(4, 16), "intermediate_size": choose.choice([16, 40, 80])}
    return made | {
        "num_experts": choose.randint(4, 16),
        "moe_intermediate_size": choose.choice([8, 24, 40]),
        "norm_topk_prob": choose.random() < 0.5,
        "decoder_sparse_step": choose.randint(1, 3),
        "mlp_only_layers": choose.sample(range(num_layers), choose.randint(0, num_layers // 2)),
        "attention_bias": choose.random() < 0.4,
    }


@pytest.mark.parametrize("seed", range(18))
def test_any_experts_in_any_steps(seed: int) -> None:
    choose = random.Random(seed)
    family, kernels = ("qwen3_moe", "mixtral")[seed % 2], ("fast", "invariant", "reference")[seed % 3]
    model, page_size = make_model(family, seed=seed, **settings_of(choose, family)), choose.choice([1, 4, 16])
    backend, numerics = ("reference", "fast") if kernels == "reference" else ("cpu", kernels)
    device = Device(model, numerics=numerics, backend=backend, page_size=page_size)
    plans = PlanBuilder(page_size=page_size, num_pages=300)
    sequences = {slot: [choose.randrange(VOCAB_SIZE) for _ in range(choose.randint(1, 60))] for slot in range(3)}
    found: dict[int, list[torch.Tensor]] = {slot: [] for slot in sequences}
    for slot, tokens in sequences.items():
        plans.enter(slot, tokens)
    while pending := [slot for slot in sequences if plans.remaining(slot)]:
        rows = [(slot, min(plans.remaining(slot), choose.choice((1, 2, 7, 33)))) for slot in pending]
        for slot, logits in device.run(plans.step(rows)).items():
            found[slot].append(logits)
    for slot, tokens in sequences.items():
        torch.testing.assert_close(torch.cat(found[slot]), reference_logits(model, tokens), atol=1e-4, rtol=0)
