"""What one rank has of an open update. Owns its shadow memory, tensors half arrived, and the comparison of tied ones.
Must not know which memory is live, or what is staged (`headrace.weights.session`)."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.types.errors import UpdateConflictError, WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights.memory import ResolvedMode
from headrace.weights.open_plan import OpenPlan
from headrace.weights.piece_slices import WholeTarget
from headrace.weights.position_sum import DIGEST_LENGTH, digest_of
from headrace.weights.region import Region, place_in
from headrace.weights.shadow import Memories
from headrace.weights.staging import TORCH_DTYPES, Arrival, dtype_name, not_finite
from headrace.weights.weight_map import ManifestPlan


class Transaction:
    """An open update: where each tensor goes, what has arrived, and what tied tensors must equal. `parts` are those of
    one that is open-ended. `is_shard`: other ranks hold the rest of each tensor."""

    def __init__(self, mode: ResolvedMode, parts: OpenPlan | None = None, *, is_shard: bool = False) -> None:
        self.mode: ResolvedMode = mode
        self._is_shard = is_shard
        self.parts_of_sums: dict[str, str] = {}  # of tensors whose digest the sum over all ranks is held against
        self.parts = parts
        self.is_open = True
        self.manifest: list[TensorInfo] = []
        self.names: set[str] = set()
        self.shadow: Memories = {}
        self._aliases: dict[str, str] = {}
        self.compared: set[str] = set()
        self.totals: dict[str, str] = {}  # of tensors that are compared
        self.arrivals: dict[int, Arrival] = {}  # tensors of which some pieces are in place, and none is under way

    def add(self, plan: ManifestPlan, shadow: Memories | None) -> None:
        """What a manifest, or the next part of one, says is to come."""
        self.manifest += plan.manifest
        self.names |= plan.names
        self.shadow |= shadow or {}
        self._aliases |= plan.aliases
        self.compared |= plan.compared

    def require_open(self) -> None:
        """`UpdateConflictError` once it is not: a copy that is left over must not write."""
        if not self.is_open:
            raise UpdateConflictError("the update this tensor belongs to is no longer open")

    def finish(self, info: TensorInfo, arrival: Arrival) -> None:
        """Check one whole tensor. `WeightUpdateError` naming it."""
        total = arrival.sums[0][1].hexdigest() if arrival.sums else ""
        digest = arrival.hasher.hexdigest() if arrival.hasher else total
        if self._is_shard and info.digest and not arrival.hasher:
            self.parts_of_sums[info.name] = total
        else:
            check_digest(info, digest)
        if info.name in self.compared:
            self._check_tied(info.name, total)
            self.totals[info.name] = total

    @property
    def has_digests(self) -> bool:
        """What arrives is held against digests."""
        return any(info.digest for info in self.manifest)

    def whole_target(self, index: int, live: Region) -> WholeTarget | None:
        """Where a whole tensor of this device is only to be moved; None: more is to be done with it."""
        info, place = self.manifest[index], live.place
        if place is None or info.name in self.compared:
            return None
        if info.dtype != dtype_name(live.dtype) or (info.digest and not self._takes_sum(info.digest)):
            return None
        self.arrivals.pop(index, None)
        if self.mode == "inplace":
            return WholeTarget(place, is_live=True)
        return WholeTarget(place_in(self.shadow[info.name][0]), is_live=False)

    def _takes_sum(self, digest: str) -> bool:
        """A digest is compared with the sum of what is here alone."""
        return len(digest) <= DIGEST_LENGTH and not self._is_shard

    def take_moved(self, index: int, result: Sequence[int], *, check_finite: bool) -> None:
        """A tensor that was only moved is there. `WeightUpdateError` naming it if it is not what it is to be."""
        info = self.manifest[index]
        if check_finite and result[2]:
            raise WeightUpdateError(not_finite(info.name, TORCH_DTYPES[info.dtype]), field=info.name)
        if info.digest:
            check_digest(info, digest_of(result))

    def forget(self, index: int) -> list[int]:
        """What is to come again with a tensor: itself, and if it was compared, what it is tied to."""
        name = self.manifest[index].name
        if name not in self.compared or name not in self.totals:
            return [index]
        tied = {name, *(each for pair in self._aliases.items() if name in pair for each in pair)}
        for each in tied:
            self.totals.pop(each, None)
        return [at for at, info in enumerate(self.manifest) if info.name in tied]

    def _check_tied(self, name: str, total: str) -> None:
        for alias, target in self._aliases.items():
            other = {alias: target, target: alias}.get(name)
            if other and self.totals.get(other, total) != total:
                message = (
                    f"{alias} is tied to {target} by the engine's config.json and must hold the same values: for a "
                    "head of its own start the engine from a folder with tie_word_embeddings false"
                )
                raise WeightUpdateError(message, field=alias)


def check_digest(info: TensorInfo, digest: str) -> None:
    """`WeightUpdateError` if the manifest has another digest of a tensor."""
    if info.digest and digest != info.digest:
        message = f"{info.name} arrived with digest {digest}, the manifest says {info.digest}"
        raise WeightUpdateError(message, field=info.name)
