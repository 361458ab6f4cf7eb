"""What trainer ranks do in the tests of `VerlEngine`. Each function runs on every rank, in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from headrace.rl import VerlEngine, meeting, shards, verl_engine
from headrace.types.errors import HeadraceError
from tests.processes import children_of

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
TIMES = (
    *("request_received_ts", "queue_time", "forward_entry_time", "prefill_finished_time", "request_finished_ts"),
    "decode_throughput",
)
PROMPT = [5, 6, 7, 8]
SETTINGS: dict[str, Any] = {"num_threads": 1, "page_size": 4, "kv_pool_tokens": 1 << 12, "dtype": "float32", "seed": 0}
CONFIG: dict[str, Any] = {"tp_size": 1, **SETTINGS}
INPROCESS = {**CONFIG, "inprocess": True}
"""Where it does not matter which process the engine is: one less that loads torch."""

NORM = "model.norm.weight"


def mesh_of(num_ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("tp",))


@contextlib.contextmanager
def verl(folder: str, num_ranks: int = 2, **options: Any) -> Iterator[VerlEngine]:
    with VerlEngine(mesh_of(num_ranks), model_path=folder, **{**CONFIG, "rank_timeout": 60, **options}) as engine:
        yield engine


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def error_of(call: Callable[[], Any]) -> tuple[str, str, str]:
    try:
        value = call()
    except HeadraceError as error:
        return type(error).__name__, error.field, error.message
    except ValueError as error:
        return type(error).__name__, "", str(error)
    return "no error", "", repr(value)


def greedy(engine: VerlEngine) -> list[int]:
    ids: list[int] = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    return ids


def digest(engine: VerlEngine) -> dict[str, str] | None:
    """On the rank that can tell."""
    return None if engine.engine is None else engine.engine.digest()


def sharded_model(folder: str, mesh: DeviceMesh) -> torch.nn.Module:
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    sharded: torch.nn.Module = fully_shard(model, mesh=mesh)
    return sharded


def update_from_fsdp(rank: int, folder: str, options: dict[str, Any]) -> list[Any]:
    """New weights, the old ones, and the new ones again, each from a model that is sharded over the ranks."""
    mesh, seen = mesh_of(2), list[Any]()
    new, old = (sharded_model(each, mesh) for each in (f"{folder}/newer", folder))
    with VerlEngine(mesh, model_path=folder, rank_timeout=60, **{**CONFIG, **options}) as engine:
        seen.append((greedy(engine), digest(engine)))
        for version, model in enumerate((new, old, new)):
            report = engine.update_weights_from_tensor(model.state_dict().items(), weight_version=version)
            assert report is not None and report.version == str(version)
            seen.append((greedy(engine), digest(engine)))
    return seen


def shrink() -> None:
    """Everything that holds many tensors, or much of one, holds little."""
    for module in (meeting, shards):
        module.MEMORY_BYTES = 1 << 10  # type: ignore[attr-defined]
    shards.MAX_PARTS = 3
    verl_engine.BUCKET_BYTES = 1 << 13


def refuse_memory() -> None:
    """As if ranks were on different machines."""
    meeting._borrowed = lambda *_: None


def update_in_pieces(rank: int, folder: str, newer: str, far: bool) -> list[Any]:
    """Four ranks, every kind of placement, through memory that holds a part of a tensor."""
    shrink()
    if far:
        refuse_memory()
    line, square = mesh_of(4), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "fsdp"))
    kinds: list[tuple[DeviceMesh, list[Placement]]] = [
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(1), Replicate()]),
        (square, [Shard(0), Shard(1)]),
        (square, [Shard(0), Shard(0)]),
        (square["dp"], [Shard(0)]),
    ]
    pairs: list[tuple[str, torch.Tensor]] = []
    for number, (name, tensor) in enumerate(tensors_of(newer).items()):
        mesh, places = kinds[number % len(kinds)]
        fitting = [Shard(0) if isinstance(each, Shard) and each.dim >= tensor.ndim else each for each in places]
        pairs.append((name, distribute_tensor(tensor, mesh, fitting)))
    name, tensor = pairs[-1]
    whole = tensors_of(newer)[name]
    parts = whole if rank == 0 else torch.zeros_like(whole)
    pairs[-1] = name, DTensor.from_local(parts, line, [Partial()])  # a sum over the ranks
    with VerlEngine(line, model_path=folder, rank_timeout=60, **INPROCESS) as engine:
        report = engine.update_weights_from_tensor(iter(pairs), weight_version="pieces")
        assert report is not None
        return [greedy(engine), digest(engine)]


def update_uneven(rank: int, folder: str, newer: str) -> list[Any]:
    """Three ranks: no size is a multiple of that, and the last rank has nothing of what is short."""
    mesh = mesh_of(3)
    pairs = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors_of(newer).items()}
    with VerlEngine(mesh, model_path=folder, rank_timeout=60, **INPROCESS) as engine:
        assert engine.update_weights_from_tensor(pairs) is not None
        return [greedy(engine), digest(engine)]


def two_engines(rank: int, folder: str, newer: str) -> list[Any]:
    """Four ranks, two engines, and tensors that are sharded over the ranks of both."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    pairs = {name: distribute_tensor(tensor, line, [Shard(0)]) for name, tensor in tensors_of(newer).items()}
    with VerlEngine(square["tp"], model_path=folder, rank_timeout=60, **INPROCESS) as engine:
        assert engine.update_weights_from_tensor(pairs, weight_version=1) is not None
        return [greedy(engine), digest(engine)]


