"""What trainer ranks do in the tests of `Engine(rank_group=...)` on devices. Each function runs on every rank, in a
process of its own, whose device it is."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from headrace import Engine
from headrace.types.errors import HeadraceError
from tests.gpu.builders import greedy

ENGINE: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "seed": 0,
    "kv_pool_tokens": 1 << 15,
    "max_running_requests": 16,
    "max_num_batched_tokens": 1024,
    "max_graph_tokens": 64,
    "start_timeout": 120,
    "control_timeout": 60,
}


def come_to(name: str, rank: int) -> None:
    """All ranks are here, whatever their devices are at: a trainer's collective beside an engine's is another story."""
    store = distributed.distributed_c10d._get_default_store()
    store.set(f"{name}/{rank}", "here")
    store.wait([f"{name}/{each}" for each in range(distributed.get_world_size())], timedelta(seconds=120))


def use_own_group(name: str, rank: int, group: Any = None) -> None:
    """The trainer's own collective, once the engine is idle."""
    come_to(name, rank)
    found = torch.full((1000,), rank + 1.0, device="cuda")
    distributed.all_reduce(found, group=group)
    assert torch.cuda.current_device() == rank
    assert found.tolist() == [3.0] * 1000


def answers(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    pieces = engine.generate(input_ids=prompts, sampling_params=greedy(24))
    return [(piece.token_ids, piece.logprobs) for piece in pieces]


def whole_life(
    rank: int, folder: str, new_file: str, prompts: list[list[int]], num_engines: int, has_mesh: bool
) -> Any:
    """Engines, one after the other; what the first of the ranks has of each, before an update and after it."""
    found: list[Any] = []
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("tp",)) if has_mesh else None
    group = None if mesh is None else mesh.get_group()
    use_own_group("before", rank, group)
    for number in range(num_engines):
        with Engine(folder, rank_group=mesh or distributed.group.WORLD, **ENGINE) as engine:
            if rank == 0:
                found.append((answers(engine, prompts), engine.digest()))
            use_own_group(f"between {number}", rank, group)
            if rank == 0:
                tensors = {name: tensor.cuda() for name, tensor in load_file(new_file).items()}
                engine.update_weights_from_tensor(tensors.items(), "new")
                found.append((answers(engine, prompts), engine.digest()))
            use_own_group(f"updated {number}", rank, group)
        use_own_group(f"after {number}", rank, group)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    distributed.destroy_process_group()
    return found


def lost(rank: int, folder: str, how: int) -> Any:
    """The second rank is lost while requests run; the first has an error, and a device that works."""
    engine = Engine(folder, rank_group=distributed.group.WORLD, **ENGINE)
    if rank == 1:
        come_to("lost", rank)
        time.sleep(0.5)
        os.kill(os.getpid(), how)
        time.sleep(600)
    outcome: list[Any] = []

    def generate() -> None:
        try:
            engine.generate(input_ids=[[1, 2, 3]] * 4, sampling_params=greedy(4000))
        except HeadraceError as error:
            outcome.extend((type(error).__name__, error.message))

    thread = threading.Thread(target=generate)
    thread.start()
    come_to("lost", rank)
    began = time.monotonic()
    thread.join(60.0)
    outcome.append(time.monotonic() - began)
    engine.shutdown()
    torch.cuda.synchronize()
    outcome.append(float(torch.ones(1000, device="cuda").sum()))
    return outcome


KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)
