"""Hundreds of wrong `config.json` files: each is read as transformers reads it, or refused by file and field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.config import EngineConfig, ModelSpec, resolve
from headrace.types.errors import CheckpointError, UnsupportedModelError

REFUSALS = (CheckpointError, UnsupportedModelError)
MISSING = object()
VALUES: tuple[Any, ...] = (
    *(None, "x", "", "64", True, False, 0, -1, 1, 3, 0.5, 64.0, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**64, 10**400, 1e300, [], [1], ["x"], {}, {"a": 1}, [[1]], "\ud800", "None", "true"),
)
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "sliding_window": None,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "eos_token_id": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
FURTHER = (
    "dtype",
    "layer_types",
    "rope_parameters",
    "partial_rotary_factor",
    "quantization_config",
    "per_layer_config",
    "num_local_experts",
    "decoder_sparse_step",
    "router_jitter_noise",
    "n_shared_experts",
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
}
READ_BY_NONE = {
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_jitter_noise",
    "n_shared_experts",
}
"""By some family, that is."""


def mutations() -> Iterator[dict[str, Any]]:
    for name in (*BASE, "architectures", "model_type", *FURTHER):
        yield from ({name: value} for value in (MISSING, *VALUES))
    for place in ("rope_scaling", "rope_parameters"):
        for name in (*LLAMA3, "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "type"):
            yield {place: {key: value for key, value in LLAMA3.items() if key != name}}
            yield from ({place: {**LLAMA3, name: value}} for value in VALUES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_field_is_refused_by_file_and_field_or_read(family: str, tmp_path: Path) -> None:
    base = {"architectures": [f"{FAMILIES[family]}ForCausalLM"], "model_type": family, **BASE}
    num_refused, resolved = 0, set[str]()
    for change in mutations():
        config = {name: value for name, value in {**base, **change}.items() if value is not MISSING}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (name,) = change
        try:
            spec = ModelSpec.from_folder(tmp_path)
        except REFUSALS as error:
            num_refused += 1
            assert "config.json" in error.message and error.message.encode(), change
            assert error.field == name or name in error.message, (change, error)
            continue
        json.dumps([spec.model_type, spec.dtype]).encode()
        is_new = repr(spec) not in resolved  # most fields change nothing that is read
        resolved.add(repr(spec))
        if is_new and spec.kv_groups[0].head_dim * spec.kv_groups[0].num_heads < 1 << 20:  # else a pool holds no page
            resolve(EngineConfig(model=str(tmp_path), device="cpu"), tmp_path)
        value = change[name]
        assert isinstance(value, (int, float, dict, list)) or value in (None, MISSING) or name in READ_BY_NONE, change
    assert num_refused > 500


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000),
        *(b'{"hidden_size": 1' + b"0" * 5000 + b"}", b"\x00" * 64, b"{}", b"{} {}"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_object_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **BASE}))
    (tmp_path / name).write_bytes(content)
    if (name, content) == ("generation_config.json", b"{}"):
        assert ModelSpec.from_folder(tmp_path).eos_token_ids == (2,)
        return
    with pytest.raises(REFUSALS) as caught:
        ModelSpec.from_folder(tmp_path)
    assert name in caught.value.message


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        ModelSpec.from_folder(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelSpec.from_folder(tmp_path)
    file.rmdir()
    with file.open("wb") as sparse:
        sparse.truncate(1 << 33)
    with pytest.raises(CheckpointError, match="larger than"):
        ModelSpec.from_folder(tmp_path)


@pytest.mark.parametrize("value", ["2", 2.0, True, [None], [[2]], {"a": 2}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_of_an_end_are_whole_numbers(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **BASE}))
    contents = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    (tmp_path / name).write_text(json.dumps({**contents, "eos_token_id": value}))
    with pytest.raises(CheckpointError, match=rf"^{name}: eos_token_id"):
        ModelSpec.from_folder(tmp_path)


def test_of_a_doubled_key_the_last_counts_as_in_every_reader(tmp_path: Path) -> None:
    text = json.dumps({"architectures": ["LlamaForCausalLM"], **BASE})
    (tmp_path / "config.json").write_text(text[:-1] + ', "hidden_size": 96}')
    assert ModelSpec.from_folder(tmp_path).hidden_size == 96


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes", "compressed-tensors", None])
def test_quantized_checkpoints_are_refused_by_their_method(family: str, method: str | None) -> None:
    config = {"architectures": [f"{FAMILIES[family]}ForCausalLM"], **BASE}
    for name in ("quantization_config", "compression_config"):
        with pytest.raises(UnsupportedModelError, match=f"{name}.*{method}") as caught:
            ModelSpec.from_config({**config, name: {} if method is None else {"quant_method": method}})
        assert caught.value.field == name


def window(family: str, **changes: Any) -> int | None:
    config = {"architectures": [f"{FAMILIES[family]}ForCausalLM"], **BASE}
    return ModelSpec.from_config({**config, "sliding_window": 8, **changes}).sliding_window


def test_a_window_counts_where_a_layer_slides() -> None:
    assert window("llama") is None
    assert window("llama", use_sliding_window=True, layer_types=["sliding_attention"] * 2) is None
    assert window("mistral") == 8 and window("mistral", sliding_window=None) is None
    for family in ("qwen2", "qwen3"):
        assert window(family, use_sliding_window=False, max_window_layers=0) is None
        assert [window(family, max_window_layers=count) for count in (0, 1, 2, 28)] == [8, 8, None, None]
        assert window(family, layer_types=["full_attention"] * 2, max_window_layers=0) is None
        assert window(family, layer_types=["full_attention", "sliding_attention"], max_window_layers=9) == 8
        assert window(family, sliding_window=None, max_window_layers=0) is None
        for wrong in (["full_attention"], "full_attention", ["chunked_attention"] * 2):
            with pytest.raises(REFUSALS, match="layer_types"):
                window(family, layer_types=wrong)


def test_the_family_is_what_both_fields_name() -> None:
    assert ModelSpec.from_config({"model_type": "qwen2", **BASE}).architecture == "Qwen2ForCausalLM"
    assert ModelSpec.from_config({"architectures": ["X", "LlamaForCausalLM"], **BASE}).model_type == "llama"
    with pytest.raises(UnsupportedModelError, match="model_type 'qwen2' with architectures"):
        ModelSpec.from_config({"architectures": ["LlamaForCausalLM"], "model_type": "qwen2", **BASE})
