"""An open update as the front has it: its manifest, what may be staged, and what has been. Knows nothing of buffers or
calls."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import msgspec

from headrace.engine.held_tensors import HeldTensors
from headrace.engine.tensors import NamedTensors, describe, named_pairs
from headrace.engine.upload_buffers import aligned
from headrace.types.errors import UpdateConflictError, WeightUpdateError
from headrace.types.plain_values import as_list, plain_text
from headrace.types.weights import MAX_DIMENSIONS, MAX_TENSORS, TensorInfo, name_problem, shape_problem
from headrace.weights.weight_map import is_recomputed

Manifest = Iterable[TensorInfo | tuple[str, Iterable[int], str]]

_OPEN_PART_BYTES = 64 << 20
"""What one whose tensors nobody has listed takes as its largest part."""


class UpdateSession:
    """An open update. `mode` is what "auto" became; `manifest` is what may be staged, each entry once.

    One that is open-ended grows by `Updater.extend`, and `num_missing` tensors of the model are in no part of it yet.
    Of one that `is_open` no manifest was given: what is staged is announced as it comes, by one `stage` call at a time,
    and one in place may have written some when another is refused.
    """

    def __init__(
        self,
        session_id: int,
        version: str,
        mode: str,
        manifest: tuple[TensorInfo, ...],
        timeout_s: float,
        is_partial: bool = False,
        *,
        is_open: bool = False,
        dtype: str = "",
        num_ranks: int = 1,
    ) -> None:
        """`dtype` is the engine's, and `num_ranks` how many it has."""
        self.session_id = session_id
        self.version = version
        self.mode = mode
        self.manifest: list[TensorInfo] = []
        self.timeout_s = timeout_s
        self.is_partial = is_partial
        self.dtype = dtype
        self.num_ranks = num_ranks
        self.num_missing = 0
        self.num_bytes_staged = 0
        self.begun_at = time.monotonic()
        self.roads = set[str]()
        """By which tensors of it have come, in words."""
        self.num_calls = 0  # in progress, of one that is joined from calls
        self._max_part_bytes = _OPEN_PART_BYTES if is_open else 0  # in upload buffers
        self._is_open = is_open
        self._num_known = 0  # of the manifest, to the core
        self._new_parts: list[tuple[TensorInfo, ...]] = []
        self._indices: dict[str, int] = {}
        self._sent: set[int] = set()
        self._settled: set[int] = set()
        self.grow(manifest)

    def grow(self, manifest: tuple[TensorInfo, ...]) -> None:
        """These are in the manifest as well, as the core knows."""
        self._add(manifest)
        self._num_known = len(self.manifest)
        self._new_parts.append(manifest)

    @property
    def max_part_bytes(self) -> int:
        """What the largest part needs in upload buffers."""
        for part in self._new_parts:
            self._max_part_bytes = max(self._max_part_bytes, sum(aligned(info.num_bytes) for info in part))
        self._new_parts.clear()
        return self._max_part_bytes

    def unannounced(self) -> tuple[TensorInfo, ...]:
        """What was staged of one that `is_open`, and the core has not heard of; it is told of it next."""
        return tuple(self.manifest[self._num_known :])

    def settle_announced(self, first: int | None) -> None:
        """The core has taken those at `first`, or with None refused them: then they are in no manifest."""
        if first is None:
            for info in self.unannounced():
                del self._indices[info.name]
            del self.manifest[self._num_known :]
        elif first != self._num_known:
            message = f"session {self.session_id} was extended by others, too"
            raise UpdateConflictError(message, field="session_id")
        self._num_known = len(self.manifest)

    def _add(self, manifest: tuple[TensorInfo, ...]) -> None:
        first = len(self.manifest)
        self._indices.update((info.name, index) for index, info in enumerate(manifest, first))
        self.manifest += manifest

    def __contains__(self, name: object) -> bool:
        """A tensor of that name is in the manifest."""
        return name in self._indices

    def replaces(self, index: int) -> bool:
        """The tensor may have been staged, by a call that has not succeeded."""
        return index in self._sent and index not in self._settled

    def note_sent(self, indices: set[int], *, is_settled: bool) -> None:
        """These were sent by a call that is over; `is_settled` if it succeeded, and they are staged for good."""
        self._sent |= indices
        if is_settled:
            self._settled |= indices

    def unsettle(self, indices: Iterable[int]) -> None:
        """These come again, and replace what has come."""
        self._settled.difference_update(indices)

    @property
    def is_staged(self) -> bool:
        """All of the manifest has been staged for good."""
        return len(self._settled) == len(self.manifest)

    def info_of(self, name: str) -> TensorInfo:
        """The manifest's entry of that name. Raises `WeightUpdateError` if there is none."""
        index = self._indices.get(name)
        if index is None:
            raise WeightUpdateError(f"{name} is not in this update's manifest", field=name)
        return self.manifest[index]

    def indexed(self, named_tensors: NamedTensors) -> Iterator[tuple[int, str, Any]]:
        """The tensors with their places in the manifest. Raises as `index_of`. What is held has been described."""
        if isinstance(named_tensors, HeldTensors):
            described = zip(named_tensors.manifest, named_tensors, strict=True)
            yield from ((self.index_of(info), *pair) for info, pair in described)
        else:
            yield from ((self.index_of(describe(*pair)), *pair) for pair in named_pairs(named_tensors))

    def index_of(self, info: TensorInfo) -> int:
        """The manifest's index of a tensor. Raises `WeightUpdateError` if it is not there as described."""
        if self._is_open and info.name not in self._indices:
            self._add((info,))
        meant = self.info_of(info.name)
        if (meant.shape, meant.dtype) != (info.shape, info.dtype):
            got, announced = f"{info.dtype} {list(info.shape)}", f"{meant.dtype} {list(meant.shape)}"
            raise WeightUpdateError(f"{info.name} is {got}, announced as {announced}", field=info.name)
        return self._indices[info.name]


def check_session(session: Any) -> None:
    """Refuse what `begin_update` did not return."""
    if not isinstance(session, UpdateSession):
        message = f"session must be what begin_update returned, not {type(session).__name__}"
        raise WeightUpdateError(message, field="session")


def manifest_of(entries: Manifest) -> tuple[TensorInfo, ...]:
    """A manifest from `TensorInfo`s or (name, shape, dtype name) triples. Raises `WeightUpdateError` for the rest.
    Buffers that every engine recomputes are left out, as `stage` leaves them out."""
    what = "a list of TensorInfo or (name, shape, dtype) entries"
    manifest: list[TensorInfo] = []
    for entry in as_list(entries, "manifest", what, MAX_TENSORS, refusal=WeightUpdateError, takes_sets=True):
        try:
            fields = msgspec.structs.astuple(entry) if isinstance(entry, TensorInfo) else (*entry, "")
            name, shape, dtype, digest = fields
            sizes = tuple(int(size) for size in islice(shape, MAX_DIMENSIONS + 1))
            name, dtype, digest = map(plain_text, (name, dtype, digest))
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor without a value
            raise WeightUpdateError(f"manifest must be {what}", field="manifest") from None
        info = TensorInfo(str(name), sizes, str(dtype).removeprefix("torch."), str(digest))
        for text in (info.name, info.dtype, info.digest):
            if problem := name_problem(text):
                raise WeightUpdateError(f"manifest: entry {len(manifest)}: {problem}", field="manifest")
        problem = shape_problem(sizes)
        if problem:
            raise WeightUpdateError(f"manifest: {info.name} {problem}", field=info.name)
        manifest.append(info)
    return tuple(info for info in manifest if not is_recomputed(info.name))
