"""A Megatron-Core trainer's turns with an engine, as verl's sharding managers took them: within the block the engine
serves the trainer's weights, and after it the memory is the trainer's.

Owns the order of a turn. How weights get there is `headrace.rl.push`, which boxes ranks give `headrace.rl.megatron`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from headrace.client import Client
from headrace.engine import Engine
from headrace.rl.megatron import Chunk, MegatronWeights
from headrace.rl.megatron_layout import MegatronPlace
from headrace.rl.push import PushReport, WeightPusher
from headrace.rl.trainer_ranks import TrainerRanks

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class MegatronHeadraceShardingManager:
    """A context manager that all ranks of a trainer enter and leave together.

    actor_module    this rank's modules, as Megatron's `get_model` returned them
    inference_engine  on rank 0 of `group` an `Engine`, a `Client` or a `Runtime`; elsewhere None
    model           the folder of the Hugging Face model, or its config as a dict
    group, place, dtype   as in `MegatronWeights`
    frees_memory    the engine's weights, KV cache and graphs give their memory back between turns

    Each turn pushes the parameters as they are then: tensor, pipeline and expert shards go to the running engine, with
    no checkpoint between. `report` is of the last push, whose version counts turns from 1 unless `version` is set
    before. Raises as `WeightPusher.push`, on all ranks; the engine then serves what it served before, or, if its
    memory had been given back, nothing until the next turn.
    """

    def __init__(
        self,
        actor_module: Sequence[Chunk | torch.nn.Module] | Chunk | torch.nn.Module,
        inference_engine: Engine | Client | None,
        model: str | Path | Mapping[str, Any],
        *,
        group: ProcessGroup | DeviceMesh | None = None,
        place: MegatronPlace | None = None,
        dtype: str | torch.dtype | None = None,
        frees_memory: bool = False,
    ) -> None:
        self.version = 0
        self.report: PushReport | None = None
        self._module, self._model, self._place, self._group, self._dtype = actor_module, model, place, group, dtype
        self._engine, self._frees_memory = inference_engine, frees_memory
        self._ranks = TrainerRanks(group)
        self._pusher = WeightPusher(inference_engine, group)
        if frees_memory:
            self._on_engine(lambda engine: engine.release_memory_occupation())

    def __enter__(self) -> MegatronHeadraceShardingManager:
        # Read anew: a trainer that moves its parameters off the device gives them other storage.
        weights = MegatronWeights(self._module, self._model, self._place, self._group, self._dtype)
        if self._frees_memory:
            self._on_engine(lambda engine: engine.resume_memory_occupation(["weights"], restore="await"))
        self.version += 1
        self.report = self._pusher.push(weights, self.version)
        if self._frees_memory:
            self._on_engine(lambda engine: engine.resume_memory_occupation(["kv_cache", "cuda_graph"]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._frees_memory:
            return
        if self._ranks.num_ranks > 1 and error is not None:  # others may be anywhere, and wait for no word of ours
            self._act(lambda engine: engine.release_memory_occupation())
        else:
            self._on_engine(lambda engine: engine.release_memory_occupation())

    def _on_engine(self, action: Callable[[Engine | Client], object]) -> None:
        """On rank 0, while the others wait; what it raises, all do."""
        self._ranks.attempt(lambda: self._act(action))

    def _act(self, action: Callable[[Engine | Client], object]) -> None:
        if self._engine is not None:
            action(self._engine)
