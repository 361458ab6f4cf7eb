"""The tensors of a layer's experts, in both name worlds. Owns how they are cut; knows no models.

All experts of a layer are two parameters, [expert, gate rows then up rows, hidden] and [expert, hidden, intermediate].
Checkpoints list a tensor per expert and projection; the state dicts of newer transformers hold one for all experts, in
the same order or with the last two axes transposed.
"""

from __future__ import annotations

import msgspec

from headrace.weights.boxes import Box
from headrace.weights.shard import ONLY_RANK, Shard
from headrace.weights.weight_map import ParamSpec, Piece, WeightRule

_TRANSPOSED = (0, 2, 1)


class ExpertTensors(msgspec.Struct, frozen=True):
    """The experts of one layer: `prefix` in the checkpoint, as "model.layers.0.mlp.experts", and sizes. `whole_prefix`
    is that of the tensors that hold all of them, where it is another.

    `projections` are the names of gate, up and down. `experts` and `width` say which experts, and which part of their
    intermediate size, this rank holds.
    """

    prefix: str
    gate_up: str
    down: str
    num_experts: int
    hidden: int
    intermediate: int
    whole_prefix: str = ""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    experts: Shard = ONLY_RANK
    width: Shard = ONLY_RANK

    def params(self) -> list[ParamSpec]:
        """Both parameters, as large as this rank's share."""
        (_, num_held), (_, width), _, _ = self._held()
        return [
            ParamSpec(self.gate_up, (num_held, 2 * width, self.hidden)),
            ParamSpec(self.down, (num_held, self.hidden, width)),
        ]

    def one_by_one(self) -> list[WeightRule]:
        """The rules of a tensor per expert and projection. Of an expert on another rank nothing is held here."""
        (first, num_held), (start, width), counts, holders = self._held()
        gate, up, down = self.projections
        rules: list[WeightRule] = []
        for expert in range(self.num_experts):
            at, is_held = expert - first, first <= expert < first + num_held
            tall, wide = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
            source = Box((start, 0), (width, self.hidden))
            for name, row in ((gate, 0), (up, width)):
                piece = Piece(self.gate_up, source, Box((at, row, 0), (1, *source.shape)), (), counts, holders)
                rules.append(WeightRule(self._name(expert, name), tall, (piece,) if is_held else ()))
            source = Box((0, start), (self.hidden, width))
            piece = Piece(self.down, source, Box((at, 0, 0), (1, *source.shape)), (), counts, holders)
            rules.append(WeightRule(self._name(expert, down), wide, (piece,) if is_held else ()))
        return rules

    def all_in_one(self, *, is_transposed: bool = False) -> list[WeightRule]:
        """The rules of `gate_up_proj` and `down_proj`; `is_transposed`: [expert, in, out], not [expert, out, in]."""
        (first, num_held), (start, width), counts, holders = self._held()
        halves = []
        for number in (0, 1):
            source = Box((first, number * self.intermediate + start, 0), (num_held, width, self.hidden))
            halves.append((source, Box((0, number * width, 0), source.shape)))
        source = Box((first, 0, start), (num_held, self.hidden, width))
        gate_up_shape = (self.num_experts, 2 * self.intermediate, self.hidden)
        down_shape = (self.num_experts, self.hidden, self.intermediate)

        def rule(name: str, param: str, shape: tuple[int, ...], boxes: list[tuple[Box, Box]]) -> WeightRule:
            axes = _TRANSPOSED if is_transposed else ()
            turned = [(_transposed(source, axes), target) for source, target in boxes]
            pieces = [Piece(param, source, target, axes, counts, holders) for source, target in turned]
            prefix = self.whole_prefix or self.prefix
            return WeightRule(f"{prefix}.{name}", tuple(shape[axis] for axis in axes or (0, 1, 2)), tuple(pieces))

        return [
            rule("gate_up_proj", self.gate_up, gate_up_shape, halves),
            rule("down_proj", self.down, down_shape, [(source, Box.whole(source.shape))]),
        ]

    def _name(self, expert: int, projection: str) -> str:
        return f"{self.prefix}.{expert}.{projection}.weight"

    def _held(self) -> tuple[tuple[int, int], tuple[int, int], bool, int]:
        """First and number of the experts, and of the columns of each, held here; whether they count, and how many
        ranks hold them."""
        experts, is_first = self.experts.part((self.num_experts,), 0)
        width, counts = self.width.part((self.intermediate,), 0)
        num_holders = self.experts.num_holders(self.num_experts) * self.width.num_holders(self.intermediate)
        bounds = (experts.start[0], experts.shape[0]), (width.start[0], width.shape[0])
        return *bounds, is_first and counts, num_holders


def _transposed(box: Box, axes: tuple[int, ...]) -> Box:
    if not axes:
        return box
    return Box(tuple(box.start[axis] for axis in axes), tuple(box.shape[axis] for axis in axes))
