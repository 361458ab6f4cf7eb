"""What trainer ranks do in tests: every rank runs the same function, in a group of all of them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from headrace import Client, Engine, HeadraceError, WeightUpdateError, serve
from headrace.rl import WeightPusher, megatron
from headrace.rl.megatron_layout import rank_map
from headrace.rl.sharding_manager import MegatronHeadraceShardingManager
from tests.parity.models import reference_logits
from tests.rl.megatron_reference import Mesh, Naming, file_tensors, place_of, rank_chunks

STEP = 1.25
"""What a step multiplies weights by: exactly, on however many ranks."""

SHORT: dict[str, Any] = {"max_new_tokens": 2, "ignore_eos": True}
SETTINGS: dict[str, Any] = {"inprocess": True, "num_threads": 1, "context_length": 64, "max_running_requests": 4}


@contextlib.contextmanager
def target_of(folder: str, road: str) -> Iterator[Engine | Client | None]:
    """On rank 0 an engine with the weights of a folder, or a client of it; on others None."""
    if distributed.get_rank() != 0:
        yield None
        return
    with Engine(model=folder, dtype="float32", skip_tokenizer_init=True, **SETTINGS) as engine:
        if road == "engine":
            yield engine
        else:
            with Client(serve(engine).url, shares_memory=road == "shared memory") as client:
                yield client


def sharded(folder: str, mesh_shape: list[int]) -> Any:
    """The model of a folder under `fully_shard`, block by block; two mesh axes replicate over the first."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def push_fsdp(old: str, new: str, mesh_shape: list[int], road: str, dtype: str | None, as_iterator: bool) -> Any:
    """Two pushes of a sharded model into an engine that holds other weights, the second after a step."""
    model = sharded(new, mesh_shape)
    reports, digests = [], []
    with target_of(old, road) as target:
        pusher = WeightPusher(target, distributed.group.WORLD, dtype)
        for version in ("first", "second"):
            weights: Any = iter(model.state_dict().items()) if as_iterator else model
            report = pusher.push(weights, version, verify=True)
            reports.append([report.update.version, report.is_verified])
            if target is not None:
                digests.append(target.digest())
            model(torch.arange(16).view(2, 8)).logits.square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(STEP)
    return {"reports": reports, "digests": digests}


def push_refused(folder: str) -> Any:
    """What every rank is told where the engine refuses a tensor, where one rank's shard was freed, and then a push that
    is taken all the same."""
    rank = distributed.get_rank()
    model = sharded(folder, [distributed.get_world_size()])
    state = dict(model.state_dict())
    told = []
    with target_of(folder, "engine") as target:
        pusher = WeightPusher(target, distributed.group.WORLD)
        freed = {**state, "model.norm.weight": state["model.norm.weight"].clone()}
        if rank == 1:
            freed["model.norm.weight"].to_local().untyped_storage().resize_(0)
        renamed = {("wrong" if name == "model.norm.weight" else name): each for name, each in state.items()}
        late = (pair for pair in renamed.items())
        for weights in (freed, renamed, late):
            try:
                pusher.push(weights, "never")
            except HeadraceError as error:
                told.append([type(error).__name__, error.field])
        told.append([pusher.push(state, "taken").update.version, ""])
    return told


def push_broken(folder: str, broken_rank: int) -> Any:
    """What every rank is told where one rank alone goes wrong, in each of the ways it may, and of a push after each."""
    rank, dtype = distributed.get_rank(), "bfloat16"
    state = dict(sharded(folder, [distributed.get_world_size()]).state_dict())
    names, is_broken, told = list(state), rank == broken_rank, []
    sizes = Mesh(tensor=2)._replace(tensor_rank=rank)
    [held] = rank_chunks(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), sizes, Naming(True, True, 64)
    )
    source = megatron.MegatronWeights([megatron.Chunk(*held)], folder, place_of(sizes), distributed.group.WORLD)

    class Unreadable:
        def state_dict(self) -> Any:
            raise MemoryError("no room for it")

        named_parameters = state_dict

    def fails() -> Iterator[tuple[str, Any]]:
        for number, (name, tensor) in enumerate(state.items()):
            if number == 4 and is_broken:
                raise ValueError("a trainer's bug")
            yield name, tensor

    def swapped() -> Iterator[tuple[str, Any]]:
        order = [names[1], names[0], *names[2:]] if is_broken else names
        yield from ((name, state[name]) for name in order)

    def half() -> Iterator[tuple[str, Any]]:
        yield from list(state.items())[: 5 if is_broken else None]

    def lost_part() -> Any:
        if is_broken:
            source._params.pop("decoder.layers.1.self_attention.linear_proj.weight")
        return source

    broken: dict[str, tuple[Any, dict[str, Any]]] = {
        "fails": (fails, {}),
        "shorter": (half, {}),
        "another order": (swapped, {}),
        "shorter dictionary": (lambda: dict(half()), {}),
        "unreadable": (lambda: Unreadable() if is_broken else state, {}),
        "megatron": (lost_part, {}),
        "wrong word": (lambda: state, {"mode": "sideways" if is_broken else "auto"}),
    }
    with target_of(folder, "engine") as target:
        pusher = WeightPusher(target, distributed.group.WORLD, dtype)
        for what, (make, options) in broken.items():
            try:
                pusher.push(make(), "never", **options)
                told.append([what, "nothing", ""])
            except Exception as error:
                told.append([what, type(error).__name__, str(error)])
            assert pusher.push(iter(state.items()), what).update.version == what
            if target is not None:
                assert target.status().version == what and not target.status().updating
    return told


