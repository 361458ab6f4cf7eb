"""How Hugging Face tensor names map onto regions of parameters, as data, with a proof that nothing is left or doubled.

Owns `WeightMap`: the one table that loading, updating, reading back, digesting and saving all read. Must not know
tensors, files or sessions (no torch).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from headrace.types.errors import InternalError, WeightUpdateError
from headrace.types.weights import TensorInfo

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes a tensor may arrive in; it is converted to the engine's."""

TIED_HEAD = "lm_head.weight"
"""The output head: the one tensor that may be another one's memory, the embedding's."""

_DERIVED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".attn.masked_bias",
)
_MAX_NAMES_IN_MESSAGE = 8
_HEX_DIGITS = frozenset("0123456789abcdef")


class ParamSpec(msgspec.Struct, frozen=True):
    """One parameter of the engine: 1-D or 2-D, sizes in elements."""

    name: str
    shape: tuple[int, ...]


class WeightRule(msgspec.Struct, frozen=True):
    """Tensor `hf_name` of exactly `shape` is rows `start : start + shape[0]` of `param` (all of its columns).

    `shard_axis` is the axis of the HF tensor that tensor parallelism splits; None: every rank holds the whole of it.
    """

    hf_name: str
    param: str
    start: int
    shape: tuple[int, ...]
    shard_axis: int | None = None


class WeightMap:
    """The table of one model: parameters, the rule of every HF tensor, and aliases.

    `aliases` maps a tied name to the name it repeats, as in {"lm_head.weight": "model.embed_tokens.weight"}: it may be
    sent, in the same shape and with the same values, or left out; it owns no memory.

    Construction proves that the regions of every parameter are disjoint and cover it, so "each rule was written once"
    implies "each element was written once". A map that fails the proof is our own bug: `InternalError` naming it.
    """

    def __init__(
        self, params: Iterable[ParamSpec], rules: Iterable[WeightRule], aliases: Mapping[str, str] | None = None
    ) -> None:
        self.params: dict[str, ParamSpec] = {}
        for spec in params:
            _prove(spec.name not in self.params, f"parameter {spec.name} is declared twice")
            _prove(
                len(spec.shape) in (1, 2) and all(size > 0 for size in spec.shape),
                f"parameter {spec.name} has shape {spec.shape}",
            )
            self.params[spec.name] = spec
        self.rules_by_name: dict[str, WeightRule] = {}
        for rule in rules:
            _prove(rule.hf_name not in self.rules_by_name, f"tensor {rule.hf_name} has two rules")
            self.rules_by_name[rule.hf_name] = rule
        self.aliases: dict[str, str] = dict(aliases or {})
        for alias, target in self.aliases.items():
            _prove(alias not in self.rules_by_name, f"alias {alias} has a rule of its own")
            _prove(target in self.rules_by_name, f"alias {alias} repeats {target}, which has no rule")
        self._prove_coverage()

    def _prove_coverage(self) -> None:
        rules_of: dict[str, list[WeightRule]] = {name: [] for name in self.params}
        for rule in self.rules_by_name.values():
            _prove(rule.param in self.params, f"tensor {rule.hf_name} maps to {rule.param}, which is not a parameter")
            rules_of[rule.param].append(rule)
        for name, spec in self.params.items():
            next_row = 0
            for rule in sorted(rules_of[name], key=lambda rule: rule.start):
                _prove(
                    len(rule.shape) == len(spec.shape) and rule.shape[0] > 0 and rule.shape[1:] == spec.shape[1:],
                    f"tensor {rule.hf_name} {rule.shape} does not fit {name} {spec.shape}",
                )
                _prove(
                    rule.start == next_row,
                    f"{name}: rows {next_row} to {rule.start} are covered twice or never, at {rule.hf_name}",
                )
                next_row += rule.shape[0]
            _prove(next_row == spec.shape[0], f"{name}: {next_row} of {spec.shape[0]} rows are covered")

    @property
    def num_elements(self) -> int:
        """Elements of all parameters together."""
        return sum(num_elements(spec.shape) for spec in self.params.values())

    def shape_of(self, hf_name: str) -> tuple[int, ...] | None:
        """The shape a tensor of this name (aliases included) has, or None when the map has no such name."""
        rule = self.rules_by_name.get(self.aliases.get(hf_name, hf_name))
        return rule.shape if rule else None

    def untie(self, manifest: Sequence[TensorInfo]) -> Sequence[TensorInfo]:
        """The manifest with a tied name replaced by the one it repeats, where that is absent: they are one tensor."""
        names = {info.name for info in manifest}
        alone = {alias: target for alias, target in self.aliases.items() if alias in names and target not in names}
        return [msgspec.structs.replace(info, name=alone.get(info.name, info.name)) for info in manifest]

    def check_manifest(self, manifest: Sequence[TensorInfo], partial: bool) -> None:
        """Check a whole manifest before anything is touched.

        Raises `WeightUpdateError` naming every unknown, doubled, misshapen, non-float or (unless `partial`) missing
        tensor; its `field` is the first of them.
        """
        problems = self.find_problems(manifest, partial)
        if not problems:
            return
        shown = "; ".join(text for _, text in problems[:_MAX_NAMES_IN_MESSAGE])
        rest = len(problems) - _MAX_NAMES_IN_MESSAGE
        raise WeightUpdateError(shown + (f"; and {rest} more" if rest > 0 else ""), field=problems[0][0])

    def find_problems(self, manifest: Sequence[TensorInfo], partial: bool) -> list[tuple[str, str]]:
        """(name, what is wrong with it) for each fault of a manifest; empty when it may be believed."""
        problems: list[tuple[str, str]] = []
        seen: set[str] = set()
        for info in manifest:
            text = self._problem(info, seen)
            if text:
                problems.append((info.name, text))
            seen.add(info.name)
        if not partial:
            problems += [(name, f"{name} is missing") for name in self.rules_by_name if name not in seen]
        elif not manifest:
            problems.append(("manifest", "a partial update must name at least one tensor"))
        return problems

    def _problem(self, info: TensorInfo, seen: set[str]) -> str:
        expected = self.shape_of(info.name)
        if expected is None:
            return f"{info.name} is not a tensor of this model"
        if info.name in seen:
            return f"{info.name} is named twice"
        if tuple(info.shape) != expected:
            return f"{info.name} has shape {list(info.shape)}, expected {list(expected)}"
        if info.dtype not in FLOAT_DTYPES:
            return f"{info.name} has dtype {info.dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}"
        if info.digest and (len(info.digest) != 64 or not _HEX_DIGITS.issuperset(info.digest)):
            return f"{info.name} has a digest that is not 64 lowercase hex digits"
        return ""


def num_elements(shape: Sequence[int]) -> int:
    """The product of the sizes."""
    count = 1
    for size in shape:
        count *= size
    return count


def is_derived(hf_name: str) -> bool:
    """True for buffers that every engine recomputes, such as `rotary_emb.inv_freq`: old checkpoints and state dicts
    carry them, and they are ignored on every way into the engine."""
    return hf_name.endswith(_DERIVED_SUFFIXES)


def _prove(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InternalError(f"weight map: {otherwise}")
