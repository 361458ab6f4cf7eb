"""Megatron-Core's layout in both directions, against an oracle that shares no code with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from headrace.config import ModelSpec
from headrace.rl import megatron
from headrace.rl.megatron_layout import MegatronPlace, global_name, rank_map, whole_shapes
from headrace.types.errors import HeadraceError, UnsupportedModelError, WeightUpdateError
from headrace.weights.shard import Shard
from tests.parity.models import make_model
from tests.rl.megatron_reference import Mesh, Naming, file_tensors, place_of, rank_chunks

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "qwen2": {"num_hidden_layers": 4},
    "qwen3": {"num_hidden_layers": 4, "head_dim": 20},
    "qwen3_moe": {"num_hidden_layers": 4, "mlp_only_layers": [1]},
}
MESHES = {
    "one rank": (Mesh(), Naming()),
    "unfused, padded": (Mesh(), Naming(False, False, 64)),
    "tensor parallel": (Mesh(tensor=2, expert_tensor=2), Naming(vocabulary_multiple=16)),
    "more ranks than groups": (Mesh(tensor=8), Naming(vocabulary_multiple=4)),
    "pipeline": (Mesh(stages=2), Naming()),
    "virtual stages": (Mesh(tensor=2, stages=2, chunks=2, expert_tensor=1), Naming(False, True, 128)),
    "experts": (Mesh(tensor=2, experts=4, expert_tensor=1), Naming(numbers_experts=False)),
}


def ranks_of(mesh: Mesh) -> Iterator[Mesh]:
    """Every rank of a mesh, where experts are dealt out over data parallelism."""
    axes = (mesh.stages, mesh.tensor, mesh.experts, mesh.expert_tensor)
    for stage, tensor, expert, part in itertools.product(*map(range, axes)):
        yield mesh._replace(stage=stage, tensor_rank=tensor, expert_rank=expert, expert_tensor_rank=part)


@pytest.mark.parametrize("case", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_reference(family: str, case: str) -> None:
    """HF to Megatron equals what the oracle splits, and all ranks' parameters together are the HF tensors again."""
    mesh, naming = MESHES[case]
    model = make_model(family, **FAMILIES[family])
    spec, tensors = file_tensors(model)
    claims, parts = [], []
    for rank in ranks_of(mesh):
        place = place_of(rank)
        chunks = [megatron.Chunk(*each) for each in rank_chunks(model, rank, naming)]
        params = megatron._global_params(spec, chunks, place)
        table = rank_map(spec, place, {name: tuple(each.shape) for name, each in params.items()})
        made = megatron.to_megatron(table, tensors)
        for name, expected in params.items():
            for box in table.params[name].padding:
                assert (expected[box.slices] == 7.0).all() and not made[name][box.slices].any()
                made[name][box.slices] = 7.0
            assert torch.equal(made[name], expected), name
        claims.append(
            [
                megatron._Held(name, "float32", [piece.source for piece in rule.pieces])
                for name, rule in table.rules_by_name.items()
                if rule.pieces
            ]
        )
        parts.append((table, params))
    deals = megatron.deal({name: each.shape for name, each in tensors.items()}, claims)
    for each in deals:
        given = [box for _, boxes in each.shares for box in boxes]
        assert sum(box.num_elements for box in given) == tensors[each.info.name].numel(), "each element comes once"
        whole = torch.full(each.info.shape, torch.nan)
        for rank_number, boxes in each.shares:
            table, params = parts[rank_number]
            for piece in table.rules_by_name[each.info.name].pieces:
                if piece.source in boxes:
                    whole[piece.source.slices] = params[piece.param][piece.target.slices]
        assert torch.equal(whole, tensors[each.info.name]), each.info.name


def test_one_rank_is_a_source(tmp_path: Any) -> None:
    model = make_model("qwen2", **FAMILIES["qwen2"])
    spec, tensors = file_tensors(model)
    chunks = [megatron.Chunk(*each) for each in rank_chunks(model, Mesh(chunks=2), Naming())]
    weights = megatron.MegatronWeights(chunks, model.config.to_dict(), MegatronPlace())
    for _ in range(2):
        found = dict(weights)
        assert found.keys() == tensors.keys() == {info.name for info in weights.manifest}
        assert all(torch.equal(found[name], each) for name, each in tensors.items())


def test_whole_shapes_are_what_one_rank_has() -> None:
    for family, overrides in FAMILIES.items():
        for tied in (False, True):
            model = make_model(family, tie_word_embeddings=tied, **overrides)
            spec = ModelSpec.from_config(model.config.to_dict())
            ((params, _),) = rank_chunks(model, Mesh(), Naming(fuses_norms=False))
            shapes = {name: tuple(each.shape) for name, each in params.items()}
            if tied:
                del shapes["output_layer.weight"]
            assert whole_shapes(spec) == shapes


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.7.mlp.linear_fc1.weight"),
        ("module.module.decoder.layers.0.input_layernorm.weight", "decoder.layers.4.input_layernorm.weight"),
        ("decoder.layers.1.mlp.experts.linear_fc2.weight5", "decoder.layers.5.mlp.experts.linear_fc2.weight13"),
        (
            "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight",
            "decoder.layers.5.mlp.experts.local_experts.10.linear_fc1.weight",
        ),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_names_are_counted_over_all_stages_and_ranks(name: str, known: str) -> None:
    assert global_name(name, first_layer=4, first_expert=8) == known


def test_first_layers_of_chunks() -> None:
    dealt = {
        (rank, chunk): megatron.first_layer(16, Shard(rank, 2), chunk, 4) for rank in range(2) for chunk in range(4)
    }
    assert sorted(dealt.values()) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [dealt[0, chunk] for chunk in range(4)] == [0, 4, 8, 12]


def refusal(change: Any, place: MegatronPlace | None = None, **overrides: Any) -> HeadraceError:
    model = make_model("qwen3", **overrides)
    ((params, _),) = rank_chunks(model, Mesh(), Naming())
    change(params)
    with pytest.raises(HeadraceError) as caught:
        megatron.MegatronWeights(megatron.Chunk(params), model.config.to_dict(), place or MegatronPlace())
    return caught.value


def test_what_does_not_fit_is_named() -> None:
    fc1, final = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"
    error = refusal(lambda params: params.update({fc1: params[fc1][1:]}))
    assert isinstance(error, WeightUpdateError) and error.field == fc1 and "expected [160, 48]" in error.message
    error = refusal(lambda params: params.update({"decoder.layers.0.mlp.linear_fc3.weight": params[fc1]}))
    assert error.field == "decoder.layers.0.mlp.linear_fc3.weight"
    error = refusal(lambda params: params.update({"decoder.layers.0.mlp.experts.linear_fc1.weight0": params[fc1]}))
    assert error.field == "decoder.layers.0.mlp.experts.linear_fc1.weight0"
    assert refusal(lambda params: params.pop(final)).field == "model.norm.weight"
    error = refusal(lambda params: params.update({final: params[final].to("meta")}))
    assert error.field == final and "meta" in error.message
    error = refusal(lambda params: params.update({"embedding.word_embeddings.weight": torch.ones(100, 48)}))
    assert error.field == "embedding.word_embeddings.weight"
    error = refusal(lambda params: None, MegatronPlace(tensor=Shard(0, 5)))
    assert isinstance(error, UnsupportedModelError) and error.field
    assert refusal(lambda params: params.update({"module." + final: params[final]})).field == final


def test_a_place_that_nobody_says_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "megatron.core.parallel_state", raising=False)
    with pytest.raises(HeadraceError) as caught:
        megatron.current_place()
    assert caught.value.field == "place"
