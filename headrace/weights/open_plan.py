"""The manifest of an open-ended update, which comes in parts: each is checked when it comes, beside those before it.

Owns what was found of the parts so far, and keeps it: the next update in the same parts is not planned again. What a
part costs depends on its own tensors only. Must not know tensors, memory or sessions (no torch).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.types.weights import TensorInfo
from headrace.weights.weight_map import ManifestPlan, WeightMap, refuse_manifest


class OpenPlan:
    """The parts of an update that is open, and behind them those of the last one, for as long as they are the same."""

    def __init__(self, weight_map: WeightMap, partial: bool) -> None:
        self.partial = partial
        self._map = weight_map
        self._parts: list[tuple[ManifestPlan, int]] = []  # with the number of tensors missing after it
        self._num_used = 0
        self._known = _Known(weight_map, partial)  # of all parts

    @property
    def num_missing(self) -> int:
        """Tensors of the map that no part of this update has named."""
        return self._parts[self._num_used - 1][1] if self._num_used else self._map.num_needed

    def restart(self) -> None:
        """Another update begins; the parts of the last one are known."""
        self._num_used = 0

    def plan(self, given: Sequence[TensorInfo]) -> ManifestPlan:
        """What the next part does; it counts once it is `take`n. `WeightUpdateError` naming every unknown, doubled,
        misshapen or non-float tensor."""
        if self._num_used < len(self._parts):
            planned = self._parts[self._num_used][0]
            if planned.given == tuple(given):
                return planned
            del self._parts[self._num_used :]
            self._known = _Known(self._map, self.partial)
            for kept, _ in self._parts:
                self._known.plan(kept.given)
        planned = self._known.plan(tuple(given))
        self._parts.append((planned, self._known.num_missing))
        return planned

    def take(self) -> None:
        """The part planned last belongs to the update."""
        self._num_used += 1


class _Known:
    """What is known of the tensors named so far.

    Tied names are one tensor: the first that comes goes by the name of what is in memory, and the next by the name that
    is left, to be compared with it. In a partial update, as in one whose manifest comes first, a name keeps its place:
    one that repeats another is compared with what is live.
    """

    def __init__(self, weight_map: WeightMap, partial: bool) -> None:
        self.num_missing = weight_map.num_needed
        self._map = weight_map
        self._partial = partial
        self._tied = weight_map.aliases.keys() | set(weight_map.aliases.values())
        self._given: set[str] = set()
        self._placed: set[str] = set()  # tied names that are taken in the update
        self._stand_ins: dict[str, str] = {}  # of those that were taken by another: its name, which is left
        self._alone: set[str] = set()  # what a tied name in a partial update is compared with, as it is live
        self._has_other_names: dict[str, bool] = {}  # of parameters named so far that have two sets of names

    def plan(self, given: tuple[TensorInfo, ...]) -> ManifestPlan:
        """Check a part, and note it if it is right."""
        names: set[str] = set()
        worlds: dict[str, bool] = {}
        problems: list[tuple[str, str]] = []
        for info in given:
            text = self._problem(info, names, worlds)
            if text:
                problems.append((info.name, text))
            names.add(info.name)
        refuse_manifest(problems)
        tied = names & self._tied
        manifest = tuple(self._by_place(info, names) if info.name in tied else info for info in given)
        aliases = {info.name: self._map.aliases[info.name] for info in manifest if info.name in self._map.aliases}
        rules = tuple(rule for info in manifest if info.name not in aliases and (rule := self._map.rule_of(info.name)))
        self._note(given, worlds)
        self.num_missing -= sum(bool(rule.pieces) for rule in rules)
        placed = frozenset(info.name for info in manifest)
        return ManifestPlan(given, self._partial, manifest, placed, rules, aliases, placed & self._tied)

    def _problem(self, info: TensorInfo, names: set[str], worlds: dict[str, bool]) -> str:
        """Why a tensor of a part cannot be taken; `worlds` is where its parameters go by another set of names."""
        text = self._map.problem_of(info, self._given if info.name in self._given else names)
        if text:
            return text
        if info.name in self._alone:
            return f"{info.name} comes after a name that is tied to it: in a partial update name it first, or with that"
        rule = self._map.rule_of(info.name)
        is_other = info.name in self._map.other_rules
        for param in {piece.param for piece in rule.pieces} if rule else ():
            if param in self._map.first_names:
                has_other = self._has_other_names.get(param, worlds.setdefault(param, is_other))
                if has_other != is_other:
                    return f"{info.name} is sent under another name too: {param} would be filled twice"
        return ""

    def _by_place(self, info: TensorInfo, names: set[str]) -> TensorInfo:
        """A tied tensor under the name that its place in the update has."""
        name = info.name
        target = self._map.aliases.get(name, name)
        if self._partial:
            if target not in self._given and target not in names:
                self._alone.add(target)
        elif target not in self._placed:
            self._stand_ins[target] = info.name
            name = target
        elif name in self._placed:
            name = self._stand_ins[name]
        self._placed.add(name)
        return msgspec.structs.replace(info, name=name)

    def _note(self, given: tuple[TensorInfo, ...], worlds: dict[str, bool]) -> None:
        self._given.update(info.name for info in given)
        replaced = [param for param, is_other in worlds.items() if is_other and param not in self._has_other_names]
        self._has_other_names.update(worlds)
        for param in replaced:
            self.num_missing += len(self._map.other_names[param]) - len(self._map.first_names[param])
