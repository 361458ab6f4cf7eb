"""The few layers that a start runs ahead of capturing all: they ask the kernels for whatever the others do."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from headrace import models
from headrace.config import ModelSpec
from headrace.kernels import LayerKernels, select_kernels
from headrace.layers.step import ForwardStep
from headrace.weights.store import WeightStore
from tests.parity.models import make_model

MODELS: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"num_hidden_layers": 1}, 1),
    ("qwen3", {"num_hidden_layers": 9}, 2),
    ("qwen3_moe", {"num_hidden_layers": 8, "mlp_only_layers": [0, 1, 2]}, 4),
    ("qwen3_moe", {"num_hidden_layers": 5, "mlp_only_layers": [4]}, 3),
]


class Noted:
    """A kernel set that notes what it is asked for, and of which shapes."""

    def __init__(self, kernels: object, asked: list[Any]) -> None:
        self._kernels = kernels
        self._asked = asked

    @property
    def experts(self) -> Noted:
        return Noted(cast("LayerKernels", self._kernels).experts, self._asked)

    def __getattr__(self, name: str) -> Any:
        def ask(*given: Any) -> Any:
            shapes = [each.shape if isinstance(each, Tensor) else None for each in given]
            self._asked.append((name, tuple(shapes)))
            return getattr(self._kernels, name)(*given)

        return ask


class Attention:
    """Counts the layers that attend."""

    num_layers = 0

    def run(self, layer: int, qkv_TX: Tensor, norms: object) -> Tensor:
        self.num_layers += 1
        return qkv_TX[:, :48].contiguous()  # as wide as four queries


@pytest.mark.parametrize(("family", "overrides", "num_sampled"), MODELS)
def test_some_layers_ask_for_what_all_do(family: str, overrides: dict[str, Any], num_sampled: int) -> None:
    model = make_model(family, **overrides)
    spec = ModelSpec.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    store = WeightStore(models.weight_map(spec), torch.float32, torch.device("cpu"))
    store.load(model.state_dict().items())
    asked = list[Any]()
    decoder = models.build(spec, store, kernels=cast("LayerKernels", Noted(select_kernels("fast"), asked)))
    found = []
    for run in (decoder.forward, decoder.sample_layers):
        asked.clear()
        attention = Attention()
        with torch.inference_mode():
            run(torch.ones(3, spec.hidden_size), ForwardStep([attention]))
        found.append((attention.num_layers, {*asked}))
    (num_layers, of_all), (num_run, of_some) = found
    assert (num_layers, num_run) == (len(spec.layers), num_sampled)
    assert of_some == of_all
