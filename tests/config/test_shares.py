"""What one rank has of a model is what its weights are the weights of, and what does not split is refused by name."""

from __future__ import annotations

import random
from typing import Any

import pytest

from headrace import models
from headrace.config import ModelSpec, share_of, stages_of
from headrace.config.layer_spec import ExpertsSpec
from headrace.config.shares import vocabulary_rows
from headrace.types.errors import ConfigError
from headrace.weights import Shard
from headrace.weights.weight_map import prove_mesh

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def spec_of(**fields: Any) -> ModelSpec:
    return ModelSpec.from_config(BASE | fields)


def test_one_rank_has_the_model_itself() -> None:
    spec = spec_of()
    assert share_of(spec, 1) is spec


@pytest.mark.parametrize(
    ("fields", "num_ranks", "what"),
    [
        ({}, 3, "8 attention heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 24}, 6, "4 key-value heads"),
        ({"intermediate_size": 26}, 4, "26 features"),
        (EXPERTS | {"moe_intermediate_size": 26}, 4, "26 features"),
        ({"vocab_size": 5}, 4, "5 tokens"),
    ],
)
def test_what_does_not_split_is_refused_by_name(fields: dict[str, Any], num_ranks: int, what: str) -> None:
    with pytest.raises(ConfigError, match=f"tp_size {num_ranks}.*{what}") as caught:
        share_of(spec_of(**fields), num_ranks)
    assert caught.value.field == "tp_size"


def test_the_vocabulary_is_shared_in_whole_blocks_where_all_ranks_have_some_of_it() -> None:
    assert vocabulary_rows(151_936, 1) == 151_936
    assert vocabulary_rows(151_936, 2) == 19 * 4096
    assert vocabulary_rows(151_936, 8) == 5 * 4096
    assert vocabulary_rows(50_256, 8) == 6282, "7 times 8,192 are more"
    assert vocabulary_rows(50_257, 2) == 25_129, "no multiple of 16"
    assert vocabulary_rows(4112, 2) == 4096
    assert vocabulary_rows(4096, 2) == 2048
    for num_ranks in range(2, 9):
        for vocab_size in range(num_ranks * num_ranks, 70_000, 379):
            rows = vocabulary_rows(vocab_size, num_ranks)
            assert rows * (num_ranks - 1) < vocab_size <= rows * num_ranks


def test_shares_fit_the_weights_of_all_ranks() -> None:
    """Whatever the sizes: either the refusal, or shards that cover every tensor and have the sizes of the share."""
    chance, num_split = random.Random(0), 0
    for _ in range(300):
        num_ranks, num_kv_heads = chance.randint(2, 8), chance.randint(1, 8)
        sizes = {
            "num_key_value_heads": num_kv_heads,
            "num_attention_heads": num_kv_heads * chance.choice((1, 2, 4, 8)),
            "intermediate_size": chance.choice((24, 48, 56)),
            "vocab_size": chance.randint(1, chance.choice((120, 60_000))),
            "tie_word_embeddings": chance.random() < 0.5,
            "attention_bias": chance.random() < 0.5,
        }
        spec = spec_of(**(sizes | chance.choice(({}, EXPERTS))))
        try:
            share = share_of(spec, num_ranks)
        except ConfigError:
            continue
        num_split += 1
        maps = [models.weight_map(spec, Shard(rank, num_ranks)) for rank in range(num_ranks)]
        prove_mesh(maps)
        (layer,) = share.layers
        attention, width = layer.attention, layer.mlp.intermediate_size
        qkv = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
        block = "experts_down" if isinstance(layer.mlp, ExpertsSpec) else "down"
        for table in maps:
            shapes = {name: each.shape for name, each in table.params.items()}
            assert shapes["layers.0.qkv.weight"] == (qkv, 16)
            assert shapes[f"layers.0.{block}.weight"][-1] == width
            assert shapes["embed"][0] == vocabulary_rows(spec.vocab_size, num_ranks)
    assert num_split > 60


def test_stages_fit_the_weights_of_all_ranks() -> None:
    """Whatever the sizes: every layer in one stage, as many in each, and what all ranks hold counts once."""
    chance = random.Random(1)
    for _ in range(100):
        num_layers, num_ranks = chance.randint(1, 12), chance.choice((1, 2))
        num_stages = chance.randint(1, num_layers)
        sizes = {"num_hidden_layers": num_layers, "tie_word_embeddings": chance.random() < 0.5}
        spec = spec_of(**(sizes | chance.choice(({}, EXPERTS))))
        stages = stages_of(spec, num_stages)
        lengths = [stage.end - stage.start for stage in stages]
        assert [layer for stage in stages for layer in range(stage.start, stage.end)] == list(range(num_layers))
        assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1
        assert [stage.is_first for stage in stages] == [True] + [False] * (num_stages - 1)
        assert [stage.is_last for stage in stages] == [False] * (num_stages - 1) + [True]
        shards = [Shard.of_rank(number, num_ranks, num_stages) for number in range(num_ranks * num_stages)]
        assert [shard.number for shard in shards] == list(range(shards[0].num_all))
        maps = [models.weight_map(spec, shard) for shard in shards]
        prove_mesh(maps)
        for table, shard in zip(maps, shards, strict=True):
            stage = stages[shard.stage]
            layers = {int(name.split(".")[1]) for name in table.params if name.startswith("layers.")}
            assert layers == set(range(stage.start, stage.end))
            assert ("embed" in table.params) == (stage.is_first or (stage.is_last and spec.tie_word_embeddings))
            assert ("final_norm.weight" in table.params) == stage.is_last
            assert ("lm_head" in table.params) == (stage.is_last and not spec.tie_word_embeddings)


def test_more_stages_than_layers_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="pp_size 3.*2 layers") as caught:
        stages_of(spec_of(num_hidden_layers=2), 3)
    assert caught.value.field == "pp_size"
