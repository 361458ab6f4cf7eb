"""A small model's weight map in several layouts, with checkpoints to match."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from headrace.types.weights import BufferEntry, BufferRef, DeviceRef, TensorInfo, UpdateMode
from headrace.weights.memory import Copies, ResolvedMode, StageBuffer, StageCopy, StagePiece, one_by_one
from headrace.weights.session import WeightMachine
from headrace.weights.staging import TORCH_DTYPES, Enqueued, StageWork, TensorData, dtype_name
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import ParamSpec, WeightMap, WeightRule, whole_rows

HIDDEN, HEADS, KV, FFN, VOCAB, LAYERS = 12, 16, 8, 20, 30, 2

Tensors = dict[str, torch.Tensor]


def make_map(*, fused: bool = True, tied: bool = False, bias: bool = True) -> WeightMap:
    """A decoder's names; `fused` puts q, k, v and gate, up into one parameter each, as engines do."""
    params: list[ParamSpec] = []
    rules: list[WeightRule] = []

    def group(param: str, columns: int | None, pieces: Sequence[tuple[str, int]], *, split: bool = False) -> None:
        start = 0
        for name, rows in pieces:
            shape = (rows,) if columns is None else (rows, columns)
            rules.append(whole_rows(name, name if split else param, 0 if split else start, shape))
            if split:
                params.append(ParamSpec(name, shape))
            start += rows
        if not split:
            params.append(ParamSpec(param, (start,) if columns is None else (start, columns)))

    group("embed", HIDDEN, [("model.embed_tokens.weight", VOCAB)])
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        sizes = (("q", HEADS), ("k", KV), ("v", KV))
        group(f"{layer}.qkv", HIDDEN, [(f"{attention}.{p}_proj.weight", n) for p, n in sizes], split=not fused)
        if bias:
            group(f"{layer}.qkv_bias", None, [(f"{attention}.{p}_proj.bias", n) for p, n in sizes], split=not fused)
        gate_up = [(f"{mlp}.{p}_proj.weight", FFN) for p in ("gate", "up")]
        group(f"{layer}.gate_up", HIDDEN, gate_up, split=not fused)
        group(f"{layer}.down", FFN, [(f"{mlp}.down_proj.weight", HIDDEN)])
        group(f"{layer}.norm", None, [(f"model.layers.{layer}.input_layernorm.weight", HIDDEN)])
    group("norm", None, [("model.norm.weight", HIDDEN)])
    if not tied:
        group("lm_head", HIDDEN, [("lm_head.weight", VOCAB)])
    return WeightMap(params, rules, {"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


LAYOUTS = [
    {"fused": fused, "tied": tied, "bias": bias}
    for fused in (False, True)
    for tied in (False, True)
    for bias in (False, True)
]


def make_tensors(weight_map: WeightMap, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rule.shape, generator=generator).to(dtype) for name, rule in weight_map.rules_by_name.items()
    }


class DrivenStore(WeightStore):
    """A store whose updates go through the state machine that drives it in a core."""

    def __init__(self, weight_map: WeightMap, dtype: torch.dtype, memory: int, check_finite: bool) -> None:
        super().__init__(weight_map, dtype, torch.device("cpu"), memory=lambda: memory, check_finite=check_finite)
        self.machine = WeightMachine(_Memory(self), has_weights=False)

    @property
    def state(self) -> str:
        return self.machine.state

    def load(self, source: Iterable[tuple[str, TensorData]]) -> None:
        self._lose()
        super().load(source)
        self.machine = WeightMachine(_Memory(self))

    def fill_random(self, seed: int) -> None:
        self._lose()
        super().fill_random(seed)
        self.machine = WeightMachine(_Memory(self))

    def scramble(self, seed: int) -> None:
        self._lose()
        super().scramble(seed)

    def _lose(self) -> None:
        if self.machine.session is None:
            self.machine.lose()

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode:
        return self.machine.begin("v", manifest, mode, now=0.0, timeout_s=1.0, partial=partial).mode

    def begin_open(self, mode: UpdateMode, partial: bool) -> ResolvedMode:
        begun = self.machine.begin("v", (), mode, now=0.0, timeout_s=1.0, partial=partial, is_open_ended=True)
        return begun.mode

    def extend(self, manifest: Sequence[TensorInfo]) -> int:
        self.machine.extend(self._session_id(), manifest, 0.0)
        assert self.machine.session is not None
        return self.machine.session.num_missing

    def stage(self, index: int, data: memoryview | TensorData, start: int | None = None) -> DrivenWork:  # type: ignore[override]
        return DrivenWork(self, index, data, start)

    def forget(self, index: int) -> list[int]:
        session, found = self.machine.session, super().forget(index)
        assert session is not None
        missing = session.staged.missing()
        found = [each for each in found if session.staged.manifest[each].name not in missing]
        for each in found:
            session.staged.forget(each)
        return found

    def commit(self) -> Enqueued:
        """Done at once, as on any CPU."""
        assert self.machine.commit(self._session_id())
        return Enqueued(self.device)

    def abort(self) -> None:
        self.machine.abort(self._session_id())

    def _session_id(self) -> int:
        self._require_update()
        assert self.machine.session is not None
        return self.machine.session.session_id


class DrivenWork:
    """The copy of a tensor, noted by the machine before it writes and when it is whole."""

    def __init__(self, store: DrivenStore, index: int, data: memoryview | TensorData, start: int | None) -> None:
        self._machine, self._session_id, self._index = store.machine, store._session_id(), index
        info = self._machine.check_stage(self._session_id, index, 0.0)
        self._work = self._machine.stage(self._session_id, index, data, start)
        assert isinstance(self._work, StageWork)
        total = torch.Size(info.shape).numel() * TORCH_DTYPES[info.dtype].itemsize
        self._is_last = not isinstance(data, memoryview) or (start or 0) + len(data) == total
        self._is_done = False

    @property
    def has_written(self) -> bool:
        return self._work.has_written

    def advance(self, budget_s: float) -> bool:
        if self._is_done:
            return True
        try:
            self._is_done = self._work.advance(budget_s)
        finally:
            is_open = self._machine.session is not None and self._machine.session.session_id == self._session_id
            if self.has_written and is_open:
                self._machine.note_write(self._session_id)
        if self._is_done and self._is_last:
            self._machine.mark_staged(self._session_id, [self._index], 0.0)
        return self._is_done


class _Memory:
    """What a machine drives: the store's own methods."""

    def __init__(self, store: DrivenStore) -> None:
        self._store = store

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode:
        return WeightStore.begin(self._store, manifest, mode, partial)

    def begin_open(self, mode: UpdateMode, partial: bool) -> ResolvedMode:
        return WeightStore.begin_open(self._store, mode, partial)

    def extend(self, manifest: Sequence[TensorInfo]) -> int:
        return WeightStore.extend(self._store, manifest)

    def missing(self) -> list[str]:
        return WeightStore.missing(self._store)

    def stage(self, index: int, data: memoryview | TensorData, start: int | None = None) -> StageCopy:
        return WeightStore.stage(self._store, index, data, start)

    @property
    def device_ids(self) -> tuple[str, ...]:
        return self._store.device_ids

    def open_buffer(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        return self._store.open_buffer(ref)

    def stage_arrived(self, tensors: Sequence[StagePiece]) -> Copies:
        return one_by_one(self.stage, iter(tensors))

    def stage_pieces(self, pieces: Iterator[StagePiece]) -> Copies:
        return one_by_one(self.stage, pieces)

    def moves(self, entries: Sequence[BufferEntry], ref: BufferRef | DeviceRef, *, are_right: bool) -> None:
        return None

    def forget(self, index: int) -> list[int]:
        return WeightStore.forget(self._store, index)

    def commit(self) -> Enqueued:
        return WeightStore.commit(self._store)

    def abort(self) -> None:
        WeightStore.abort(self._store)


def make_store(
    weight_map: WeightMap,
    tensors: Tensors | None = None,
    dtype: torch.dtype = torch.float32,
    memory: int = 1 << 40,
    check_finite: bool = True,
) -> DrivenStore:
    store = DrivenStore(weight_map, dtype, memory, check_finite)
    if tensors is not None:
        store.load(tensors.items())
    return store


def manifest_of(tensors: Tensors, digests: dict[str, str] | None = None) -> list[TensorInfo]:
    return [
        TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype), (digests or {}).get(name, ""))
        for name, tensor in tensors.items()
    ]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """What arrives through shared memory: the tensor's raw bytes, here read-only and unaligned."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return memoryview(b"\0" + raw)[1:]


def update(
    store: WeightStore, tensors: Tensors, mode: UpdateMode = "shadow", *, partial: bool = False, raw: bool = True
) -> str:
    resolved = store.begin(manifest_of(tensors), mode, partial)
    for index, tensor in enumerate(tensors.values()):
        assert store.stage(index, as_bytes(tensor) if raw else tensor).advance(60.0)
    store.commit()
    return resolved


def live_bits(store: WeightStore) -> dict[str, bytes]:
    return {name: bytes(tensor.view(torch.uint8).numpy()) for name, tensor in store.live.items()}