def make_refused(folder: str, broken_rank: int) -> Any:
    """What every rank is told where one rank alone gives a constructor what is refused, and of a push after that; then
    of groups that are none."""
    world, rank = distributed.group.WORLD, distributed.get_rank()
    is_broken, sizes = rank == broken_rank, Mesh(tensor=2)._replace(tensor_rank=rank)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    [held] = rank_chunks(model, sizes, Naming(True, True, 64))
    chunk, told = megatron.Chunk(*held), []

    def source(chunks: Any = chunk, model: Any = folder, **options: Any) -> Any:
        return megatron.MegatronWeights(chunks, model, place_of(sizes), options.pop("group", world), **options)

    with target_of(folder, "engine") as target:

        def pusher(target: Any = target, group: Any = world, **options: Any) -> WeightPusher:
            return WeightPusher(target, group, **options)

        refused: dict[str, tuple[Any, dict[str, Any]]] = {
            "no target": (pusher, {"target": "http://127.0.0.1"}),
            "wrong place": (pusher, {"target": None if rank == 0 else Client.__new__(Client)}),
            "address": (pusher, {"address": 7}),
            "dtype": (pusher, {"dtype": "int8"}),
            "other dtype": (pusher, {"dtype": "bfloat16"}),
            "source of no module": (source, {"chunks": [7]}),
            "source of no model": (source, {"model": 7}),
            "dtype of a source": (source, {"dtype": "int8"}),
        }
        for what, (make, given) in refused.items():
            told.append([what, *_error_of(make, **(given if is_broken else {}))])
        line = init_device_mesh("cpu", (2,))
        assert pusher(group=line).push(source(group=line), "by a mesh").update.version == "by a mesh"
    for group in (distributed.GroupMember.NON_GROUP_MEMBER, init_device_mesh("cpu", (1, 2)), "all", [0, 1]):
        told.append(["group", *_error_of(WeightPusher, None, group)])
    return told


def _error_of(make: Any, *args: Any, **options: Any) -> list[str]:
    try:
        make(*args, **options)
    except Exception as error:
        return [type(error).__name__, getattr(error, "field", ""), str(error)]
    return ["nothing", "", ""]


def push_megatron(old: str, new: str, sizes: dict[str, int], naming: list[Any], road: str, dtype: str | None) -> Any:
    """Two pushes of what Megatron's ranks would hold of a model, the second after a step."""
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    sized = Mesh(**sizes)
    stage, inner = divmod(distributed.get_rank(), distributed.get_world_size() // sized.stages)
    mesh = sized._replace(
        stage=stage,
        tensor_rank=inner % sized.tensor,
        expert_tensor_rank=inner % sized.expert_tensor,
        expert_rank=inner // sized.expert_tensor % sized.experts,
    )
    chunks = [megatron.Chunk(*each) for each in rank_chunks(model, mesh, Naming(*naming))]
    weights = megatron.MegatronWeights(chunks, old, place_of(mesh), distributed.group.WORLD, dtype)
    digests, reports = [], []
    with target_of(old, road) as target:
        pusher = WeightPusher(target, distributed.group.WORLD)
        for version in ("first", "second"):
            report = pusher.push(weights, version, verify=True)
            reports.append([report.update.version, report.is_verified])
            if target is not None:
                digests.append(target.digest())
            for chunk in chunks:
                for tensor in chunk.tensors.values():
                    tensor.mul_(STEP)
    return {"reports": reports, "digests": digests}


def push_megatron_core(old: str, new: str, sizes: dict[str, int]) -> Any:
    """A `GPTModel` is filled by our map, computes what transformers does, and is pushed."""
    from tests.frameworks.megatron import core_models

    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32, attn_implementation="eager").eval()
    core_models.set_up(**sizes)
    chunks = core_models.build(model, **sizes, vocab_size=128)
    spec, tensors = file_tensors(model)
    for chunk in chunks:
        held = megatron.Chunk.of_module(chunk)
        named = megatron._global_params(spec, [held], megatron.current_place())
        table = rank_map(spec, megatron.current_place(), {name: tuple(each.shape) for name, each in named.items()})
        made = megatron.to_megatron(table, tensors)
        for name, tensor in named.items():
            tensor.copy_(made[name])
    ids = list(range(3, 30))
    computed = core_models.logits_of(chunks, ids)
    expected = reference_logits(model, ids)
    error = None if computed is None else float((computed[:, : spec.vocab_size] - expected).abs().max())
    with (
        target_of(old, "engine") as target,
        MegatronHeadraceShardingManager(chunks, target, new, group=distributed.group.WORLD),
    ):
        return {"error": error, "digest": None if target is None else target.digest()}


