"""Every "auto" is decided, explained and bounded."""

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.config import EngineConfig, ResolvedConfig, resolve
from headrace.config.resolve import available_cores
from headrace.types.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(values))


def resolved(folder: Path, **settings: Any) -> ResolvedConfig:
    return resolve(EngineConfig.from_dict({"model": str(folder), **settings}), folder)


def test_everything_auto_is_explained(folder: Path) -> None:
    result = resolved(folder)
    explained = {name for name, _, _ in result.explanations}
    assert explained == {"device", "dtype", "context_length", "num_threads", "kv_pool_tokens", "attention_backend"}
    assert (result.device, result.dtype, result.context_length) == ("cpu", "float32", 512)


def test_given_settings_are_kept_and_not_explained(folder: Path) -> None:
    result = resolved(folder, dtype="bfloat16", context_length=100, kv_pool_tokens=64, page_size=4, num_threads=1)
    assert (result.dtype, result.context_length, result.max_total_num_tokens, result.num_pages) == (
        "bfloat16",
        100,
        64,
        17,
    )
    assert result.max_columns == 25
    assert "kv_pool_tokens" not in {name for name, _, _ in result.explanations}


def test_the_pool_is_no_larger_than_two_gibibytes(folder: Path) -> None:
    write(folder, num_hidden_layers=64, hidden_size=4096, max_position_embeddings=131072)
    result = resolved(folder)
    page_bytes = result.model.kv_bytes_per_token(4) * result.engine.page_size
    assert 0 < (result.num_pages - 1) * page_bytes <= 2 << 30


def test_a_sliding_window_bounds_the_context(folder: Path) -> None:
    write(folder, architectures=["MistralForCausalLM"], sliding_window=128)
    assert resolved(folder).context_length == 128
    with pytest.raises(ConfigError) as caught:
        resolved(folder, context_length=129)
    assert caught.value.field == "context_length"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": 65}, "page_size"),
        ({"page_size": "16"}, "page_size"),
        ({"overlap_depth": -1}, "overlap_depth"),
        ({"numerics": "exact"}, "numerics"),
        ({"context_length": 513}, "context_length"),
        ({"kv_pool_tokens": 3}, "kv_pool_tokens"),
        ({"memory_fraction": 2.0}, "memory_fraction"),
        ({"device": "cuda"}, "device"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_bad_settings_are_named(folder: Path, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(folder, **settings)
    assert caught.value.field == field


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("", None), ("0", None), ("4,2", None)])
def test_the_thread_count_of_the_environment_is_honoured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert resolved(folder).num_threads == (expected or available_cores())
    assert resolved(folder, num_threads=2).num_threads == 2