def update_from_one_buffer(rank: int, folder: str, newer: str) -> list[Any]:
    """A generator that fills one buffer again and again, and is asked for no tensor before it is needed; two calls
    make one update."""
    tensors = list(tensors_of(newer).items())
    buffer, alive = torch.empty(1 << 16), [0, 0]

    def produced(part: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in part:
            alive[0] += 1
            buffer.fill_(float("nan"))
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield f"module.{name}", view
            alive[1] += 1

    with verl(folder, **INPROCESS) as engine:
        before = greedy(engine), digest(engine)
        first = engine.update_weights_from_tensor(produced(tensors[:9]))
        assert first is None and (greedy(engine), digest(engine)) == before
        report = engine.update_weights_from_tensor(produced(tensors[9:]), weight_version="two calls")
        assert report is not None and report.version == "two calls" and report.num_tensors == len(tensors)
        assert alive == [len(tensors)] * 2
        return [greedy(engine), digest(engine)]


def update_by_collectives(rank: int, folder: str, newer: str, options: dict[str, Any]) -> list[Any]:
    """Every kind of tensor, each made by a collective, as trainers do that gather what FSDP has split; in many rounds.
    Calls that end before a tensor is asked for, then a tensor that the engine refuses, then one that a rank has
    otherwise, then all as they should be."""
    shrink()
    num_ranks = torch.distributed.get_world_size()
    mesh = mesh_of(num_ranks)
    shards = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors_of(newer).items()}

    def gathered(change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Iterator[tuple[str, Any]]:
        for number, (name, shard) in enumerate(shards.items()):
            whole = shard.full_tensor()
            if name == NORM:
                yield name, change(whole)
            elif number % 3 == 0:
                yield name, whole
            elif number % 3 == 1:
                yield name, shard
            else:
                parts = whole if rank == 0 else torch.zeros_like(whole)
                yield name, DTensor.from_local(parts, mesh, [Partial()])

    def longer(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor])

    is_last = rank == num_ranks - 1
    seen = list[Any]()
    with verl(folder, num_ranks, rank_timeout=20, **options) as engine:
        update = engine.update_weights_from_tensor
        for call in (
            lambda: update(gathered(), load_format="direct"),
            lambda: engine.flush_cache() if rank == 0 else update(gathered()),
            lambda: update(gathered(longer)),
            lambda: update(gathered(longer) if is_last else gathered()),
            lambda: update(gathered()),
        ):
            seen.append((error_of(call), greedy(engine), digest(engine)))
    return seen


