"""A Hugging Face `config.json` as a value. Owns what the engine reads from it; refuses by name what it cannot do.

A field means what transformers takes it for, family by family. What transformers would refuse, and what it would
silently take for something else than is written, is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.config.engine_config import EngineConfig
from headrace.config.experts import ExpertFields, read_mlps
from headrace.config.json_files import Fields, is_text, is_there, read_object, shown
from headrace.config.layer_spec import AttentionSpec, DenseSpec, ExpertsSpec, KvGroup, LayerSpec, kv_groups
from headrace.config.rope import DEFAULT_THETA, read_rope
from headrace.types.errors import CheckpointError, ConfigError, UnsupportedModelError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_MOST_LAYERS = 4096
_MOST_POSITIONS = 1 << 24
_LAYER_KINDS = ("full_attention", "sliding_attention")
_QUANTIZED = ("quantization_config", "compression_config")
_DTYPES = {"half": "float16", "float": "float32", "double": "float64"} | {
    name: name for name in ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
}


class ModelSpec(msgspec.Struct, frozen=True):
    """What a decoder is made of. Sizes are in elements; `max_position` in tokens.

    `eos_token_ids` are the ids that end a sequence, `eos_sources` where each of them comes from.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...] = ()
    eos_sources: tuple[str, ...] = ()

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        return kv_groups(self.layers)

    @property
    def attended_per_token(self) -> int:
        """Positions that a token attends to with as many multiplications as its products in all layers take."""
        products = sum(
            layer.attention.num_multiplied(self.hidden_size) + layer.mlp.num_multiplied(self.hidden_size)
            for layer in self.layers
        )
        per_position = sum(2 * layer.attention.num_heads * layer.attention.head_dim for layer in self.layers)
        return max(1, products // per_position)

    @property
    def sliding_window(self) -> int | None:
        """The least window of a layer that slides; None where none does."""
        return min(
            (layer.attention.window for layer in self.layers if layer.attention.window is not None), default=None
        )

    @property
    def has_experts(self) -> bool:
        return any(isinstance(layer.mlp, ExpertsSpec) for layer in self.layers)

    @property
    def experts_shape(self) -> tuple[int, int]:
        """(layers, experts per token): of what is told of each token, also of layers that have no experts; (0, 0) for a
        model without."""
        counts = [layer.mlp.num_per_token for layer in self.layers if isinstance(layer.mlp, ExpertsSpec)]
        return (len(self.layers), max(counts)) if counts else (0, 0)

    def check_kept_experts(self, engine: EngineConfig) -> None:
        """Refuse to keep whom tokens were given to where there is nobody, or where not all are at hand."""
        name, why = "keep_routed_experts", "" if self.has_experts else "the model has no experts"
        if engine.pp_size > 1:
            why = "with pp_size each stage knows those of its own layers only"
        if engine.host_kv_tokens:
            why = "host_kv_tokens brings pages back without them"
        if engine.keep_routed_experts and why:
            raise ConfigError(f"{name} cannot be had: {why}", field=name)

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values that one token costs in all layers."""
        return sum(2 * len(g.layer_ids) * g.num_kv_heads * g.head_dim * element_size for g in self.kv_groups)

    def with_eos(self, token_ids: Iterable[int], source: str) -> ModelSpec:
        """The same with further end-of-sequence ids; ids outside the vocabulary are never drawn and left out."""
        sources = dict(zip(self.eos_token_ids, self.eos_sources, strict=True))
        for token_id in dict.fromkeys(token_ids):
            if 0 <= token_id < self.vocab_size:
                sources[token_id] = f"{sources[token_id]}, {source}" if token_id in sources else source
        return msgspec.structs.replace(self, eos_token_ids=tuple(sources), eos_sources=tuple(sources.values()))

    @classmethod
    def from_folder(cls, folder: Path) -> ModelSpec:
        """Read `config.json` and, for end-of-sequence ids only, `generation_config.json`.

        Raises `CheckpointError` for a missing or corrupt file or field, `UnsupportedModelError` for what this build
        cannot run.
        """
        config, generation = read_object(folder / CONFIG_FILE), folder / GENERATION_FILE
        return cls.from_config(config, read_object(generation) if is_there(generation) else None)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
        """As `from_folder`, from the parsed files."""
        fields = Fields(config, CONFIG_FILE)
        family = _family(fields)
        _refuse_unsupported(fields)
        hidden_size = fields.integer("hidden_size")
        max_position = fields.integer("max_position_embeddings", most=_MOST_POSITIONS)
        spec = cls(
            architecture=family.architecture,
            model_type=family.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            layers=_layers(fields, family, hidden_size, max_position),
            max_position=max_position,
            rms_norm_eps=fields.number("rms_norm_eps", family.rms_norm_eps, may_be_zero=True),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            dtype=_dtype(fields),
        )
        spec = spec.with_eos(_eos_ids(fields), CONFIG_FILE)
        return spec.with_eos(_eos_ids(Fields(generation or {}, GENERATION_FILE)), GENERATION_FILE)


class _Family(msgspec.Struct, frozen=True):
    """What a family takes a field for. `kv_heads` and `head_dim` (None: derived), `default_window` (None: no layer
    slides), `theta` and `rms_norm_eps` are had where the field is absent.

    bias    "never" | "qkv" (always, and there only) | "asked" (by `attention_bias`, the output projection too)
    window  "never" | "all" layers slide | "flagged": all by `use_sliding_window` | "by layer": some of them then
    """

    architecture: str
    model_type: str
    bias: Literal["never", "qkv", "asked"]
    window: Literal["never", "all", "flagged", "by layer"]
    kv_heads: int | None = None
    head_dim: int | None = None
    default_window: int | None = 4096
    theta: float = DEFAULT_THETA
    rms_norm_eps: float = 1e-6
    has_mlp_bias: bool = False
    qk_norm: bool = False
    experts: ExpertFields | None = None


_FAMILIES = (
    _Family("LlamaForCausalLM", "llama", bias="asked", window="never", has_mlp_bias=True),
    _Family("MistralForCausalLM", "mistral", bias="never", window="all", kv_heads=8),
    _Family("Qwen2ForCausalLM", "qwen2", bias="qkv", window="by layer", kv_heads=32),
    _Family("Qwen3ForCausalLM", "qwen3", bias="asked", window="by layer", kv_heads=32, head_dim=128, qk_norm=True),
    _Family(
        *("Qwen3MoeForCausalLM", "qwen3_moe", "asked", "flagged"),
        kv_heads=4,
        qk_norm=True,
        experts=ExpertFields("moe_intermediate_size", num_per_token=8, normalizes=False, has_dense_layers=True),
    ),
    _Family(
        *("MixtralForCausalLM", "mixtral", "never", "all"),
        kv_heads=8,
        default_window=None,
        theta=1e6,
        rms_norm_eps=1e-5,
        experts=ExpertFields("intermediate_size", num_per_token=2, normalizes=True, has_dense_layers=False),
    ),
)
_DEFAULT_FULL_LAYERS = 28


def _family(config: Fields) -> _Family:
    """The family that `architectures` and `model_type` name; where both are given they must agree."""
    named = config.values["architectures"] if config.has("architectures") else []
    if not isinstance(named, list) or not all(map(is_text, named)):
        raise config.wrong("architectures", "a list of strings")
    families = [family for family in _FAMILIES if family.architecture in named or not named]
    model_type = config.text("model_type") if config.has("model_type") else None
    if not named and model_type is None:
        raise config.unsupported("architectures", f"is not given, nor model_type; {_supported()}")
    if not families:
        raise config.unsupported("architectures", f"{shown(named)} is not supported; {_supported()}")
    if model_type is None:
        return min(families, key=lambda family: named.index(family.architecture))
    for family in families:
        if family.model_type == model_type:
            return family
    where = f" with architectures {shown(named)}" if named else ""
    raise config.unsupported("model_type", f"{model_type[:40]!r}{where} is not supported; {_supported()}")


def _supported() -> str:
    return "supported: " + ", ".join(f"{family.architecture} ({family.model_type})" for family in _FAMILIES)


def _refuse_unsupported(config: Fields) -> None:
    for name in _QUANTIZED:
        if config.has(name):
            value = config.values[name]
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            raise config.unsupported(name, f"(quant_method {shown(method)}): quantized weights are not supported")
    if config.values.get("per_layer_config") not in (None, {}):
        raise config.unsupported("per_layer_config", "is not supported: all layers have one shape")
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        raise config.unsupported("hidden_act", f"{shown(config.values['hidden_act'])} is not supported")


def _layers(config: Fields, family: _Family, hidden_size: int, max_position: int) -> tuple[LayerSpec, ...]:
    """All attend alike, but for who slides."""
    num_layers = config.integer("num_hidden_layers", most=_MOST_LAYERS)
    num_heads, num_kv_heads, head_dim = _head_sizes(config, family, hidden_size)
    has_bias = family.bias == "asked" and config.flag("attention_bias")
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=read_rope(config, max_position, family.theta),
        qkv_bias=has_bias or family.bias == "qkv",
        o_bias=has_bias,
        qk_norm=family.qk_norm,
        window=None,
    )
    if family.experts is not None:
        mlps = read_mlps(config, family.experts, num_layers)
    else:
        mlp_bias = family.has_mlp_bias and config.flag("mlp_bias")
        mlps = [DenseSpec(config.integer("intermediate_size"), mlp_bias)] * num_layers
    windows = _windows(config, family, num_layers)
    return tuple(
        LayerSpec(msgspec.structs.replace(attention, window=window), mlp)
        for window, mlp in zip(windows, mlps, strict=True)
    )


def _head_sizes(config: Fields, family: _Family, hidden_size: int) -> tuple[int, int, int]:
    """num_heads, num_kv_heads, head_dim."""
    num_heads = config.integer("num_attention_heads")
    kv_default = None if "num_key_value_heads" in config.values else family.kv_heads
    if kv_default is None or num_heads % kv_default:  # a null, or a default of larger models that this one cannot have
        kv_default = num_heads
    num_kv_heads = config.integer("num_key_value_heads", kv_default, null=True)
    if num_heads % num_kv_heads:
        message = f"{CONFIG_FILE}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        raise CheckpointError(message, field="num_key_value_heads")
    if not (config.has("head_dim") or family.head_dim) and hidden_size % num_heads:
        raise config.wrong("head_dim", f"given where {num_heads} heads do not divide hidden_size {hidden_size}")
    head_dim = config.integer("head_dim", family.head_dim or hidden_size // num_heads, null=True)
    if head_dim % 2:
        message = f"{CONFIG_FILE}: head_dim must be even for rotary embeddings, got {head_dim}"
        raise UnsupportedModelError(message, field="head_dim")
    return num_heads, num_kv_heads, head_dim


def _windows(config: Fields, family: _Family, num_layers: int) -> list[int | None]:
    """Each layer's, if it slides. Llama ignores the key; Qwen needs a flag, and its first layers may not slide."""
    is_asked = family.window in ("flagged", "by layer")
    if family.window == "never" or (is_asked and not config.flag("use_sliding_window")):
        return [None] * num_layers
    if config.values.get("sliding_window", family.default_window) is None:
        return [None] * num_layers
    window = config.integer("sliding_window", family.default_window)
    slides = _sliding_layers(config, num_layers) if family.window == "by layer" else [True] * num_layers
    return [window if each else None for each in slides]


def _sliding_layers(config: Fields, num_layers: int) -> list[bool]:
    if not config.has("layer_types"):
        first = config.integer("max_window_layers", _DEFAULT_FULL_LAYERS, least=0)
        return [layer >= first for layer in range(num_layers)]
    kinds = config.values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise config.wrong("layer_types", f"a list of {num_layers} names")
    for kind in kinds:
        if kind not in _LAYER_KINDS:
            raise config.unsupported("layer_types", f"with {shown(kind)} is not supported")
    return [kind == "sliding_attention" for kind in kinds]


def _dtype(config: Fields) -> str:
    name = "dtype" if config.has("dtype") or not config.has("torch_dtype") else "torch_dtype"
    dtype = _DTYPES.get(config.text(name, "float32", null=True).removeprefix("torch."))
    if dtype is None:
        raise config.wrong(name, f"one of {', '.join(_DTYPES)}")
    return dtype


def _eos_ids(config: Fields) -> list[int]:
    value = config.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise config.wrong("eos_token_id", "an id, a list of ids or null")
    return ids
