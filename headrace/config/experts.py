"""Experts as a configuration states them. Owns which layers have some, and what a family calls their settings."""

from __future__ import annotations

import msgspec

from headrace.config.json_files import Fields
from headrace.config.layer_spec import DenseSpec, ExpertsSpec, MlpSpec
from headrace.types.errors import CheckpointError

_MOST_EXPERTS = 1 << 16  # of all layers
_COUNTS = ("num_experts", "num_local_experts")
_ONLY: dict[str, object] = {
    "shared_expert_intermediate_size": 0,
    "n_shared_experts": 0,
    "num_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
}
"""What other families of experts have, and the value that changes nothing."""


class ExpertFields(msgspec.Struct, frozen=True):
    """What a family takes the fields of its experts for.

    intermediate_size   the name of the field that holds an expert's
    num_per_token       where `num_experts_per_tok` is absent
    normalizes          always; else `norm_topk_prob` says whether
    has_dense_layers    those in `mlp_only_layers`, and all that are not a multiple of `decoder_sparse_step`
    """

    intermediate_size: str
    num_per_token: int
    normalizes: bool
    has_dense_layers: bool


def read_mlps(config: Fields, names: ExpertFields, num_layers: int) -> list[MlpSpec]:
    """The feed-forward block of each layer. Raises `CheckpointError` or `UnsupportedModelError` naming the field."""
    for name, only in _ONLY.items():
        if config.has(name) and config.values[name] != only:
            raise config.unsupported(name, "is not supported: each token goes to its most probable experts, no others")
    config.number("router_jitter_noise", 0.0, may_be_zero=True)  # of training alone
    num_experts = _num_experts(config, least=0 if names.has_dense_layers else 1)
    dense_layers = _dense_layers(config, num_layers) if names.has_dense_layers else set()
    if num_experts == 0 or len(dense_layers) == num_layers:
        return [_dense(config)] * num_layers
    if num_experts * (num_layers - len(dense_layers)) > _MOST_EXPERTS:
        message = f"{config.file}: num_experts {num_experts} in each of {num_layers} layers are over {_MOST_EXPERTS}"
        raise CheckpointError(message, field="num_experts")
    num_per_token = config.integer("num_experts_per_tok", names.num_per_token)
    if num_per_token > num_experts:
        message = f"{config.file}: num_experts_per_tok {num_per_token} is over the number of experts, {num_experts}"
        raise CheckpointError(message, field="num_experts_per_tok")
    experts = ExpertsSpec(
        num_experts=num_experts,
        num_per_token=num_per_token,
        intermediate_size=config.integer(names.intermediate_size),
        normalizes=names.normalizes or config.flag("norm_topk_prob"),
    )
    return [_dense(config) if layer in dense_layers else experts for layer in range(num_layers)]


def _dense(config: Fields) -> DenseSpec:
    return DenseSpec(config.integer("intermediate_size"), bias=False)


def _num_experts(config: Fields, least: int) -> int:
    """By either name: transformers takes one for the other."""
    given = {name: config.integer(name, least=least, most=_MOST_EXPERTS) for name in _COUNTS if name in config.values}
    if len(set(given.values())) > 1:
        message = f"{config.file}: {' and '.join(_COUNTS)} say different things; keep the one that is meant"
        raise CheckpointError(message, field=_COUNTS[1])
    return next(iter(given.values())) if given else config.integer(_COUNTS[0], least=least, most=_MOST_EXPERTS)


def _dense_layers(config: Fields, num_layers: int) -> set[int]:
    step = config.integer("decoder_sparse_step", 1)
    listed = config.values["mlp_only_layers"] if config.has("mlp_only_layers") else []
    if not isinstance(listed, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in listed):
        raise config.wrong("mlp_only_layers", f"a list of layers from 0 to {num_layers - 1}")
    return {*listed, *(layer for layer in range(num_layers) if (layer + 1) % step)}
