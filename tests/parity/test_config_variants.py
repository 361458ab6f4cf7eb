"""Configurations that transformers accepts give its logits: rotary spellings, ties, epsilons, head sizes, windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.config import ModelSpec
from tests.parity.models import VOCAB_SIZE, Device, make_model, reference_logits
from tests.runner.plans import PlanBuilder

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
OLD_LLAMA3 = {"type": "llama3", **{name: value for name, value in LLAMA3.items() if name != "rope_type"}}
CHANGES: dict[str, dict[str, Any]] = {
    "llama3, original length of the model": {"rope_scaling": LLAMA3, "rope_parameters": None},
    "llama3, original length beside": {"rope_scaling": LLAMA3, "rope_parameters": None, ORIGINAL: 64},
    "llama3, original length twice": {"rope_scaling": {**LLAMA3, ORIGINAL: 128}, "rope_parameters": None, ORIGINAL: 64},
    "llama3, oldest spelling": {
        "rope_scaling": {**OLD_LLAMA3, ORIGINAL: 64},
        "rope_theta": 5e5,
        "rope_parameters": None,
    },
    "llama3, new spelling": {"rope_parameters": {**LLAMA3, ORIGINAL: 64, "rope_theta": 5e5}, "rope_theta": 7.0},
    "llama3, theta beside": {"rope_parameters": {**LLAMA3, ORIGINAL: 64}, "rope_theta": 5e5},
    "old scaling replaces new defaults": {"rope_scaling": {"type": "linear", "factor": 4}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 3e4, "rope_parameters": {}},
    "theta only": {"rope_theta": 123, "rope_parameters": None},
    "nulls": {"rope_theta": 123, "rope_parameters": None, "rope_scaling": None, "head_dim": None},
    "tied": {"tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 0.25},
    "wide heads": {"head_dim": 20, "num_key_value_heads": 1},
    "stray window": {"sliding_window": 8, "max_window_layers": 2},
    "kv heads of null": {"num_key_value_heads": None},
}
REFUSED_NULLS = {("nulls", "qwen2"): {"head_dim": 12}, ("nulls", "qwen3"): {"head_dim": 12}}
REFUSED_NULLS |= {("nulls", "qwen3_moe"): {"head_dim": 12}}
REFUSED_NULLS |= {
    ("kv heads of null", family): {"num_key_value_heads": 4} for family in ("mistral", "mixtral", "qwen3_moe")
}
"""What transformers takes no null for."""


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_logits_are_those_of_transformers_reading_the_same_file(family: str, tmp_path: Path) -> None:
    base = make_model(family).config.to_dict()
    tokens = torch.randint(0, VOCAB_SIZE, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    for variant, change in CHANGES.items():
        change = {**change, **REFUSED_NULLS.get((variant, family), {})}
        (tmp_path / "config.json").write_text(json.dumps({**base, "sliding_window": None, **change}))
        spec = ModelSpec.from_folder(tmp_path)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.15 + float("norm" in name))
        is_window = variant == "stray window" and family in ("mistral", "mixtral")
        assert spec.sliding_window == (8 if is_window else None)
        seen = tokens[: spec.sliding_window]
        device, plans = Device(model, spec=spec), PlanBuilder(page_size=16, num_pages=300)
        plans.enter(0, seen)
        found = device.run(plans.step([(0, len(seen))]))[0]
        torch.testing.assert_close(found, reference_logits(model, seen), atol=1e-3, rtol=0, msg=variant)
