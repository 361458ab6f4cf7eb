"""How Hugging Face tensors map onto parameters, box by box, as data, with a proof that nothing is left or doubled.

Owns `WeightMap`: the one table that loading, updating, reading back, digesting and saving all read. Must not know
tensors, files or sessions (no torch).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import msgspec

from headrace.types.errors import InternalError, WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights.boxes import Box, find_overlap

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes a tensor may arrive in; it is converted to that of its parameter."""

TIED_HEAD = "lm_head.weight"
"""The output head: the one tensor that may be another one's memory, the embedding's."""

_HEADLESS = (
    " (this model has a head of its own; where the trainer's is tied to the embedding, send that under this name, too, "
    "as named_tensors does with keep_tied_head=True)"
)

_RECOMPUTED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".attn.masked_bias",
)
_MAX_NAMES_IN_MESSAGE = 8
_HEX_DIGITS = frozenset("0123456789abcdef")


class ParamSpec(msgspec.Struct, frozen=True):
    """One parameter of the engine, of any rank, sizes in elements. `dtype` "" is the engine's.

    `padding` are boxes that no tensor fills, as behind a vocabulary that is rounded up: they hold zeros for ever.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = ""
    padding: tuple[Box, ...] = ()


class Piece(msgspec.Struct, frozen=True):
    """Box `source` of a Hugging Face tensor is box `target` of `param`.

    `axes` lists the source's axes in the order the target has them, () for as they are; then both have one shape, apart
    from axes of size 1. Of a box that `num_holders` ranks hold, one `is_counted`: theirs are the elements.
    """

    param: str
    source: Box
    target: Box
    axes: tuple[int, ...] = ()
    is_counted: bool = True
    num_holders: int = 1

    @property
    def times(self) -> int:
        """How often it is in a digest. Over all holders that is once, if all have the same values; and none is so often
        that a value which one of them alone has wrong would not show."""
        return 3 - 2 * self.num_holders if self.is_counted else 2

    @property
    def is_consistent(self) -> bool:
        """Both boxes have the same elements in the same order."""
        if not self.axes and self.source.shape == self.target.shape:
            return True
        shape = self.source.shape
        axes = self.axes or tuple(range(len(shape)))
        if sorted(axes) != list(range(len(shape))):
            return False
        return [shape[axis] for axis in axes if shape[axis] != 1] == [size for size in self.target.shape if size != 1]


class WeightRule(msgspec.Struct, frozen=True):
    """What becomes of tensor `hf_name` of exactly `shape`: its pieces, all in parameters of one dtype."""

    hf_name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def whole_rows(hf_name: str, param: str, start: int, shape: tuple[int, ...]) -> WeightRule:
    """The rule of a tensor that is, whole, the rows of `param` from `start` on."""
    source = Box.whole(shape)
    target = Box((start, *source.start[1:]), shape)
    return WeightRule(hf_name, shape, (Piece(param, source, target),))


class Derived(msgspec.Struct, frozen=True):
    """A parameter that no tensor fills: `function` computes it from those named in `inputs`, and gets their memory.

    It is rebuilt, into the same storage, whenever weights become live, before anybody computes with them.
    """

    parameter: ParamSpec
    inputs: tuple[str, ...]
    function: Callable[..., Any]


class ManifestPlan(msgspec.Struct, frozen=True):
    """A manifest that was found right: what an update of it does, worked out once and good for every later one.

    `manifest` has tied names replaced where they stand alone (`WeightMap.untie`); `rules` are those of the tensors that
    are written, `aliases` the tied names among the rest, `compared` all that are compared with one another.
    """

    given: tuple[TensorInfo, ...]
    partial: bool
    manifest: tuple[TensorInfo, ...]
    names: frozenset[str]
    rules: tuple[WeightRule, ...]
    aliases: dict[str, str]
    compared: frozenset[str]


def why_headless(missing: Sequence[str]) -> str:
    """What to add where these tensors are told to be missing: a trainer that ties its head does not list it."""
    return _HEADLESS if TIED_HEAD in missing else ""


class WeightMap:
    """The table of one model on one rank: parameters, the rule of every HF tensor, and aliases.

    `aliases` maps a tied name to the name it repeats, as in {"lm_head.weight": "model.embed_tokens.weight"}: it may be
    sent, in the same shape and with the same values, or left out; it owns no memory. `other_names` are rules of tensors
    that are the same memory cut otherwise, as the experts of a layer, one by one or all in one: an update fills a
    parameter by either, never by both; digests and saving know the first. What is `derived` is in no tensor.

    `first_names` and `other_names` are both sets of names of the parameters that have two, and `num_needed` is how many
    tensors fill all parameters under their first names.

    Construction proves that the boxes of every parameter are disjoint and cover it, and, unless the map `is_shard` of
    several, that the boxes of every tensor do: so "each tensor was written once" implies "each element was written
    once". Of shards `prove_mesh` proves the latter. A map that fails the proof is our own bug: `InternalError` naming
    what is at fault.
    """

    def __init__(
        self,
        params: Iterable[ParamSpec],
        rules: Iterable[WeightRule],
        aliases: Mapping[str, str] | None = None,
        *,
        other_names: Iterable[WeightRule] = (),
        derived: Iterable[Derived] = (),
        is_shard: bool = False,
    ) -> None:
        self.params: dict[str, ParamSpec] = {}
        for spec in params:
            _prove(spec.name not in self.params, "parameter {} is declared twice", spec.name)
            _prove(bool(spec.shape) and min(spec.shape) > 0, "parameter {} has shape {}", spec.name, spec.shape)
            _prove(spec.dtype in ("", *FLOAT_DTYPES), "parameter {} has dtype {}", spec.name, spec.dtype)
            self.params[spec.name] = spec
        self.rules_by_name = _by_name(rules, {})
        self.other_rules = _by_name(other_names, self.rules_by_name)
        self.aliases: dict[str, str] = dict(aliases or {})
        for alias, target in self.aliases.items():
            _prove(not self._has_rule(alias), "alias {} has a rule of its own", alias)
            _prove(target in self.rules_by_name, "alias {} repeats {}, which has no rule", alias, target)
        self.is_shard = is_shard
        _prove_parameters(self.params, self.rules_by_name.values(), is_shard)
        self.num_needed = sum(bool(rule.pieces) for rule in self.rules_by_name.values())
        self.other_names = self._names_of_others()
        self.first_names = self._names_by_parameter(is_shard)
        self.derived = tuple(derived)
        known = dict(self.params)
        for each in self.derived:
            name = each.parameter.name
            _prove(name not in known, "parameter {} is declared twice", name)
            _prove(known.keys() >= set(each.inputs), "{} is derived from what comes later or never", name)
            known[name] = each.parameter
        if not is_shard:
            prove_mesh([self])

    def parts(self) -> Iterator[WeightMap]:
        """A map of each parameter alone, whose tensors are all in it; without aliases and what is derived."""
        rules: dict[str, tuple[list[WeightRule], list[WeightRule]]] = {name: ([], []) for name in self.params}
        for world, known in enumerate((self.rules_by_name, self.other_rules)):
            for rule in known.values():
                for param in {piece.param for piece in rule.pieces}:
                    rules[param][world].append(rule)
        for name, (first, other) in rules.items():
            yield WeightMap([self.params[name]], first, other_names=other)

    def of_parameters(self) -> WeightMap:
        """The map in which each parameter is a tensor of its own name."""
        params = [msgspec.structs.replace(spec, padding=()) for spec in self.params.values()]
        return WeightMap(params, [whole_rows(spec.name, spec.name, 0, spec.shape) for spec in params])

    def _has_rule(self, name: str) -> bool:
        return name in self.rules_by_name or name in self.other_rules

    def _names_by_parameter(self, is_shard: bool) -> dict[str, list[str]]:
        """The first names of each parameter that other names fill as well, as is proved."""
        filled = self.other_names.keys()
        _prove(self.params.keys() >= filled, "other names fill what is no parameter")
        _prove_parameters({name: self.params[name] for name in filled}, self.other_rules.values(), is_shard)
        names: dict[str, list[str]] = {name: [] for name in filled}
        for name, rule in self.rules_by_name.items():
            params = {piece.param for piece in rule.pieces}
            is_one = params.isdisjoint(filled) or len(params) == 1
            _prove(is_one, "tensor {} has other names for a part of it", name)
            for param in params & filled:
                names[param].append(name)
        return names

    def _names_of_others(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name, rule in self.other_rules.items():
            params = {piece.param for piece in rule.pieces}
            _prove(len(params) <= 1, "tensor {} is another name for several parameters", name)
            for param in params:
                names.setdefault(param, []).append(name)
        return names

    @property
    def num_elements(self) -> int:
        """Elements of all parameters together."""
        return sum(math.prod(spec.shape) for spec in self.params.values())

    def rule_of(self, hf_name: str) -> WeightRule | None:
        """The rule of a tensor of this name, or of what it is tied to; None when the map has no such name."""
        return self.rules_by_name.get(self.aliases.get(hf_name, hf_name)) or self.other_rules.get(hf_name)

    def shape_of(self, hf_name: str) -> tuple[int, ...] | None:
        """The shape a tensor of this name (aliases included) has, or None when the map has no such name."""
        rule = self.rule_of(hf_name)
        return rule.shape if rule else None

    def untie(self, manifest: Sequence[TensorInfo]) -> Sequence[TensorInfo]:
        """The manifest with a tied name replaced by the one it repeats, where that is absent: they are one tensor."""
        names = {info.name for info in manifest}
        alone = {alias: target for alias, target in self.aliases.items() if alias in names and target not in names}
        if not alone:
            return manifest
        return [msgspec.structs.replace(info, name=alone.get(info.name, info.name)) for info in manifest]

    def plan(self, given: Sequence[TensorInfo], partial: bool) -> ManifestPlan:
        """Check a manifest and say what an update of it does. Raises as `check_manifest`."""
        manifest = tuple(given if partial else self.untie(given))
        self.check_manifest(manifest, partial)
        names = frozenset(info.name for info in manifest)
        aliases = {name: target for name, target in self.aliases.items() if name in names}
        rules = tuple(rule for info in manifest if info.name not in aliases and (rule := self.rule_of(info.name)))
        compared = aliases.keys() | set(aliases.values())
        return ManifestPlan(tuple(given), partial, manifest, names, rules, aliases, frozenset(compared))

    def check_manifest(self, manifest: Sequence[TensorInfo], partial: bool) -> None:
        """Check a whole manifest before anything is touched.

        Raises `WeightUpdateError` naming every unknown, doubled, misshapen, non-float or (unless `partial`) missing
        tensor; its `field` is the first of them.
        """
        refuse_manifest(self.find_problems(manifest, partial))

    def find_problems(self, manifest: Sequence[TensorInfo], partial: bool) -> list[tuple[str, str]]:
        """(name, what is wrong with it) for each fault of a manifest; empty when it may be believed."""
        problems: list[tuple[str, str]] = []
        seen: set[str] = set()
        for info in manifest:
            text = self.problem_of(info, seen)
            if text:
                problems.append((info.name, text))
            seen.add(info.name)
        problems += self.find_doubled(seen)
        if not partial:
            problems += [(name, f"{name} is missing{why_headless([name])}") for name in self.missing(seen)]
        elif not manifest:
            problems.append(("manifest", "a partial update must name at least one tensor"))
        return problems

    def missing(self, seen: Set[str]) -> list[str]:
        """The names that are needed beside these for all parameters to be filled; what only another rank holds, it
        misses there."""
        others = self._filled_by_others(seen)
        replaced = {name for param in others for name in self.first_names[param]}
        rules = self.rules_by_name.items()
        missing = [name for name, rule in rules if name not in seen and name not in replaced and rule.pieces]
        if others:
            rules = self.other_rules.items()
            missing += [
                name for name, rule in rules if name not in seen and any(piece.param in others for piece in rule.pieces)
            ]
        return missing

    def find_doubled(self, seen: Set[str]) -> list[tuple[str, str]]:
        """(name, what is wrong with it) for tensors whose memory is filled under other names too."""
        found: dict[str, str] = {}
        for param in self._filled_by_others(seen):
            for name in self.first_names[param]:
                if name in seen:
                    found[name] = f"{name} is sent under another name too: {param} would be filled twice"
        return list(found.items())

    def _filled_by_others(self, seen: Set[str]) -> set[str]:
        return {piece.param for name in self.other_rules.keys() & seen for piece in self.other_rules[name].pieces}

    def problem_of(self, info: TensorInfo, seen: Set[str]) -> str:
        """What is wrong with an entry of a manifest that has named these, by itself; "" when nothing is."""
        expected = self.shape_of(info.name)
        if expected is None:
            return f"{info.name} is not a tensor of this model"
        if info.name in seen:
            return f"{info.name} is named twice"
        if tuple(info.shape) != expected:
            return f"{info.name} has shape {list(info.shape)}, expected {list(expected)}"
        if info.dtype not in FLOAT_DTYPES:
            return f"{info.name} has dtype {info.dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}"
        if info.digest and (len(info.digest) not in (32, 64) or not _HEX_DIGITS.issuperset(info.digest)):
            return f"{info.name} has a digest that is not 64 or 32 lowercase hex digits"
        return ""


def refuse_manifest(problems: Sequence[tuple[str, str]]) -> None:
    """`WeightUpdateError` that tells what is wrong with tensors of a manifest, by name, if anything is."""
    if problems:
        shown = "; ".join(text for _, text in problems[:_MAX_NAMES_IN_MESSAGE])
        rest = len(problems) - _MAX_NAMES_IN_MESSAGE
        raise WeightUpdateError(shown + (f"; and {rest} more" if rest > 0 else ""), field=problems[0][0])


def is_recomputed(hf_name: str) -> bool:
    """True for buffers that every engine recomputes, such as `rotary_emb.inv_freq`: old checkpoints and state dicts
    carry them, and they are ignored on every way into the engine."""
    return hf_name.endswith(_RECOMPUTED_SUFFIXES)


def prove_mesh(maps: Sequence[WeightMap]) -> None:
    """Prove that the ranks of a mesh hold every element of every tensor: the counted boxes of all ranks together are
    disjoint and cover it, a box that is not counted is one of them, and all of its holders know how many they are.
    `InternalError` otherwise."""
    for name, rule in (maps[0].rules_by_name | maps[0].other_rules).items():
        counted: list[tuple[object, Box]] = []
        times: Counter[Box] = Counter()
        for rank, table in enumerate(maps):
            same = table.rules_by_name.get(name) or table.other_rules.get(name)
            _prove(same is not None and same.shape == rule.shape, "tensor {} is another one on rank {}", name, rank)
            for piece in same.pieces if same else ():
                times[piece.source] += piece.times
                if piece.is_counted:
                    counted.append((rank, piece.source))
        _prove_partition(name, rule.shape, counted)
        held = {box for _, box in counted}
        _prove(held.issuperset(times), "tensor {}: a copy is of no box that is counted", name)
        _prove(set(times.values()) <= {1}, "tensor {}: its holders do not know how many they are", name)
    for table in maps[1:]:
        _prove(table.rules_by_name.keys() == maps[0].rules_by_name.keys(), "the ranks have different tensors")


def _by_name(rules: Iterable[WeightRule], others: Mapping[str, WeightRule]) -> dict[str, WeightRule]:
    found: dict[str, WeightRule] = {}
    for rule in rules:
        name = rule.hf_name
        _prove(name not in found and name not in others, "tensor {} has two rules", name)
        found[name] = rule
    return found


def _prove_parameters(params: Mapping[str, ParamSpec], rules: Iterable[WeightRule], is_shard: bool) -> None:
    boxes: dict[str, list[tuple[object, Box]]] = {
        name: [("padding", box) for box in spec.padding] for name, spec in params.items()
    }
    for rule in rules:
        name, shape = rule.hf_name, rule.shape
        _prove(is_shard or bool(rule.pieces), "tensor {} {} goes nowhere", name, shape)
        for piece in rule.pieces:
            _prove(piece.param in params, "tensor {} {} maps to {}, which is not a parameter", name, shape, piece.param)
            is_fit = piece.is_consistent and piece.source.is_inside(shape)
            source, target = piece.source, piece.target
            _prove(is_fit, "tensor {} {} does not fit {}: {} is no {}", name, shape, piece.param, source, target)
            boxes[piece.param].append((name, piece.target))
        dtypes = {params[piece.param].dtype for piece in rule.pieces}
        _prove(len(dtypes) <= 1, "tensor {} {} is in parameters of several dtypes", name, shape)
    for name, spec in params.items():
        _prove_partition(name, spec.shape, boxes[name])


def _prove_partition(what: str, shape: tuple[int, ...], boxes: list[tuple[object, Box]]) -> None:
    """The boxes, each with what it is called, lie inside `shape`, are disjoint and cover it."""
    if len(boxes) == 1 and boxes[0][1] == Box.whole(shape):
        return
    for name, box in boxes:
        _prove(box.is_inside(shape), "{} {}: {} of {} is not inside it", what, shape, box, name)
    overlap = find_overlap([box for _, box in boxes])
    if overlap is not None:
        first, second = (boxes[index] for index in overlap)
        _prove(False, "{} {}: {} of {} and {} of {} overlap", what, shape, first[1], first[0], second[1], second[0])
    num_left = math.prod(shape) - sum(box.num_elements for _, box in boxes)
    _prove(num_left == 0, "{} {}: {} elements are not covered", what, shape, num_left)


def _prove(holds: bool, otherwise: str, *values: object) -> None:
    """`otherwise` is formatted only where it is needed: maps have tens of thousands of tensors."""
    if not holds:
        raise InternalError(f"weight map: {otherwise.format(*values)}")