def give_updates_up(rank: int, folder: str, newer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Rank 0 comes late to an update, then is stopped within one; each time rank 1 gives it up, and goes on with the
    next one."""
    mesh = mesh_of(2)
    new, old = (
        [(name, distribute_tensor(tensor, mesh, [Shard(0)])) for name, tensor in tensors_of(each).items()]
        for each in (newer, folder)
    )
    leader = torch.tensor([os.getpid()])
    torch.distributed.broadcast(leader, 0)

    def stopping(how: str) -> Iterator[tuple[str, Any]]:
        for number, pair in enumerate(new):
            if number == 8 and how == "stopped" and rank == 0:
                os.kill(os.getpid(), STOP)
            yield pair

    def give_up(engine: VerlEngine, how: str) -> list[Any]:
        torch.distributed.barrier()
        if rank == 0 and how == "late":
            time.sleep(3)
        pairs = stopping(how)
        found: list[Any] = [error_of(lambda: engine.update_weights_from_tensor(pairs, weight_version="given up"))]
        if rank == 1 and how == "stopped":
            threading.Timer(1, os.kill, (int(leader), signal.SIGCONT)).start()
        if engine.engine is not None:
            found += [engine.engine.status().version, digest(engine)]
        assert engine.update_weights_from_tensor(old) is not None
        engine.release_memory_occupation(["kv_cache"])
        engine.resume_memory_occupation()
        return [found, (greedy(engine), digest(engine))]

    with verl(folder, rank_timeout=2, **options) as engine:
        return {how: give_up(engine, how) for how in ("late", "stopped")}


def refusals(rank: int, folder: str, newer: str) -> list[Any]:
    """What goes wrong on one rank or on all; each leaves the old weights, and the next update is taken."""
    new, old = tensors_of(newer), tensors_of(folder)
    names = list(new)

    def stumbling(on: int) -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(new.items()):
            if number == 7 and rank == on:
                raise ValueError("the optimizer is on fire")
            yield pair

    def calling(on: int, call: Callable[[], Any]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(new.items()):
            if number == 7 and rank == on:
                call()
            yield pair

    def changed(on: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, torch.Tensor]:
        tensors = dict(new)
        if rank == on:
            change(tensors)
        return tensors

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names[0]] = tensors.pop(names[0])

    verl_engine.BUCKET_BYTES = 1 << 13  # some are staged before something goes wrong
    with verl(folder, **INPROCESS) as engine:

        def update(tensors: Any, **options: Any) -> Callable[[], Any]:
            return lambda: engine.update_weights_from_tensor(tensors, **options)

        def rest() -> Any:
            report = engine.update_weights_from_tensor(list(new.items())[1:])
            if engine.engine is not None:
                engine.engine.abort_update()
            return report

        calls: dict[str, Callable[[], Any]] = {
            "generator of rank 0": update(stumbling(0)),
            "what had come before is forgotten": rest,
            "generator of rank 1": update(stumbling(1)),
            "rank 0 has fewer": update(changed(0, lambda tensors: tensors.pop(names[-1]))),
            "rank 1 has fewer": update(changed(1, lambda tensors: tensors.pop(names[-1]))),
            "another order": update(changed(1, swap)),
            "another shape": update(changed(1, lambda tensors: tensors.update({NORM: torch.ones(3)}))),
            "a shape that no rank can mean": update({**new, NORM: torch.ones(3)}),
            "an unknown name": update({**new, "nobody": torch.ones(3)}),
            "not finite": update({**new, NORM: torch.full((32,), torch.nan)}),
            "no tensor": update({**new, NORM: [1.0] * 32}),
            "no pairs": update(7),
            "load format": update(new, load_format="direct"),
            "flush cache": update(new, flush_cache="no"),
            "version": update(new, weight_version=""),
            "mode": update(new, mode="sideways"),
            "prompt": lambda: engine.generate(input_ids=[10**6]),
            "parameters": lambda: engine.generate(prompt="a", sampling_params={"top_p": 2.0}),
            "infinite": lambda: engine.generate(input_ids=[1], sampling_params=[{"temperature": float("inf")}]),
            "image": lambda: engine.generate(prompt="a", image_data="picture.png"),
            "streamed": lambda: engine.generate(prompt="a", stream=True),
            "tags": lambda: engine.release_memory_occupation(["nothing"]),  # type: ignore[list-item]
            "pause": lambda: engine.pause_generation("sideways"),
            "different calls": engine.flush_cache if rank else lambda: engine.generate(input_ids=[1]),
        }
        inner = engine.flush_cache, engine.release_memory_occupation, engine.resume_memory_occupation
        for call in (*inner, update(new), lambda: greedy(engine)):
            for on in (0, 1):
                calls[f"call {len(calls)} within an update, on rank {on}"] = update(calling(on, call))
        before, found = (greedy(engine), digest(engine)), dict[str, Any]()
        for what, call in calls.items():
            found[what] = error_of(call)
            assert (greedy(engine), digest(engine)) == before, what
        assert engine.update_weights_from_tensor(new) is not None
        after = greedy(engine), digest(engine)
        assert engine.update_weights_from_tensor(old) is not None
        assert (greedy(engine), digest(engine)) == before
        return [found, after]


def control(rank: int, folder: str, newer: str, options: dict[str, Any]) -> list[Any]:
    """The calls that are no update and no plain generation."""
    with verl(folder, **options) as engine:
        asked: dict[str, Any] = {"sampling_params": {**GREEDY, "n": 2}, "return_logprob": True, "logprob_start_len": 0}
        many = engine.generate(["Up", "Down"], top_logprobs_num=2, rid=["a", "b"], **asked)
        for each in many:
            for key in ("e2e_latency", "response_sent_to_client_ts", "seed", *TIMES):
                each["meta_info"].pop(key)
        seen: list[Any] = [many, greedy(engine)]
        for tags in (["kv_cache"], None, ["weights"]):
            engine.release_memory_occupation(tags)  # type: ignore[arg-type]
            engine.resume_memory_occupation(restore="disk")
        seen.append(greedy(engine))
        engine.pause_generation("in_place")
        engine.continue_generation()
        engine.flush_cache()
        seen.append(greedy(engine))
        if rank == 0:
            threading.Timer(0.5, lambda: engine.abort_request(abort_all=True)).start()
        long = engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 1000}, rid="long")
        seen.append(long["meta_info"]["finish_reason"]["type"])
        seen.append(error_of(lambda: engine.generate(prompt="a", stream=True))[:2])
        engine.shutdown()
        seen.append(error_of(lambda: greedy(engine)))
        return seen


def served(rank: int, folder: str) -> list[Any]:
    """HTTP in front of an engine that runs, with a key."""
    from headrace import Client

    called = list[str]()
    with verl(folder, **INPROCESS) as engine:
        url = engine.serve(api_key="secret", launch_callback=lambda: called.append("ready"))
        seen = list[Any]([url])
        if rank == 0:
            with Client(url, "secret") as client, Client(url, "wrong") as stranger:
                (sample,) = client.generate(input_ids=PROMPT, sampling_params=GREEDY)
                ask = urllib.request.Request(f"{url}/metrics", headers={"authorization": "Bearer secret"})
                with urllib.request.urlopen(ask) as reply:
                    seen.append((sample.token_ids, reply.read().decode(), error_of(stranger.status)[0]))
        greedy(engine)
        return [*seen, called]


def lost(rank: int, folder: str, how: int, which: int) -> list[Any]:
    """One rank is killed, or stopped, while the others make calls."""
    with verl(folder, 3, **INPROCESS, rank_timeout=2.0) as engine:
        greedy(engine)
        torch.distributed.barrier()
        if rank == which:
            os.kill(os.getpid(), how)
        started, found = time.monotonic(), list[Any]()
        while time.monotonic() < started + 20 and not found:
            error = error_of(lambda: greedy(engine))
            found += [error] if error[0] != "no error" else []
        return [*found, time.monotonic() - started < 8]


def refused_settings(rank: int, folder: str) -> list[Any]:
    """Settings that are refused, and then good ones."""
    seen, mesh = list[Any](), mesh_of(2)
    refused: tuple[dict[str, Any], ...] = {"no_such": 1}, {"nnodes": 3}, {"model_path": folder}, {"dtype": "float31"}
    for options in refused:
        start = functools.partial(VerlEngine, mesh, model=folder, rank_timeout=30.0, **{**CONFIG, **options})
        seen.append(error_of(start)[:2])
    for on, wrong in ((0, {"rank_timeout": "soon"}), (1, {"rank_timeout": -1}), (1, {"launch_server": "yes"})):
        mine: Any = {"rank_timeout": 30.0, **(wrong if rank == on else {})}
        seen.append(error_of(functools.partial(VerlEngine, mesh, model=folder, **{**CONFIG, **mine}))[:2])
    not_meshes: tuple[Any, ...] = (
        None,
        init_device_mesh("cpu", (1, 2)),
        DeviceMesh("cpu", [1 - rank], _init_backend=False),
    )
    for given in not_meshes:
        seen.append(error_of(functools.partial(VerlEngine, given, model=folder, **CONFIG))[:2])
    with verl(folder, **INPROCESS) as engine:
        return [*seen, greedy(engine)]


def many_updates(rank: int, folder: str, newer: str, count: int, options: dict[str, Any]) -> list[Any]:
    """The same weights over and over: what the process holds, and how much of shared memory, does not grow."""
    mesh = mesh_of(2)
    kinds = [
        {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors_of(each).items()}
        for each in (folder, newer)
    ]
    with verl(folder, **options) as engine:
        sizes = list[tuple[int, int, int]]()
        for number in range(count):
            report = engine.update_weights_from_tensor(kinds[number % 2], weight_version=number)
            assert report is not None and report.epoch == number + 1
            if number in (count // 10, count - 1):
                sizes.append(held())
        return [sizes, greedy(engine)]


def held() -> tuple[int, int, int]:
    """Descriptors, mappings of shared memory, and threads of this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = sum("memfd:headrace" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), shared, threading.active_count()


KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def child_ranks() -> int:
    """Processes of the engine's ranks that this one has started."""
    return len(children_of(os.getpid(), word="headrace.core.rank_process"))


def over_nodes(rank: int, folder: str, newer: str, address: str, options: dict[str, Any]) -> list[Any]:
    """A mesh of all ranks over two nodes."""
    num_ranks = torch.distributed.get_world_size()
    os.environ["HEADRACE_DIST_SECRET"] = "a secret of this test only"
    given: dict[str, Any] = {**SETTINGS, "device": "cpu", "start_timeout": 60, "dist_init_addr": address, **options}
    engine = VerlEngine(mesh_of(num_ranks), 2, model_path=folder, tp_size=num_ranks, rank_timeout=60, **given)
    seen: list[Any] = [(greedy(engine), digest(engine))]
    assert engine.update_weights_from_tensor(tensors_of(newer)) is not None
    seen += [(greedy(engine), digest(engine)), child_ranks()]
    engine.shutdown()
    return [*seen, child_ranks()]


def refused_nodes(rank: int, folder: str, address: str) -> list[Any]:
    """A setting and a secret that one node has not, and a number of nodes that one rank does not know."""
    os.environ["HEADRACE_DIST_SECRET"] = "a secret of this test only"
    mesh, seen = mesh_of(4), list[Any]()
    given: dict[str, Any] = {"model": folder, "dist_init_addr": address, "device": "cpu", **SETTINGS}

    def start(nnodes: int = 2, dtype: str = "float32") -> None:
        options = {**given, "tp_size": 4, "dtype": dtype, "rank_timeout": 30.0}
        seen.append(error_of(lambda: VerlEngine(mesh, nnodes, **options))[:2])

    start(dtype="float31" if rank == 2 else "float32")
    if rank == 2:
        del os.environ["HEADRACE_DIST_SECRET"]
    start()
    os.environ["HEADRACE_DIST_SECRET"] = "a secret of this test only"
    start(nnodes=1 if rank == 3 else 2)
    return seen
