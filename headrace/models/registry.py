"""From a `ModelSpec` to its family, its weight map and its decoder."""

from __future__ import annotations

from headrace.config import ModelSpec
from headrace.kernels import LayerKernels
from headrace.layers.linear import GemmCounter
from headrace.layers.params import Params
from headrace.layers.step import KvPlace
from headrace.models import llama, mistral, qwen2, qwen3
from headrace.models.decoder import Decoder
from headrace.models.family import Family, Size
from headrace.types.errors import UnsupportedModelError
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import ParamSpec, WeightMap, WeightRule

_FAMILIES: dict[str, Family] = {
    family.architecture: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
}
_EMBED, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def family_of(spec: ModelSpec) -> Family:
    """The family of an architecture. Raises `UnsupportedModelError` naming it."""
    family = _FAMILIES.get(spec.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"architecture {spec.architecture} is not supported; supported: {', '.join(_FAMILIES)}",
            field="architectures",
        )
    return family


def weight_map(spec: ModelSpec) -> WeightMap:
    """Every Hugging Face tensor of the checkpoint and the region of a parameter it fills.

    Parameters: "embed", "lm_head" (unless tied), "final_norm.weight", and per layer "layers.{i}." + the parameter names
    of `headrace.models.family`.
    """
    embed_shape = (spec.vocab_size, spec.hidden_size)
    rules = [WeightRule(_EMBED, "embed", 0, embed_shape, 0)]
    for layer in range(len(spec.layers)):
        rules += _layer_rules(spec, layer)
    rules.append(WeightRule("model.norm.weight", "final_norm.weight", 0, (spec.hidden_size,)))
    if not spec.tie_word_embeddings:
        rules.append(WeightRule(_LM_HEAD, "lm_head", 0, embed_shape, 0))
    num_rows: dict[str, int] = {}
    columns: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        num_rows[rule.param] = rule.start + rule.shape[0]
        columns[rule.param] = rule.shape[1:]
    params = [ParamSpec(name, (rows, *columns[name])) for name, rows in num_rows.items()]
    return WeightMap(params, rules, {_LM_HEAD: _EMBED} if spec.tie_word_embeddings else {})


def _layer_rules(spec: ModelSpec, layer: int) -> list[WeightRule]:
    attention, mlp = spec.layers[layer].attention, spec.layers[layer].mlp
    sizes: dict[Size, int] = {
        "hidden": spec.hidden_size,
        "heads": attention.num_heads * attention.head_dim,
        "kv_heads": attention.num_kv_heads * attention.head_dim,
        "intermediate": mlp.intermediate_size,
        "head_dim": attention.head_dim,
    }
    rules: list[WeightRule] = []
    next_row: dict[str, int] = {}
    for tensor in family_of(spec).layer_tensors(spec.layers[layer]):
        shape = tuple(sizes[size] for size in tensor.shape)
        start = next_row.get(tensor.param, 0)
        rules.append(
            WeightRule(
                f"model.layers.{layer}.{tensor.name}", f"layers.{layer}.{tensor.param}", start, shape, tensor.shard_axis
            )
        )
        next_row[tensor.param] = start + shape[0]
    return rules


def build(
    spec: ModelSpec,
    store: WeightStore,
    *,
    kernels: LayerKernels,
    counter: GemmCounter | None = None,
) -> Decoder:
    """The decoder over `store.live`, whose tensors it keeps."""
    family = family_of(spec)
    params = Params(store.live, kernels, counter or GemmCounter(), spec.rms_norm_eps)
    places = {
        layer_id: KvPlace(number, layer)
        for number, group in enumerate(spec.kv_groups)
        for layer, layer_id in enumerate(group.layer_ids)
    }
    layers = [family.layer(params.below(f"layers.{index}"), places[index]) for index in range(len(spec.layers))]
    return Decoder(params, layers)
