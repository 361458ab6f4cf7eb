"""The live parameters of one rank, and the memory side of a weight update.

Owns live parameter memory (its addresses never change), and shadow memory while an update is open. Reads everything
through one `WeightMap`. Must not know states, versions, deadlines or requests (`headrace.weights.session`), files
(`headrace.weights.checkpoint`) or what a parameter is used for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import torch

from headrace.ipc import SharedBuffer
from headrace.parallel.device_sharing import readable_devices
from headrace.types.errors import InternalError, NotFoundError, UpdateConflictError, WeightUpdateError
from headrace.types.foreign import Payload
from headrace.types.weights import BufferEntry, BufferRef, DeviceRef, TensorInfo, UpdateMode
from headrace.weights.arriving import Arriving, together
from headrace.weights.device_staging import DeviceCopies
from headrace.weights.foreign_memory import ForeignMemory
from headrace.weights.live_reading import Digests, bytes_in_slices, digests_in_slices
from headrace.weights.memory import Copies, ResolvedMode, StageBuffer, StageCopy, StagePiece, one_by_one
from headrace.weights.move_plan import MovePlan
from headrace.weights.open_plan import OpenPlan
from headrace.weights.position_sum import PositionKeys
from headrace.weights.region import Region
from headrace.weights.shadow import Memories, ShadowMemory, Twin, memory_left
from headrace.weights.stage_buffers import DeviceBuffers
from headrace.weights.staging import (
    TORCH_DTYPES,
    Enqueued,
    SideReader,
    SideStream,
    TensorData,
    dtype_name,
)
from headrace.weights.transaction import Transaction
from headrace.weights.weight_map import FLOAT_DTYPES, ManifestPlan, WeightMap, WeightRule
from headrace.weights.whole_models import fill_initial, fill_normal, load_checkpoint

Allocate = Callable[[Sequence[tuple[tuple[int, ...], torch.dtype]]], tuple[list[torch.Tensor], Twin | None]]
"""Tensors of these shapes and dtypes, all at once, and their twin where they may have one."""


class WeightStore:
    """Parameters on one device: `live[param]` are the tensors the model holds, in `dtype` unless the map says another.

    `memory` says how many bytes may still be taken there; None: what the device or the machine has left. `allocate`
    makes the parameters; memory that it takes away and brings again must then be zero, or hold what it held. With
    `check_finite` no tensor that holds NaN or infinity, once it is in its parameter's dtype, is taken in.
    """

    def __init__(
        self,
        weight_map: WeightMap,
        dtype: torch.dtype,
        device: torch.device,
        *,
        memory: Callable[[], int] | None = None,
        allocate: Allocate | None = None,
        check_finite: bool = True,
    ) -> None:
        if dtype_name(dtype) not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype}")
        self.weight_map = weight_map
        self.dtype = dtype
        self.device = device
        specs = (*weight_map.params.values(), *(each.parameter for each in weight_map.derived))
        shapes = [(spec.shape, TORCH_DTYPES.get(spec.dtype, dtype)) for spec in specs]
        made = allocate(shapes) if allocate else ([torch.empty(s, dtype=d, device=device) for s, d in shapes], None)
        tensors, twin = made
        self.live: dict[str, torch.Tensor] = {spec.name: each for spec, each in zip(specs, tensors, strict=True)}
        self._zero_padding(self.live)
        self._regions: dict[str, Region] = {}
        self._plan: ManifestPlan | None = None
        self._parts: OpenPlan | None = None
        self._moves = MovePlan()  # of the last command that has one
        self._check_finite = check_finite
        self._shadow = ShadowMemory(self.live, twin, memory or memory_left(device))
        self._transaction: Transaction | None = None
        self._side = SideStream(device)
        self._buffers = DeviceBuffers(device, self._side.settle) if device.type == "cuda" else None
        self._side_reader: SideReader | None = None

    def close(self) -> None:
        """Give live and shadow memory back. Nothing may be asked of the store afterwards."""
        self._transaction = None
        if self._buffers is not None:
            self._buffers.end()
        self._shadow.end()
        self._regions.clear()
        self.live.clear()

    # Whole models: from a file, from a seed, to nothing.

    def load(self, source: Iterable[tuple[str, TensorData]]) -> None:
        """As `load_in_slices`, at once."""
        for _ in self.load_in_slices(source):
            pass

    def load_in_slices(self, source: Iterable[tuple[str, TensorData]]) -> Iterator[None]:
        """Overwrite live memory with a whole checkpoint, resting after each tensor. Raises as `load_checkpoint`; there
        are no weights then."""
        self._require_no_update()
        yield from load_checkpoint(self.weight_map, self._region, source, check_finite=self._check_finite)
        self._derive()

    def fill_random(self, seed: int) -> None:
        """Random weights for tests and dummy models, as `fill_initial` makes them."""
        self._require_no_update()
        fill_initial(self.weight_map, self._region, seed)
        self._derive()

    def load_parameters_in_slices(self, source: Iterable[tuple[str, TensorData]]) -> Iterator[None]:
        """As `load_in_slices`, of parameters as they lie, by their names."""
        self._require_no_update()
        names = self.weight_map.of_parameters()
        yield from load_checkpoint(names, self._parameter, source, check_finite=self._check_finite)
        self._zero_padding(self.live)
        self._derive()

    def scramble(self, seed: int) -> None:
        """Overwrite all live memory with noise, as SGLang's `reset_tensors` check does."""
        self._require_no_update()
        fill_normal(self.weight_map, self._region, seed)
        self._derive()

    # The transaction.

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode:
        """Check the whole manifest and open an update; returns what `mode` became. On an error nothing has changed.

        Raises `UpdateConflictError` if one is open; `WeightUpdateError` for a bad manifest (naming each tensor), and
        for a shadow that does not fit in memory.
        """
        self._check_begin(mode)
        plan = self._plan
        if plan is None or plan.partial != partial or plan.given != tuple(manifest):
            plan = self._plan = self.weight_map.plan(manifest, partial)
        self._open_shadow(mode, partial)
        shadow = self._shadows(mode, plan.rules)
        self._transaction = self._new_transaction("inplace" if shadow is None else "shadow")
        self._transaction.add(plan, shadow)
        self._side.begin()
        return self._transaction.mode

    def begin_open(self, mode: UpdateMode, partial: bool) -> ResolvedMode:
        """Open an update whose manifest comes in parts, by `extend`; returns what `mode` became, for which the size of
        the whole model counts. Raises as `begin`."""
        self._check_begin(mode)
        num_bytes = sum(self.live[name].nbytes for name in self.weight_map.params)
        self._open_shadow(mode, partial)
        has_room = mode != "inplace" and self._shadow.has_room(num_bytes)
        if mode == "shadow" and not (has_room or partial):
            raise self._shadow.no_room(num_bytes)
        if self._parts is None or self._parts.partial != partial:
            self._parts = OpenPlan(self.weight_map, partial)
        self._parts.restart()
        self._transaction = self._new_transaction("shadow" if has_room or mode == "shadow" else "inplace", self._parts)
        return self._transaction.mode

    def extend(self, manifest: Sequence[TensorInfo]) -> int:
        """More tensors of an open-ended update; returns how many the map still lacks. On an error nothing has changed.

        Raises `WeightUpdateError` naming each tensor that is unknown, doubled or misshapen, and for a shadow of them
        that does not fit in memory.
        """
        transaction, parts = self._require_parts()
        plan = parts.plan(manifest)
        shadow = self._shadows(transaction.mode, plan.rules)
        parts.take()
        transaction.add(plan, shadow)
        self._side.begin()
        return parts.num_missing

    def missing(self) -> list[str]:
        """The tensors that an open-ended update still lacks."""
        return self.weight_map.missing(self._require_parts()[0].names)

    def _new_transaction(self, mode: ResolvedMode, parts: OpenPlan | None = None) -> Transaction:
        return Transaction(mode, parts, is_shard=self.weight_map.is_shard)

    def take_sum(self, index: int) -> str:
        """Of a tensor that is whole and whose manifest has a digest, this rank's part of it: `add_digests` makes one of
        all ranks'. Else ""."""
        transaction = self._require_update()
        return transaction.parts_of_sums.pop(transaction.manifest[index].name, "")

    def _check_begin(self, mode: UpdateMode) -> None:
        self._require_no_update()
        self.let_go(math.inf)
        if mode not in ("auto", "shadow", "inplace"):
            raise WeightUpdateError(f"mode must be auto, shadow or inplace, got {mode!r}", field="mode")

    def _open_shadow(self, mode: UpdateMode, partial: bool) -> None:
        if mode != "inplace" and (beside := self._shadow.open(partial=partial)):
            with self._side.enqueuing():  # all else of them the update brings, or it is derived
                self._zero_padding(beside)

    def _shadows(self, mode: UpdateMode, rules: Sequence[WeightRule]) -> Memories | None:
        """Memory beside the live weights; None: the update writes in place."""
        if mode == "inplace":
            return None
        return self._shadow.memories(rules, lambda name: self._region(name).memories, is_needed=mode == "shadow")

    def stage(self, index: int, data: memoryview | TensorData, start: int | None = None) -> StageCopy:
        """As `Arriving.one`; nothing is written before `advance`."""
        return self._arriving().one(index, data, start)

    def stage_pieces(self, pieces: Iterator[StagePiece]) -> Copies:
        """The work of moving pieces in a buffer into place: on a device, many of them at once."""
        return one_by_one(self.stage, pieces) if self._buffers is None else together(partial(self.stage_all, pieces))

    def stage_arrived(self, tensors: Sequence[StagePiece]) -> Copies:
        """As `Arriving.arrived`."""
        return self._arriving().arrived(tensors)

    def stage_all(self, pieces: Iterator[StagePiece]) -> DeviceCopies:
        """As `stage`, of pieces whose `data`, uint8 [size] on the device or pinned, is read until it is done."""
        return self._arriving().all(pieces)

    def moves(
        self, entries: Sequence[BufferEntry], ref: BufferRef | DeviceRef, *, are_right: bool
    ) -> Callable[[StageBuffer], Copies] | None:
        """As `WeightMachine.moves`, of an update of which nothing is staged."""
        arriving = self._arriving()
        if isinstance(ref, BufferRef) or self._plan is None or not arriving.writes_live:
            return None
        if not self._moves.fits(self._plan, entries, ref):
            plan = arriving.move_plan(self._plan, entries, ref) if are_right else None
            if plan is None:
                return None
            self._moves = plan
        return partial(arriving.moved, self._moves)

    def _arriving(self) -> Arriving:
        update = self._require_update()
        return Arriving(
            update,
            self.weight_map,
            self._region,
            self._side,
            self.sum_keys,
            check_finite=self._check_finite,
            on_device=self._buffers is not None,
        )

    @property
    def device_ids(self) -> tuple[str, ...]:
        """The UUIDs of the device that the parameters are on and of those that it can read; none of a CPU."""
        return readable_devices(self.device) if self.device.type == "cuda" else ()

    def open_buffer(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        """A buffer of the open update to stage from. Raises `RequestError` or `UnavailableError`."""
        return SharedBuffer.open(ref) if self._buffers is None else self._buffers.open(ref)

    def open_payload(self, payload: Payload) -> ForeignMemory:
        """What another engine's client shares, to be staged until that is closed. `WeightUpdateError` without it."""
        with self._side.using():  # on a device the sender is waited for where it is copied
            return ForeignMemory(payload)

    def forget(self, index: int) -> list[int]:
        """Manifest entry `index` is to be staged again. Returns what has to be now: it, and the one that was compared
        with it because they are tied."""
        return self._require_update().forget(index)

    def commit(self) -> Enqueued:
        """Make what was staged live; then the update is over. One that fails half-way leaves a mix, and is open."""
        transaction = self._require_update()
        self._side.settle()
        if not self._shadow.exchange():
            for name, memories in transaction.shadow.items():
                for live, staged in zip(self._region(name).memories, memories, strict=True):
                    live.copy_(staged)
        self._derive()
        return Enqueued(self.device, self.abort)

    def abort(self) -> None:
        """End the open update and drop what was not made live. What was written in place stays."""
        transaction = self._require_update()
        self._side.settle()  # copies that are under way write to what is given back here
        transaction.is_open = False
        transaction.shadow.clear()
        self._shadow.close()
        self._transaction = None
        if self._buffers is not None:
            self._buffers.close()

    def let_go(self, budget_s: float) -> bool:
        """After an update: unmap, for about so long, what it was staged from. False when nothing is left to be."""
        return self._buffers is not None and self._buffers.let_go(budget_s)

    def _derive(self) -> None:
        """Compute what is derived from the parameters as they are now, into the memory that it has."""
        for each in self.weight_map.derived:
            value = each.function(*(self.live[name] for name in each.inputs))
            if tuple(value.shape) != each.parameter.shape:
                raise InternalError(f"{each.parameter.name} is derived with shape {tuple(value.shape)}")
            self.live[each.parameter.name].copy_(value)

    # Reading live memory.

    def digest(self) -> dict[str, str]:
        """The `position_sum` of live memory now, per HF tensor (no aliases); on one of several ranks its part of it."""
        return dict(filter(None, self.digest_in_slices()))

    def digest_in_slices(self, rank: int | None = None) -> Digests:
        """As `digest`, a slice at a time; with a `rank` of all that it holds, here on the only one."""
        rules, is_held = self.weight_map.rules_by_name, rank is not None
        regions = ((name, self._region(name)) for name in rules if rules[name].pieces or not is_held)
        yield from digests_in_slices(regions, self.sum_keys, self._begin_reading(), is_held=is_held)

    def parameters(self) -> tuple[tuple[TensorInfo, ...], ...]:
        """Those of each rank, which is this one."""
        return (tuple(self.info(name, 0) for name in self.weight_map.params),)

    def info(self, name: str, rank: int | None = None) -> TensorInfo:
        """What `name` is, a tensor or with a `rank` a parameter, in its memory's dtype. `NotFoundError` naming it."""
        region = self._region(name) if rank is None else self._parameter(name, rank)
        return TensorInfo(name, region.shape, dtype_name(region.dtype))

    def copy_in_slices(self, name: str, start: int, into: memoryview, rank: int | None = None) -> Iterator[None]:
        """Fill `into` with the bytes of a live tensor, or parameter, from byte `start` on, a block at a time."""
        reader = self._begin_reading()
        region = self._region(name) if rank is None else self._parameter(name, rank)
        yield from bytes_in_slices(region, start, into, reader)

    def _begin_reading(self) -> SideReader:
        self._side_reader = self._side_reader or SideReader(self.device)
        self._side_reader.begin()
        return self._side_reader

    @cached_property
    def sum_keys(self) -> PositionKeys:
        """What sums of tensors are made with, on this device."""
        return PositionKeys(self.device)

    def read(self, name: str) -> torch.Tensor:
        """A CPU copy of one live tensor in HF shape, its memory's dtype; a tied name reads what it is tied to."""
        region = self._region(name)
        return region.read(slice(0, region.num_elements)).view(region.shape).detach().to("cpu", copy=True)

    def _region(self, name: str) -> Region:
        """The live memory of a tensor, or of what it is tied to. Raises `NotFoundError` naming it."""
        region = self._regions.get(name)
        if region is None:
            rule = self.weight_map.rule_of(name)
            if rule is None:
                raise NotFoundError(f"{name} is not a tensor of this model", field="name")
            memories = [self.live[piece.param][piece.target.slices] for piece in rule.pieces]
            dtype = memories[0].dtype if memories else self.dtype
            region = self._regions[name] = Region(rule.shape, rule.pieces, memories, dtype, self.device)
        return region

    def _parameter(self, name: str, rank: int = 0) -> Region:
        """A parameter as it lies, here on the only rank. Raises `NotFoundError` naming it."""
        if rank or name not in self.weight_map.params:
            raise NotFoundError(f"{name} is not a parameter of rank {rank}", field="name")
        return Region.of_memory(name, self.live[name])

    def _zero_padding(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, spec in self.weight_map.params.items():
            for box in spec.padding:
                parameters[name][box.slices].zero_()

    def _require_no_update(self) -> None:
        if self._transaction:
            raise UpdateConflictError("a weight update is open; commit or abort it first", field="session_id")

    def _require_parts(self) -> tuple[Transaction, OpenPlan]:
        transaction = self._require_update()
        if transaction.parts is None:
            raise WeightUpdateError("the open update takes the tensors of its manifest only", field="manifest")
        return transaction, transaction.parts

    def _require_update(self) -> Transaction:
        if self._transaction is None:
            raise UpdateConflictError("no weight update is open", field="session_id")
        return self._transaction
