"""What one rank of several has of a model, as sizes. Owns which models split over how many ranks and stages, and the
refusal."""

from __future__ import annotations

import msgspec

from headrace.config.layer_spec import AttentionSpec, LayerSpec
from headrace.config.model_spec import ModelSpec
from headrace.types.errors import ConfigError

VOCABULARY_BLOCK = 4096
"""Tokens that sampling looks at together."""

ALIGNED_COLUMNS = 16
"""That kernels are compiled for: in which order lanes are added up depends on whether rows are multiples of it."""


class PipelineStage(msgspec.Struct, frozen=True):
    """Layers `start` to `end` - 1 of a model. The first stage has the embedding, the last one final norm and head."""

    start: int
    end: int
    is_first: bool = True
    is_last: bool = True

    def of(self, model: ModelSpec) -> ModelSpec:
        """What this stage computes of a model, or of a share of it."""
        return msgspec.structs.replace(model, layers=model.layers[self.start : self.end])


def stages_of(model: ModelSpec, num_stages: int) -> tuple[PipelineStage, ...]:
    """Stages of as many layers each, and one more in the first ones where that does not come out even: the last has the
    head to compute. Raises `ConfigError` naming `pp_size` where there are fewer layers."""
    num_layers = len(model.layers)
    if num_stages > num_layers:
        message = f"pp_size {num_stages}: the model's {num_layers} layers do not make as many stages"
        raise ConfigError(message, field="pp_size")
    size, num_larger = divmod(num_layers, num_stages)
    starts = [number * size + min(number, num_larger) for number in range(num_stages + 1)]
    last = num_stages - 1
    return tuple(PipelineStage(starts[n], starts[n + 1], n == 0, n == last) for n in range(num_stages))


def share_of(model: ModelSpec, num_ranks: int) -> ModelSpec:
    """The layers that each of so many ranks computes: its heads, its key-value heads, its part of every block's width.

    Fewer key-value heads than ranks are held by several ranks each. The vocabulary, shared too, is told whole. Raises
    `ConfigError` naming `tp_size` for what does not split.
    """
    if num_ranks == 1:
        return model
    if vocabulary_rows(model.vocab_size, num_ranks) * (num_ranks - 1) >= model.vocab_size:
        raise _refusal(model.vocab_size, "tokens of the vocabulary", num_ranks)
    return msgspec.structs.replace(model, layers=tuple(_share_of_layer(layer, num_ranks) for layer in model.layers))


def vocabulary_rows(vocab_size: int, num_ranks: int) -> int:
    """Of the vocabulary on each rank, of which the last may end with padding. Whole blocks, if ranks can sample from
    such shares and each has some of it then; else as many as come out most evenly."""
    rows = -(-vocab_size // num_ranks)
    whole = -(-rows // VOCABULARY_BLOCK) * VOCABULARY_BLOCK
    is_shared = num_ranks > 1 and vocab_size % ALIGNED_COLUMNS == 0
    return whole if is_shared and whole * (num_ranks - 1) < vocab_size else rows


def _share_of_layer(layer: LayerSpec, num_ranks: int) -> LayerSpec:
    width = layer.mlp.intermediate_size
    if width % num_ranks:
        raise _refusal(width, "features of a feed-forward block (intermediate size)", num_ranks)
    mlp = msgspec.structs.replace(layer.mlp, intermediate_size=width // num_ranks)
    return msgspec.structs.replace(layer, attention=_share_of_heads(layer.attention, num_ranks), mlp=mlp)


def _share_of_heads(attention: AttentionSpec, num_ranks: int) -> AttentionSpec:
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    if num_heads % num_ranks:
        raise _refusal(num_heads, "attention heads", num_ranks)
    if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
        raise _refusal(num_kv_heads, "key-value heads", num_ranks)
    share = max(1, num_kv_heads // num_ranks)
    return msgspec.structs.replace(attention, num_heads=num_heads // num_ranks, num_kv_heads=share)


def _refusal(number: int, of_what: str, num_ranks: int) -> ConfigError:
    message = f"tp_size {num_ranks}: the model's {number} {of_what} do not split over as many ranks"
    return ConfigError(message, field="tp_size")
