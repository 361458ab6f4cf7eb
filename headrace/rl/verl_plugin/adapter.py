"""The trainer's side of a replica: its weights to the replica's server, and when that sleeps.

Owns nothing that outlasts a call. Weights go by `headrace.client`, through memory that is shared with the server on the
same host; a bucket at a time, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

import ray
from verl.workers.rollout.base import BaseRollout

from headrace.client import AsyncClient
from headrace.rl.push import float_dtype
from headrace.rl.verl_plugin.translation import server_name
from headrace.types.errors import ConfigError, HeadraceError, WeightUpdateError

if TYPE_CHECKING:
    import torch

    NamedTensor = tuple[str, torch.Tensor]

BUCKET_BYTES = 64 << 20


class ServerAdapter(BaseRollout):  # type: ignore[misc]
    """One in every rank of a trainer, and in every worker of a replica of its own. The first rank of each replica, on
    its server's host, asks it; the others only take part in what gathers weights."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        """Raises `ConfigError` for adapters of LoRA that are not merged."""
        super().__init__(config, model_config, device_mesh)
        if getattr(self.model_config, "lora_rank", 0) and not self.model_config.lora.get("merge", False):
            raise ConfigError("adapters are sent merged only: set model.lora.merge=True", field="model.lora.merge")
        world_size = self.config.tensor_model_parallel_size * self.config.pipeline_model_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // world_size if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % world_size == 0
        self.sleep_level = 2  # verl's word for a sleep that keeps no weights

    async def resume(self, tags: list[str]) -> None:
        """Have the server take memory again: "weights", "kv_cache"."""
        if self.is_leader_rank:
            await self._server().resume_memory.remote(tags)

    async def release(self) -> None:
        """Have the server sleep."""
        if self.is_leader_rank:
            await self._server().sleep.remote()

    async def update_weights(
        self,
        weights: Iterable[NamedTensor] | AsyncIterator[NamedTensor],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: Any = None,
        base_sync_done: bool = False,
        **_: Any,
    ) -> None:
        """Make `weights` live, labelled `global_steps`. Every rank calls this, and reads all of its `weights`, whatever
        happens on one: others wait for its part of what they gather.

        Raises `WeightUpdateError` naming the tensor; the old weights serve on then, unless they had been released.
        """
        pairs = _as_they_come(weights)
        try:
            if wire_format != "named_tensors":
                raise WeightUpdateError(f"wire_format {wire_format!r} is not known", field="wire_format")
            if peft_config is not None:
                raise WeightUpdateError("adapters are sent merged only", field="peft_config")
            if self.is_leader_rank:
                await self._send(pairs, global_steps)
        finally:
            async for _pair in pairs:
                pass

    async def _send(self, pairs: AsyncIterator[NamedTensor], global_steps: int | None) -> None:
        url, api_key, admin_key, version = await self._server().endpoint.remote()
        async with AsyncClient(url, api_key, admin_key) as client:
            session = await client.begin_update(version if global_steps is None else global_steps, None)
            try:
                async for bucket in buckets_of(pairs, float_dtype(session.dtype)):
                    await client.stage(session, bucket)
                await client.commit(session)
            except BaseException:  # whatever it is, the update is over before the caller hears of it
                with contextlib.suppress(HeadraceError):  # it has ended by itself
                    await client.abort_update(session)
                raise

    def _server(self) -> Any:
        """Looked up anew: servers are started after trainers."""
        return ray.get_actor(server_name(self.replica_rank))


async def buckets_of(pairs: AsyncIterator[NamedTensor], dtype: torch.dtype) -> AsyncIterator[list[NamedTensor]]:
    """Tensors in `dtype`, some at a time: `BUCKET_BYTES` together, or one that is larger. They are copies, because a
    sender may use one buffer for all of them; none is asked for before the bucket that is full has been taken."""
    bucket: list[NamedTensor] = []
    num_bytes = 0
    async for name, tensor in pairs:
        size = tensor.numel() * dtype.itemsize
        if bucket and num_bytes + size > BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append((name, tensor.detach().to(dtype, copy=True)))
        num_bytes += size
    if bucket:
        yield bucket


async def _as_they_come(weights: Iterable[NamedTensor] | AsyncIterator[NamedTensor]) -> AsyncIterator[NamedTensor]:
    if isinstance(weights, AsyncIterator):
        async for pair in weights:
            yield pair
    else:
        for pair in weights:
            yield pair
