"""Logits equal those of transformers on the same weights, however the tokens were computed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from headrace.layers.residual import Residual
from tests.parity.models import LLAMA3_ROPE, VOCAB_SIZE, Device, make_model, reference_logits
from tests.runner.plans import PlanBuilder

TOLERANCE = 1e-4
LINEAR_OLD = {"rope_type": "linear", "factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-linear-old-spelling": ("llama", {"rope_theta": 2e4, "rope_scaling": LINEAR_OLD}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 20}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-wide-heads": ("mistral", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-mha-tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "num_attention_heads": 6}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-tied-biases": ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe-plain-weights": ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 16, "num_experts_per_tok": 4}),
    "qwen3_moe-one-of-four": ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 4, "num_experts_per_tok": 1}),
    "qwen3_moe-all-of-four": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 4}),
    "qwen3_moe-every-other": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6, "num_experts": 5},
    ),
    "qwen3_moe-none": ("qwen3_moe", {"num_experts": 0}),
    "mixtral": ("mixtral", {}),
    "mixtral-one-of-four": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 1}),
    "mixtral-four-of-sixteen": ("mixtral", {"num_local_experts": 16, "num_experts_per_tok": 4, "head_dim": None}),
}


def tokens_of(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_logits(variant: str) -> None:
    family, overrides = VARIANTS[variant]
    model = make_model(family, **overrides)
    device, plans = Device(model), PlanBuilder(page_size=16, num_pages=300)
    sequences = {slot: tokens_of(slot, length) for slot, length in enumerate((1, 5, 17, 40, 130))}
    prompts = {slot: max(1, len(tokens) - 8) for slot, tokens in sequences.items()}
    for slot, tokens in sequences.items():
        plans.enter(slot, tokens)
    found = {slot: [logits] for slot, logits in device.run(plans.step(list(prompts.items()))).items()}
    while rows := [(slot, 1) for slot in sequences if plans.remaining(slot)]:
        for slot, logits in device.run(plans.step(rows)).items():
            found[slot].append(logits)
    for slot, tokens in sequences.items():
        torch.testing.assert_close(torch.cat(found[slot]), reference_logits(model, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "overrides"), [("qwen3_moe", {}), ("qwen3_moe", {"norm_topk_prob": False}), ("mixtral", {})]
)
def test_routers_weigh_experts_as_those_of_transformers_do(
    family: str, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    """The same experts in the same order, with weights of the same dtype and bits."""
    model = make_model(family, **overrides)
    device, theirs = Device(model, dtype=dtype), model.to(dtype).model.layers[0]
    stream = torch.randn(50, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        layer: Any = device.decoder._layers[0]
        hidden, experts, weights = layer.router(Residual(stream).normed(layer.mlp_norm))
        expected = theirs.post_attention_layernorm(stream)
        _, expected_weights, expected_experts = theirs.mlp.gate(expected)
    torch.testing.assert_close(hidden, expected, atol=1e-6, rtol=1e-2)
    assert weights.dtype == expected_weights.dtype and torch.equal(experts, expected_experts)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("numerics", ["fast", "invariant"])
@pytest.mark.parametrize("page_size", [1, 4, 16, 48, 64])
def test_chunks_of_any_size_at_any_page_size(page_size: int, numerics: str, family: str) -> None:
    model = make_model(family)
    device = Device(model, page_size=page_size, numerics=numerics, num_pages=1 + 720 // page_size)
    plans = PlanBuilder(page_size=page_size, num_pages=1 + 720 // page_size)
    sequences = {slot: tokens_of(slot, length) for slot, length in enumerate((150, 37, 90))}
    choose = random.Random(page_size)
    found: dict[int, list[torch.Tensor]] = {slot: [] for slot in sequences}
    for slot, tokens in sequences.items():
        plans.enter(slot, tokens)
    while pending := [slot for slot in sequences if plans.remaining(slot)]:
        choose.shuffle(pending)
        rows = [(slot, min(plans.remaining(slot), choose.choice((1, 2, 7, 16, 17, 33, 64)))) for slot in pending]
        for slot, logits in device.run(plans.step(rows)).items():
            found[slot].append(logits)
    assert sum(map(len, found.values())) > len(sequences), "nothing was chunked"
    for slot, tokens in sequences.items():
        torch.testing.assert_close(torch.cat(found[slot]), reference_logits(model, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_layers_of_several_kv_groups(backend: str) -> None:
    """A layer whose key and value heads are each written twice computes the same, over a pool of its own."""
    model = make_model("llama", num_hidden_layers=3, attention_bias=True)
    spec, state = Device(model).spec, dict(model.state_dict())
    for name in [name for name in state if "layers.1.self_attn.k_proj" in name or "layers.1.self_attn.v_proj" in name]:
        heads = state[name].unflatten(0, (2, 12))
        state[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    twice = replace(spec.layers[1], attention=replace(spec.layers[1].attention, num_kv_heads=4))
    spec = replace(spec, layers=(spec.layers[0], twice, spec.layers[2]))
    assert [group.layer_ids for group in spec.kv_groups] == [(0, 2), (1,)]
    assert spec.kv_bytes_per_token(4) == (2 * 2 + 4) * 2 * 12 * 4
    device = Device(model, backend=backend, spec=spec, state=state)
    assert [pool.geometry.num_rows for pool in device.pools] == [2 * 300 * 16, 4 * 300 * 16]
    plans, tokens = PlanBuilder(page_size=16, num_pages=300), tokens_of(0, 60)
    plans.enter(0, tokens)
    found = [device.run(plans.step([(0, length)]))[0] for length in (40, 19, 1)]
    torch.testing.assert_close(torch.cat(found), reference_logits(model, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_reads_pages_that_an_earlier_row_of_its_plan_writes(backend: str) -> None:
    model = make_model("llama")
    device, plans = Device(model, backend=backend), PlanBuilder(page_size=16, num_pages=100)
    shared = tokens_of(0, 48)
    sequences = {0: shared + tokens_of(1, 9), 1: shared + tokens_of(2, 30), 2: shared + tokens_of(3, 1)}
    plans.enter(0, sequences[0])
    first = plans.step([(0, 20)])
    device.run(first)
    rows = [(0, plans.remaining(0))]
    plan_pages = 4  # slot 0 will hold four pages; lease them before others share them
    builder_rows = plans.step(rows)
    assert len(builder_rows.page_ids) + len(first.page_ids) == plan_pages
    for slot in (1, 2):
        plans.enter(slot, sequences[slot], share=(0, 48))
    joined = plans.step([(slot, plans.remaining(slot)) for slot in (1, 2)])
    merged = merge(builder_rows, joined)
    found = device.run(merged)
    for slot, tokens in sequences.items():
        expected = reference_logits(model, tokens)[-len(found[slot]) :]
        torch.testing.assert_close(found[slot], expected, atol=TOLERANCE, rtol=0)


def merge(*plans: Any) -> Any:
    """One plan with the rows of several."""
    import msgspec
    import numpy as np

    arrays = [name for name in type(plans[0]).__struct_fields__ if isinstance(getattr(plans[0], name), np.ndarray)]
    joined = {name: np.concatenate([getattr(plan, name) for plan in plans]) for name in arrays}
    new_slots = tuple(init for plan in plans for init in plan.new_slots)
    return msgspec.structs.replace(plans[0], new_slots=new_slots, **joined)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numerics", ["fast", "invariant"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral"])
def test_narrow_dtypes_follow_the_float32_model(dtype: torch.dtype, numerics: str, family: str) -> None:
    model = make_model(family, initializer_range=0.05)
    device = Device(model, dtype=dtype, numerics=numerics)
    plans = PlanBuilder(page_size=16, num_pages=300)
    tokens = tokens_of(0, 60)
    plans.enter(0, tokens)
    found = [device.run(plans.step([(0, length)]))[0] for length in (40, 3, 1, 1, 15)]
    expected = reference_logits(model.to(dtype), tokens)
    assert (torch.cat(found) - expected).abs().max() < 0.06 * expected.abs().max()
