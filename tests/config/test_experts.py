"""Fields of experts as transformers takes them: who has some, how many, under which names; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.config import ModelSpec
from headrace.config.layer_spec import DenseSpec, ExpertsSpec
from headrace.types.errors import CheckpointError, UnsupportedModelError

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 64,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    **SMALL,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    **SMALL,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}


def read(base: dict[str, Any], changes: dict[str, Any]) -> ModelSpec:
    config = {**base, **changes}
    return ModelSpec.from_config({name: value for name, value in config.items() if value is not ...})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [2, 0]},
        {"mlp_only_layers": [1, 5, 1]},
        {"mlp_only_layers": [0, 1, 2, 3, 4, 5]},
        {"decoder_sparse_step": 7},
        {"mlp_only_layers": None},
        {"num_experts": 0},
        {"num_experts": ..., "num_local_experts": 7},
        {"num_experts": 7, "num_local_experts": 7},
        {"num_experts_per_tok": ..., "num_experts": 12},
        {"norm_topk_prob": True},
        {"norm_topk_prob": False, "num_experts_per_tok": 5},
        {"intermediate_size": 40, "router_aux_loss_coef": 0.1, "output_router_logits": True},
    ],
)
def test_layers_of_qwen3_are_those_that_transformers_makes(changes: dict[str, Any], tmp_path: Path) -> None:
    spec = read(QWEN3, changes)
    config = {name: value for name, value in {**QWEN3, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    for layer, module in zip(spec.layers, theirs.model.layers, strict=True):
        block = module.mlp
        if isinstance(layer.mlp, DenseSpec):
            assert (layer.mlp.intermediate_size, layer.mlp.bias) == (block.gate_proj.weight.shape[0], False)
            continue
        assert layer.mlp.num_experts == block.experts.num_experts == len(block.gate.weight)
        assert layer.mlp.intermediate_size == block.experts.down_proj.shape[2]
        assert (layer.mlp.num_per_token, layer.mlp.normalizes) == (block.gate.top_k, block.gate.norm_topk_prob)
    assert spec.has_experts == any(hasattr(module.mlp, "experts") for module in theirs.model.layers)


def test_mixtral_has_experts_in_every_layer_and_normalizes_always() -> None:
    experts = ExpertsSpec(num_experts=5, num_per_token=2, intermediate_size=24, normalizes=True)
    for changes in (
        {},
        {"num_experts_per_tok": ...},
        {"norm_topk_prob": False, "mlp_only_layers": [0], "decoder_sparse_step": 2},  # of other families
        {"num_local_experts": ..., "num_experts": 5},
        {"router_jitter_noise": 0.1},
    ):
        assert {layer.mlp for layer in read(MIXTRAL, changes).layers} == {experts}


@pytest.mark.parametrize(("name", "num_per_token"), [("Qwen3Moe", 8), ("Mixtral", 2)])
def test_what_transformers_saves_is_read(name: str, num_per_token: int, tmp_path: Path) -> None:
    """The files it writes spell the number of experts in its own way."""
    theirs = getattr(transformers, f"{name}Config")(**SMALL, num_experts=9, architectures=[f"{name}ForCausalLM"])
    theirs.save_pretrained(tmp_path)
    mlp = ModelSpec.from_folder(tmp_path).layers[0].mlp
    assert isinstance(mlp, ExpertsSpec) and (mlp.num_experts, mlp.num_per_token) == (9, num_per_token)


@pytest.mark.parametrize("base", [QWEN3, MIXTRAL], ids=lambda base: str(base["model_type"]))
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok"),
        ({"num_experts": 5, "num_local_experts": 6}, "num_local_experts"),
        ({"num_experts": ..., "num_local_experts": ...}, "num_experts"),
        ({"num_experts": ..., "num_local_experts": -1}, "num_local_experts"),
        ({"num_experts": "5", "num_local_experts": 5}, "num_experts"),
        ({"router_jitter_noise": "much"}, "router_jitter_noise"),
    ],
)
def test_wrong_numbers_are_refused_by_field(base: dict[str, Any], changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read(base, changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"moe_intermediate_size": ...}, "moe_intermediate_size"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"decoder_sparse_step": None}, "decoder_sparse_step"),
        ({"mlp_only_layers": [6]}, "mlp_only_layers"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"norm_topk_prob": None}, "norm_topk_prob"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"mlp_only_layers": [1], "intermediate_size": ...}, "intermediate_size"),
    ],
)
def test_wrong_fields_of_qwen3_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read(QWEN3, changes)
    assert caught.value.field == field


@pytest.mark.parametrize("base", [QWEN3, MIXTRAL], ids=lambda base: str(base["model_type"]))
def test_what_is_absent_is_what_transformers_has_for_the_family(base: dict[str, Any], tmp_path: Path) -> None:
    config = {name: value for name, value in base.items() if name not in ("num_key_value_heads", "num_experts_per_tok")}
    config |= {"hidden_size": 64, "num_attention_heads": 16} | ({"num_experts": 9} if base is QWEN3 else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = ModelSpec.from_folder(tmp_path), AutoConfig.from_pretrained(tmp_path)
    attention, mlp = ours.layers[0].attention, ours.layers[0].mlp
    assert isinstance(mlp, ExpertsSpec) and mlp.num_per_token == theirs.num_experts_per_tok
    assert (ours.rms_norm_eps, attention.rope.theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert attention.num_kv_heads == theirs.num_key_value_heads and attention.head_dim == 64 // attention.num_heads
    assert (ours.tie_word_embeddings, ours.sliding_window) == (False, None) and theirs.sliding_window is None


def test_no_dense_width_is_asked_for_where_no_layer_is_dense() -> None:
    assert read(QWEN3, {"intermediate_size": ...}).has_experts


def test_mixtral_without_experts_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        read(MIXTRAL, {"num_local_experts": 0})
    assert caught.value.field == "num_local_experts"


@pytest.mark.parametrize("base", [QWEN3, MIXTRAL], ids=lambda base: str(base["model_type"]))
@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("shared_expert_intermediate_size", 32, 0),
        ("n_shared_experts", 1, 0),
        ("num_shared_experts", 2, None),
        ("n_group", 8, 1),
        ("topk_group", 4, 1),
        ("scoring_func", "sigmoid", "softmax"),
        ("routed_scaling_factor", 2.5, 1.0),
    ],
)
def test_what_other_families_of_experts_have_is_refused_by_name(
    base: dict[str, Any], name: str, value: Any, neutral: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"config\.json: {name} is not supported") as caught:
        read(base, {name: value})
    assert caught.value.field == name
    assert read(base, {name: neutral}) == read(base, {})


def test_other_architectures_of_experts_are_refused_by_name() -> None:
    for architecture in ("Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM"):
        with pytest.raises(UnsupportedModelError, match=architecture) as caught:
            read(QWEN3, {"architectures": [architecture]})
        assert caught.value.field == "architectures"


def test_windows() -> None:
    """All layers of Qwen3-MoE slide by the flag alone; all of Mixtral wherever a window is given."""
    by_layer = {"max_window_layers": 3, "layer_types": ["full_attention"] * 6}
    assert read(QWEN3, {"sliding_window": 8, **by_layer}).sliding_window is None
    flagged = read(QWEN3, {"use_sliding_window": True, "sliding_window": 8, **by_layer})
    assert [layer.attention.window for layer in flagged.layers] == [8] * 6
    assert read(QWEN3, {"use_sliding_window": True}).sliding_window == 4096
    assert read(QWEN3, {"use_sliding_window": True, "sliding_window": None}).sliding_window is None
    assert read(MIXTRAL, {}).sliding_window is None and read(MIXTRAL, {"sliding_window": None}).sliding_window is None
    assert read(MIXTRAL, {"sliding_window": 8}).sliding_window == 8


@pytest.mark.parametrize(("base", "name"), [(QWEN3, "num_experts"), (MIXTRAL, "num_local_experts")])
def test_experts_of_all_layers_together_are_bounded(base: dict[str, Any], name: str) -> None:
    """A configuration of a few bytes would else be a weight map of many gigabytes."""
    with pytest.raises(CheckpointError, match="in each of 64 layers") as refused:
        read(base, {name: 1 << 16, "num_hidden_layers": 64})
    assert refused.value.field == "num_experts"
    assert read(base, {name: 512, "num_hidden_layers": 100}).layers[0].mlp == read(base, {name: 512}).layers[0].mlp
