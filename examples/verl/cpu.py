"""What stands in for GPUs when verl runs on a CPU, through verl's own hooks: a platform, and a way for weights from a
trainer to rollout workers of their own. With GPUs none of it is needed.

    export VERL_USE_EXTERNAL_MODULES=cpu VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda VERL_ENGINE_VENDOR=nvidia

Ray is told of GPUs that there are not (`ray_kwargs.ray_init.num_gpus`), so that verl places its workers.
"""

import contextlib
import json
import types
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.plugin.platform import PlatformBase, PlatformRegistry

TIMEOUT = timedelta(seconds=300)


class CpuDevice(types.ModuleType):
    """`torch.cpu` with what verl asks of `torch.cuda` besides; what is about memory is nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, lambda *_, **__: 0)

    def get_rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 1 << 34, 1 << 34

    def get_device_name(self, *_: Any) -> str:
        return "cpu"


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """One device, the CPU, with gloo between processes."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuDevice("cpu_device")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


_init_process_group = torch.distributed.init_process_group


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """verl asks for one backend on CPUs and one on its device: here they are the same, which torch refuses twice."""
    _init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **options)


torch.distributed.init_process_group = init_process_group


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Weights from the trainer's first rank to all rollout workers, tensor by tensor, as broadcasts of a group of gloo:
    for `trainer_mode=separate_async`."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.rank = -1
        self.store: Any = None
        self.group: Any = None

    def prepare(self) -> dict[str, Any]:
        if not self.is_master:
            return {}
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return {"port": self.store.port}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]) -> tuple[Any, Any]:
        size, port = 1 + rollout_world_size, metadata[0]["port"]

        def arguments(ranks: list[int]) -> dict[str, list[int]]:
            return {"rank": ranks, "world_size": [size] * len(ranks), "port": [port] * len(ranks)}

        return arguments([0] + [-1] * (actor_wg_world_size - 1)), arguments(list(range(1, size)))

    def init_process_group(self, rank: int, world_size: int, port: int) -> None:
        self.rank = rank
        if rank < 0:
            return
        if self.store is None:
            self.store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
        self.group = torch.distributed.ProcessGroupGloo(self.store, rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self.group = self.store = None

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        for name, tensor in weights:  # which ranks that send nothing help to gather
            if self.rank == 0:
                self._send_head([name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")])
                self.group.broadcast(tensor.detach().contiguous(), 0).wait()
        if self.rank == 0:
            self._send_head(None)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        while (head := self._receive_head()) is not None:
            name, shape, dtype = head
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(tensor, 0).wait()
            yield name, tensor

    def _send_head(self, head: Any) -> None:
        data = torch.tensor(list(json.dumps(head).encode()), dtype=torch.uint8)
        self.group.broadcast(torch.tensor([len(data)]), 0).wait()
        self.group.broadcast(data, 0).wait()

    def _receive_head(self) -> Any:
        size = torch.tensor([0])
        self.group.broadcast(size, 0).wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        self.group.broadcast(data, 0).wait()
        return json.loads(bytes(data.tolist()))
