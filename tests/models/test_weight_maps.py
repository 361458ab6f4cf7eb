"""The weight map of every family names exactly the tensors that transformers' checkpoint has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace import models
from headrace.config import ModelSpec, model_spec
from headrace.kernels.triton.layer_kernels import device_kernels
from headrace.models import registry
from headrace.types.errors import UnsupportedModelError
from headrace.weights import Shard
from headrace.weights.position_sum import add_digests
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import prove_mesh
from tests.parity.models import Device, make_model
from tests.weights.saving import save_checkpoint

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


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_the_checkpoint(family: str, overrides: dict[str, Any], num_ranks: int) -> None:
    """Together they hold every element; fewer key-value heads than ranks are held by several, and counted once."""
    model = make_model(family, **overrides, num_attention_heads=12, num_key_value_heads=2 if num_ranks < 4 else 4)
    if num_ranks == 3:
        model = make_model(family, **overrides, num_attention_heads=12, num_key_value_heads=1, intermediate_size=96)
    spec = ModelSpec.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    maps = [models.weight_map(spec, Shard(rank, num_ranks)) for rank in range(num_ranks)]
    prove_mesh(maps)
    for table in maps:
        assert {name: spec.shape for name, spec in table.params.items()} == {
            name: spec.shape for name, spec in maps[0].params.items()
        }
        store = WeightStore(table, torch.float32, torch.device("cpu"))
        tensors = model.state_dict()
        store.load(tensors.items())
        for name, rule in table.rules_by_name.items():
            (piece,) = rule.pieces
            assert torch.equal(store.live[piece.param][piece.target.slices], tensors[name][piece.source.slices])


EXPERTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"attention_bias": True, "num_experts": 5, "mlp_only_layers": [1]}),
    ("qwen3_moe", {"tie_word_embeddings": True}),
    ("mixtral", {}),
]


@pytest.mark.parametrize(("family", "overrides"), EXPERTS)
def test_experts_have_the_names_of_files_and_those_of_modules(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Either fills the memory with the same bits, and what is saved is the file again."""
    model = make_model(family, **overrides)
    model.save_pretrained(tmp_path)
    saved, held = load_file(tmp_path / "model.safetensors"), model.state_dict()
    device = Device(model, state=saved)
    table, store = device.store.weight_map, device.store
    assert {name: rule.shape for name, rule in table.rules_by_name.items()} == {
        name: tuple(tensor.shape) for name, tensor in saved.items()
    }
    names = table.rules_by_name.keys() | table.other_rules.keys() | table.aliases.keys()
    assert held.keys() <= names and names == held.keys() | saved.keys()
    live, digest = {name: tensor.clone() for name, tensor in store.live.items()}, store.digest()
    other = Device(model).store
    assert all(torch.equal(tensor, live[name]) for name, tensor in other.live.items()) and other.digest() == digest
    for name, tensor in (saved | held).items():
        assert torch.equal(store.read(name), tensor), name
    save_checkpoint(store, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == saved.keys() and all(torch.equal(ours[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(("family", "overrides"), EXPERTS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_experts_by_their_columns(family: str, overrides: dict[str, Any], num_ranks: int) -> None:
    model = make_model(family, **overrides, num_key_value_heads=2)
    spec = ModelSpec.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    maps = [models.weight_map(spec, Shard(rank, num_ranks)) for rank in range(num_ranks)]
    prove_mesh(maps)
    stores = [WeightStore(table, torch.float32, torch.device("cpu")) for table in maps]
    for store in stores:
        store.load(model.state_dict().items())
    digests = [store.digest() for store in stores]
    expected = Device(model).store.digest()
    assert {name: add_digests(*(found[name] for found in digests)) for name in expected} == expected


SIZES_OF_8X7B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES_OF_30B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("fields", "num_parameters"),
    [
        (
            SIZES_OF_30B
            | {"architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
            | {"moe_intermediate_size": 768, "vocab_size": 151936, "max_position_embeddings": 40960},
            30_532_122_624,
        ),
        (
            SIZES_OF_8X7B
            | {"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 8, "num_local_experts": 8}
            | {"vocab_size": 32000, "max_position_embeddings": 32768},
            46_702_792_704,
        ),
    ],
    ids=["Qwen3-30B-A3B", "Mixtral-8x7B"],
)
def test_published_models_have_the_published_number_of_parameters(fields: dict[str, Any], num_parameters: int) -> None:
    table = models.weight_map(ModelSpec.from_config(fields))
    assert table.num_elements == num_parameters == sum(part.num_elements for part in table.parts())


def test_every_family_that_a_config_may_name_has_its_layers() -> None:
    assert set(registry.FAMILIES) == {family.architecture for family in model_spec._FAMILIES}


def test_what_does_not_split_over_the_ranks_is_refused() -> None:
    spec = ModelSpec.from_config(make_model("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(UnsupportedModelError, match="do not split over 5 ranks"):
        models.weight_map(spec, Shard(0, 5))


def test_kernels_without_experts_refuse_them_by_name() -> None:
    device, kernels = Device(make_model("mixtral")), device_kernels("fast", torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="no layers of experts") as caught:
        models.build(device.spec, device.store, kernels=kernels)
    assert caught.value.field == "architectures"


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
