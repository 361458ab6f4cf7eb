"""What a family's layers are given."""

from __future__ import annotations

import pytest

from headrace.config import LayerSpec
from headrace.layers.params import Params
from headrace.layers.step import KvPlace
from headrace.models import registry
from headrace.models.family import Family
from headrace.models.llama import LlamaLayer
from tests.parity.models import Device, make_model


def test_every_layer_is_given_its_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what a family alone has, a field of the spec, has a way to who computes with it."""
    given: list[LayerSpec] = []

    def layer(params: Params, kv: KvPlace, spec: LayerSpec) -> LlamaLayer:
        given.append(spec)
        return LlamaLayer(params, kv, spec)

    monkeypatch.setitem(registry.FAMILIES, "LlamaForCausalLM", Family(layer))
    device = Device(make_model("llama"))
    assert tuple(given) == device.spec.layers
