"""The memory side of one open update. Owns its shadow memory, what has arrived, and the comparison of tied tensors.
Must not know live memory: it is told what is."""

from __future__ import annotations

import torch

from headrace.types.errors import UpdateConflictError, WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights.session import ResolvedMode, StagedSet
from headrace.weights.staging import Arrival
from headrace.weights.weight_map import ManifestPlan

Memories = dict[str, list[torch.Tensor]]
"""By tensor, memory for each of its pieces, of the shape of the piece's target."""


class Transaction:
    """An open update: where each tensor goes, what has arrived, and what tied tensors must equal."""

    def __init__(self, plan: ManifestPlan, shadow: Memories | None) -> None:
        self.plan = plan
        self.mode: ResolvedMode = "inplace" if shadow is None else "shadow"
        self.staged = StagedSet(plan.manifest)
        self.is_open = True
        self.has_written = False
        self.shadow = shadow or {}
        self.digests: dict[str, str] = {}
        self.arrivals: dict[int, Arrival] = {}  # tensors of which some pieces are in place, and none is under way

    def before_write(self, is_live: bool) -> None:
        if not self.is_open:
            raise UpdateConflictError("the update this tensor belongs to is no longer open")
        self.has_written = self.has_written or is_live

    def finish(self, index: int, info: TensorInfo, digest: str) -> None:
        """Check one whole tensor and count it. `WeightUpdateError` naming it, and then it does not count."""
        if info.digest and digest != info.digest:
            raise WeightUpdateError(
                f"{info.name} arrived with digest {digest}, the manifest says {info.digest}", field=info.name
            )
        if info.name in self.plan.compared:
            self._check_tied(info.name, digest)
        self.staged.mark(index)
        if digest:
            self.digests[info.name] = digest

    def forget(self, index: int) -> list[int]:
        """Count a tensor no longer, nor the one that it is tied to: they are compared when they come again."""
        name, forgotten = self.staged.manifest[index].name, [index]
        if name in self.plan.compared:
            tied = {each for pair in self.plan.aliases.items() if name in pair for each in pair}
            forgotten = [at for at, info in enumerate(self.staged.manifest) if info.name in tied]
        for at in forgotten:
            self.staged.forget(at)
            self.digests.pop(self.staged.manifest[at].name, None)
        return forgotten

    def _check_tied(self, name: str, digest: str) -> None:
        for alias, target in self.plan.aliases.items():
            other = {alias: target, target: alias}.get(name)
            if other and self.digests.get(other, digest) != digest:
                raise WeightUpdateError(f"{alias} is tied to {target} and must hold the same values", field=alias)