def take_turns(old: str, new: str, frees_memory: bool) -> Any:
    """A trainer of Megatron's layout and an engine, turn by turn: what the engine has in each, and is after it; then a
    rank's trainer fails in its turn."""
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    rank = distributed.get_rank()
    mesh = Mesh(tensor=2, expert_tensor=2, tensor_rank=rank, expert_tensor_rank=rank)
    chunks = [megatron.Chunk(*each) for each in rank_chunks(model, mesh, Naming())]
    turns: list[Any] = []
    with target_of(old, "engine") as target:
        manager = MegatronHeadraceShardingManager(
            chunks, target, new, group=distributed.group.WORLD, place=place_of(mesh), frees_memory=frees_memory
        )

        def state() -> str:
            assert isinstance(target, Engine)
            return target.status().state

        for _ in range(2):
            with manager:
                assert manager.report is not None
                if target is not None:
                    turns.append([manager.report.update.version, target.digest()])
                    assert len(target.generate(input_ids=[[1, 2, 3]], sampling_params=SHORT)[0].token_ids) == 2
            if target is not None:
                turns.append(state())
            for tensor in chunks[0].tensors.values():
                tensor.mul_(STEP)
        with contextlib.suppress(ZeroDivisionError), manager:
            raise ZeroDivisionError
        if target is not None:
            turns.append(state())
        chunks[0].tensors = {**chunks[0].tensors, "decoder.final_layernorm.weight": torch.ones(3)}
        try:
            manager.__enter__()
        except WeightUpdateError as error:
            turns.append(error.field)
    return turns


def save_sharded(folder: str, mesh_shape: list[int], out: str) -> Any:
    """A sharded model and its optimizer as `torch.distributed.checkpoint` saves them, and as verl does."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model = sharded(folder, mesh_shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.arange(16).view(2, 8)).logits.square().mean().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optim": state, "step": 7}, checkpoint_id=f"{out}/dcp")
    Path(out, "ranks").mkdir(exist_ok=True)
    name = f"model_world_size_{distributed.get_world_size()}_rank_{distributed.get_rank()}.pt"
    torch.save(model.state_dict(), Path(out, "ranks", name))
    distributed.barrier()
    return None


def run_block(block: str, **names: Any) -> Any:
    """A block of docs/training.md, with these names; the version that it has pushed."""
    scope = {"__name__": "example", **names}
    exec(compile(block, "docs/training.md", "exec"), scope)
    return scope["report"].update.version


def run_megatron_block(block: str, folder: str, url: str) -> Any:
    """The same with what Megatron would have in the process: its ranks share each tensor."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mesh = Mesh(
        tensor=2, expert_tensor=2, tensor_rank=distributed.get_rank(), expert_tensor_rank=distributed.get_rank()
    )
    chunks = [megatron.Chunk(*each) for each in rank_chunks(model, mesh, Naming())]
    place = megatron.current_place
    megatron.current_place = lambda: place_of(mesh)
    try:
        return run_block(block, model_chunks=chunks, url=url)
    finally:
        megatron.current_place = place


def push_and_lose_a_rank(old: str, new: str, kind: str) -> Any:
    """Rank 1 ends after it has given some tensors. What rank 0 is told, and what its engine then holds and takes."""
    world, rank = distributed.group.WORLD, distributed.get_rank()
    weights: Any = iter(sharded(new, [2]).state_dict().items())
    if kind == "megatron":
        model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
        mesh = Mesh(tensor=2, expert_tensor=2, tensor_rank=rank, expert_tensor_rank=rank)
        chunks = [megatron.Chunk(*each) for each in rank_chunks(model, mesh, Naming())]
        weights = megatron.MegatronWeights(chunks, new, place_of(mesh), world)
    if rank == 1:
        weights = _Ending(weights) if kind == "megatron" else _ending(weights)
    with target_of(old, "engine") as target:
        pusher = WeightPusher(target, world)
        assert target is not None or rank == 1
        before = target.digest() if target is not None else {}
        try:
            pusher.push(weights, "never")
        except HeadraceError as error:
            assert target is not None
            is_old = target.digest() == before
            alone = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
            version = WeightPusher(target).push(alone, "alone", verify=True).update.version
            return [type(error).__name__, error.field, is_old, version]
    return None


def _ending(pairs: Iterator[Any]) -> Iterator[Any]:
    """Weights of a rank that ends half-way."""
    yield from itertools.islice(pairs, 5)
    os._exit(0)


class _Ending:
    """The same of Megatron's, which yield nothing here but at the end."""

    manifest = None

    def __init__(self, weights: Any) -> None:
        self._weights = weights

    def __iter__(self) -> Iterator[Any]:
        send = self._weights._ranks.send
        sent: list[str] = []

        def ending(name: str, tensor: torch.Tensor) -> None:
            if len(sent) == 5:
                os._exit(0)
            sent.append(name)
            send(name, tensor)

        self._weights._ranks.send = ending
        yield from self._weights
