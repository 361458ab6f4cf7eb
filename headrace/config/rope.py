"""Rotary embeddings as a configuration states them. Owns both spellings and which of two statements counts.

transformers 5 writes `rope_parameters`, with the base frequency in it; before there were `rope_scaling` and a
`rope_theta` beside it. Both are read as transformers reads them: `rope_scaling` replaces `rope_parameters`, a
`rope_theta` inside counts before the one beside, `original_max_position_embeddings` the other way round. A file in
which a scaling or a base frequency would be lost that way is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from headrace.config.json_files import Fields
from headrace.types.errors import CheckpointError

RopeScaling = Literal["default", "linear", "llama3"]
DEFAULT_THETA = 10000.0
_KINDS: tuple[RopeScaling, ...] = get_args(RopeScaling)
_SPELLINGS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"  # the length that llama3 scaling starts from


class RopeSpec(msgspec.Struct, frozen=True):
    """Rotary embedding: base frequency and its scaling. llama3 uses the four last fields, linear only `factor`."""

    theta: float = DEFAULT_THETA
    scaling: RopeScaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def read_rope(config: Fields, max_position: int, theta: float) -> RopeSpec:
    """The rotary embedding of a `config.json`; `theta` is the family's where none is given. Raises `CheckpointError` or
    `UnsupportedModelError` naming the field."""
    _refuse_partial(config)
    given = [_settings(config, name) for name in _SPELLINGS if config.values.get(name) not in (None, {})]
    specs = [_read(config, settings, max_position, theta) for settings in given]
    if not specs:
        return RopeSpec(theta=config.number("rope_theta", theta))
    taken, replaced = specs[-1], specs[0]
    has_theta = config.has("rope_theta") or "rope_theta" in (config.values.get("rope_scaling") or {})
    is_lost = replaced.scaling != "default" or (replaced.theta != taken.theta and not has_theta)
    if taken != replaced and is_lost:
        message = "config.json: rope_parameters and rope_scaling say different things; keep the one that is meant"
        raise CheckpointError(message, field="rope_scaling")
    return taken


def _settings(config: Fields, name: str) -> Fields:
    values = config.values[name]
    if not isinstance(values, Mapping):
        raise config.wrong(name, "an object or null")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise config.unsupported(name, "differs from layer to layer, which is not supported")
    return Fields(values, "config.json", within=name)


def _read(config: Fields, settings: Fields, max_position: int, theta: float) -> RopeSpec:
    _refuse_partial(settings)
    theta = (settings if "rope_theta" in settings.values else config).number("rope_theta", theta)
    kind = _kind(settings)
    if kind == "default":
        return RopeSpec(theta=theta)
    factor = settings.number("factor")
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=factor)
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if high <= low:
        raise settings.wrong("high_freq_factor", f"over low_freq_factor ({low:g})")
    original = next((each.integer(_ORIGINAL) for each in (config, settings) if each.has(_ORIGINAL)), max_position)
    return RopeSpec(theta, "llama3", factor, low, high, original)


def _kind(settings: Fields) -> RopeScaling:
    name = "type" if "rope_type" not in settings.values and "type" in settings.values else "rope_type"
    kind = settings.text(name, "default")
    if name not in settings.values and settings.has("factor"):
        raise settings.wrong("rope_type", "given where there is a factor")
    for known in _KINDS:
        if kind == known:
            return known
    raise settings.unsupported(name, f"{kind[:40]!r} is not supported")


def _refuse_partial(fields: Fields) -> None:
    name = "partial_rotary_factor"
    if fields.has(name) and fields.number(name) != 1.0:
        raise fields.unsupported(name, "is not supported")
