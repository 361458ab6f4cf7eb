"""`config.json` as the families write it, in both spellings of rotary settings, and what is refused by name."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from headrace.config import ModelSpec
from headrace.config.json_files import read_bytes
from headrace.types.errors import CheckpointError, UnsupportedModelError

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SMALL, **changes}


@pytest.mark.parametrize(
    ("config_class", "architecture"),
    [
        ("LlamaConfig", "LlamaForCausalLM"),
        ("MistralConfig", "MistralForCausalLM"),
        ("Qwen2Config", "Qwen2ForCausalLM"),
        ("Qwen3Config", "Qwen3ForCausalLM"),
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        ("MixtralConfig", "MixtralForCausalLM"),
    ],
)
def test_transformers_defaults_are_read_as_transformers_reads_them(
    tmp_path: Path, config_class: str, architecture: str
) -> None:
    theirs = getattr(transformers, config_class)(**SMALL, architectures=[architecture])
    theirs.save_pretrained(tmp_path)
    ours = ModelSpec.from_folder(tmp_path)
    attention = ours.layers[-1].attention
    assert attention.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.model_type == theirs.model_type


def test_old_and_new_rope_spellings_agree() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = ModelSpec.from_config(config(rope_theta=500000.0, rope_scaling=scaling))
    new = ModelSpec.from_config(config(rope_parameters={"rope_theta": 500000.0, **scaling}))
    assert old.layers == new.layers
    rope = old.layers[0].attention.rope
    assert (rope.scaling, rope.theta, rope.factor) == ("llama3", 500000.0, 8.0)


def test_eos_ids_are_the_union_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(eos_token_id=2)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.1}))
    assert ModelSpec.from_folder(tmp_path).eos_token_ids == (2, 7)


def test_biases_differ_by_family() -> None:
    qwen2 = ModelSpec.from_config(config("Qwen2ForCausalLM")).layers[0].attention
    llama = ModelSpec.from_config(config(attention_bias=True)).layers[0].attention
    assert (qwen2.qkv_bias, qwen2.o_bias) == (True, False)
    assert (llama.qkv_bias, llama.o_bias) == (True, True)


def test_layers_say_who_slides() -> None:
    kinds = ["full_attention", "sliding_attention"]
    spec = ModelSpec.from_config(
        config("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    )
    assert [layer.attention.window for layer in spec.layers] == [None, 8] and spec.sliding_window == 8
    assert [group.layer_ids for group in spec.kv_groups] == [(0, 1)], "no longer context than the window: one pool"


def test_kv_bytes_per_token_counts_keys_and_values_of_all_layers() -> None:
    assert ModelSpec.from_config(config()).kv_bytes_per_token(4) == 2 * 2 * 2 * 16 * 4


def test_positions_that_cost_a_token_as_much_as_its_products() -> None:
    """Counted from the weights of transformers' own layers, and from two products of all heads per position."""
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    for settings in (config(), config("Qwen3MoeForCausalLM", model_type="qwen3_moe", **experts)):
        model_type = settings.pop("model_type", "llama")
        model_config = transformers.AutoConfig.for_model(model_type, **settings)
        model = transformers.AutoModelForCausalLM.from_config(model_config)
        weights = 0
        for name, weight in model.model.layers.named_parameters():
            share = 2 / 5 if ".experts." in name else 1.0
            weights += weight.numel() * share * (weight.dim() > 1)
        spec = ModelSpec.from_config({**settings, "model_type": model_type})
        attention = spec.layers[0].attention
        per_position = 2 * len(spec.layers) * attention.num_heads * attention.head_dim
        assert spec.attended_per_token == int(weights / per_position) > 100


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 15}, "head_dim"),
    ],
)
def test_unsupported_features_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ModelSpec.from_config(config(**changes))
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
@pytest.mark.parametrize("value", [None, 0, -3, "64", True, 1.5])
def test_bad_sizes_are_named(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(config(**{name: value}))
    assert caught.value.field == name


def test_missing_and_corrupt_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="object"):
        ModelSpec.from_folder(tmp_path)


@pytest.mark.parametrize(
    "contents",
    [
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b'{"vocab_size": ' + b"9" * 4000 + b"}",
        b'{"x": [' + b"[]," * 2_000_000 + b"0]}",
    ],
    ids=["unreadable integer", "huge integer", "lists"],
)
def test_a_configuration_is_bounded(tmp_path: Path, contents: bytes) -> None:
    whole = json.dumps(config()).encode()[:-1] + b", " + contents[1:]
    (tmp_path / "config.json").write_bytes(whole)
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_folder(tmp_path)
    assert len(caught.value.message) < 1000


def test_a_file_that_has_nothing_to_say_now_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a link to /proc/kmsg: its type is that of a file, and reading it would block."""

    class Silent(io.FileIO):
        def read(self, size: int | None = -1, /) -> None:  # type: ignore[override]
            return None

    monkeypatch.setattr("builtins.open", lambda descriptor, mode: Silent(descriptor, mode))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_bytes(tmp_path / "config.json")
