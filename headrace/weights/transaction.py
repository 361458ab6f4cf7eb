"""What one rank has of an open update. Owns its shadow memory, tensors half arrived, and the comparison of tied ones.
Must not know live memory, or what is staged (`headrace.weights.session`)."""

from __future__ import annotations

import torch

from headrace.types.errors import UpdateConflictError, WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights.session import ResolvedMode
from headrace.weights.staging import Arrival
from headrace.weights.weight_map import ManifestPlan

Memories = dict[str, list[torch.Tensor]]
"""By tensor, memory for each of its pieces, of the shape of the piece's target."""


class Transaction:
    """An open update: where each tensor goes, what has arrived, and what tied tensors must equal."""

    def __init__(self, plan: ManifestPlan, shadow: Memories | None) -> None:
        self.plan = plan
        self.mode: ResolvedMode = "inplace" if shadow is None else "shadow"
        self.is_open = True
        self.shadow = shadow or {}
        self.totals: dict[str, str] = {}  # of tensors that are compared
        self.arrivals: dict[int, Arrival] = {}  # tensors of which some pieces are in place, and none is under way

    def require_open(self) -> None:
        """`UpdateConflictError` once it is not: a copy that is left over must not write."""
        if not self.is_open:
            raise UpdateConflictError("the update this tensor belongs to is no longer open")

    def finish(self, info: TensorInfo, arrival: Arrival) -> None:
        """Check one whole tensor. `WeightUpdateError` naming it."""
        total = arrival.sums[0][1].hexdigest() if arrival.sums else ""
        digest = arrival.hasher.hexdigest() if arrival.hasher else total
        if info.digest and digest != info.digest:
            raise WeightUpdateError(
                f"{info.name} arrived with digest {digest}, the manifest says {info.digest}", field=info.name
            )
        if info.name in self.plan.compared:
            self._check_tied(info.name, total)
            self.totals[info.name] = total

    def forget(self, index: int) -> list[int]:
        """What is to come again with a tensor: itself, and if it was compared, what it is tied to."""
        name = self.plan.manifest[index].name
        if name not in self.plan.compared or name not in self.totals:
            return [index]
        tied = {each for pair in self.plan.aliases.items() if name in pair for each in pair}
        for each in tied:
            self.totals.pop(each, None)
        return [at for at, info in enumerate(self.plan.manifest) if info.name in tied]

    def _check_tied(self, name: str, total: str) -> None:
        for alias, target in self.plan.aliases.items():
            other = {alias: target, target: alias}.get(name)
            if other and self.totals.get(other, total) != total:
                raise WeightUpdateError(f"{alias} is tied to {target} and must hold the same values", field=alias)
