"""A Hugging Face `config.json` as a value. Owns what the engine reads from it; refuses by name what it cannot do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.types.errors import CheckpointError, UnsupportedModelError


class RopeSpec(msgspec.Struct, frozen=True):
    """Rotary embedding: base frequency and its scaling. llama3 uses the four last fields, linear only `factor`."""

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


class KvGroup(msgspec.Struct, frozen=True):
    """Layers that share one KV layout: each page holds [page_size, num_kv_heads, head_dim] keys and as many values."""

    layer_ids: tuple[int, ...]
    num_kv_heads: int
    head_dim: int


class ModelSpec(msgspec.Struct, frozen=True):
    """What a dense decoder is made of. Sizes are in elements; `max_position` in tokens."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """KV geometry, one entry per group of layers with the same layout."""
        return (KvGroup(tuple(range(self.num_layers)), self.num_kv_heads, self.head_dim),)

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values that one token costs in all layers."""
        return sum(2 * len(g.layer_ids) * g.num_kv_heads * g.head_dim * element_size for g in self.kv_groups)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelSpec:
        """Read `config.json` and, for end-of-sequence ids only, `generation_config.json`.

        Raises `CheckpointError` for a missing or corrupt file or field, `UnsupportedModelError` for what this build
        cannot run.
        """
        config = _read_json(folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        return cls.from_config(config, generation)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
        """As `from_folder`, from the parsed files."""
        family = _family(config)
        hidden_size = _positive(config, "hidden_size")
        num_heads = _positive(config, "num_attention_heads")
        num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
        head_dim = _positive(config, "head_dim", family.head_dim or hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: {num_heads} heads do not divide into {num_kv_heads} KV heads",
                field="num_key_value_heads",
            )
        if head_dim % 2:
            raise UnsupportedModelError(
                f"config.json: head_dim must be even for rotary embeddings, got {head_dim}", field="head_dim"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(
                f"config.json: hidden_act {config['hidden_act']!r} is not supported", field="hidden_act"
            )
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=family.architecture,
            model_type=str(config.get("model_type", family.model_type)),
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=_positive(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position=_positive(config, "max_position_embeddings"),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config, family.rope_theta),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.always_qkv_bias or attention_bias,
            o_bias=attention_bias and not family.always_qkv_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(config, family),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
            eos_token_ids=_eos_ids(config, generation or {}),
        )


class _Family(msgspec.Struct, frozen=True):
    architecture: str
    model_type: str
    always_qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    head_dim: int | None = None
    window_needs_flag: bool = False
    window_default: int | None = None


_FAMILIES = {
    family.architecture: family
    for family in (
        _Family("LlamaForCausalLM", "llama"),
        _Family("MistralForCausalLM", "mistral", window_default=4096),
        _Family("Qwen2ForCausalLM", "qwen2", always_qkv_bias=True, window_needs_flag=True),
        _Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, head_dim=128, window_needs_flag=True),
    )
}


def _family(config: Mapping[str, Any]) -> _Family:
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in _FAMILIES:
            return _FAMILIES[name]
    named = ", ".join(map(str, architectures)) or "(none)"
    raise UnsupportedModelError(
        f"config.json: architecture {named} is not supported; supported: {', '.join(_FAMILIES)}", field="architectures"
    )


def _positive(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {name} must be a positive integer, got {value!r}", field=name)
    return value


def _rope(config: Mapping[str, Any], default_theta: float) -> RopeSpec:
    """Read `rope_parameters` (new) or `rope_theta` + `rope_scaling` (old)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or default_theta)
    if float(config.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError(
            "config.json: partial_rotary_factor is not supported", field="partial_rotary_factor"
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3"):
        raise UnsupportedModelError(f"config.json: rope scaling {kind!r} is not supported", field="rope_scaling")
    factor = float(scaling.get("factor", 1.0))
    if not (math.isfinite(factor) and factor > 0):
        raise CheckpointError(f"config.json: rope scaling factor must be positive, got {factor}", field="rope_scaling")
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=factor)
    return RopeSpec(
        theta=theta,
        scaling="llama3",
        factor=factor,
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_position=int(scaling.get("original_max_position_embeddings", 8192)),
    )


def _sliding_window(config: Mapping[str, Any], family: _Family) -> int | None:
    if family.window_needs_flag and not config.get("use_sliding_window", False):
        return None
    window = config.get("sliding_window", family.window_default)
    return int(window) if window else None


def _eos_ids(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is not None:
                found[int(token)] = None
    return tuple(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", field=path.name) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field=path.name) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} does not hold an object", field=path.name)
    return parsed
