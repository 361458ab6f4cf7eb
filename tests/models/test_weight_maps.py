"""The weight map of every family names exactly the tensors that transformers' checkpoint has."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from headrace import models
from headrace.config import ModelSpec
from headrace.types.errors import UnsupportedModelError
from tests.parity.models import Device, make_model

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_it_covers_the_checkpoint(family: str, overrides: dict[str, Any]) -> None:
    model = make_model(family, **overrides)
    table = models.weight_map(ModelSpec.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]}))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    known = {name: rule.shape for name, rule in table.rules_by_name.items()}
    assert known | {alias: known[target] for alias, target in table.aliases.items()} == shapes
    assert set(table.aliases) == ({"lm_head.weight"} if overrides.get("tie_word_embeddings") else set())


def test_live_tensors_are_the_models_own() -> None:
    """A write to the store's memory changes the next logits: nothing was copied at construction."""
    device = Device(make_model("qwen3"))
    hidden = torch.randn(3, 48)
    before = device.decoder.logits(hidden)
    device.store.live["lm_head"].mul_(2.0)
    torch.testing.assert_close(device.decoder.logits(hidden), 2.0 * before)


def test_tied_embeddings_are_one_tensor() -> None:
    device = Device(make_model("llama", tie_word_embeddings=True))
    assert "lm_head" not in device.store.live
    hidden = torch.randn(3, 48)
    device.store.live["embed"].zero_()
    assert not device.decoder.logits(hidden).any()


def test_an_unknown_architecture_is_named() -> None:
    spec = ModelSpec.from_config(make_model("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM"):
        models.weight_map(msgspec.structs.replace(spec, architecture="FalconForCausalLM"))
