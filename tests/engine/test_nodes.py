"""A replica over two nodes is one engine: the same tokens, updates by every road, and one death, after which it comes
back with the node."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headrace import ConfigError, DeadlineError, Engine, HeadraceError, NeedsWeightsError
from headrace.types.errors import DeviceLostError
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model, shared_memory
from tests.engine.group_trainer import TrainerProcess
from tests.engine.nodes import FIRST, SECRET, Node, node
from tests.engine.test_rank_faults import generate_in_thread, has_other_core
from tests.engine.test_ranks import DRAWN, GREEDY, NAMES, check_equal, outputs
from tests.engine.test_restart import is_gone, pid_of, wait_for
from tests.engine.test_weight_groups import NAMES as ALL_NAMES
from tests.engine.test_weight_groups import manifest_of
from tests.free_ports import free_port
from tests.warm import cold_starts

NOTICED_SECONDS = 5.0


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_DIST_SECRET", SECRET)
        yield


def first_node(folder: Path, address: str, **settings: Any) -> Engine:
    given = {"tp_size": 2, "nnodes": 2, "device": "cpu", "start_timeout": 60, **SETTINGS, **settings}
    return Engine(folder, dist_init_addr=address, **given)


@pytest.fixture(scope="module")
def address() -> str:
    return f"{FIRST}:{free_port()}"


@pytest.fixture(scope="module")
def other(model_folder: Path, address: str) -> Iterator[Node]:
    with node(model_folder, address) as started:
        yield started


@pytest.fixture(scope="module")
def nodes(model_folder: Path, address: str, other: Node) -> Iterator[Engine]:
    with first_node(model_folder, address, max_core_restarts=2) as started:
        yield started


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_two_nodes_generate_what_one_rank_does(nodes: Engine, engine: Engine, params: Any) -> None:
    check_equal(outputs(nodes, params), outputs(engine, params))
    assert nodes.digest() == engine.digest()


def lose(engine: Engine, other: Node, how: signal.Signals) -> None:
    """What everybody is told who waits for something when the node is lost."""
    outcomes: list[HeadraceError] = []
    thread = generate_in_thread(engine, outcomes)
    other.send(how)
    began = time.monotonic()
    thread.join(60.0)
    seconds = time.monotonic() - began
    (error,) = outcomes
    assert isinstance(error, DeviceLostError) and error.retryable
    assert "rank 1 (node 1 at 127." in error.message
    assert seconds < 4 * NOTICED_SECONDS  # of a machine that others use too


def test_a_node_that_stands_still_is_named_and_the_replica_is_back_with_it(nodes: Engine, other: Node) -> None:
    first, core = outputs(nodes, GREEDY), pid_of(nodes)
    lose(nodes, other, signal.SIGSTOP)
    other.send(signal.SIGCONT)
    wait_for(partial(has_other_core, nodes, core))
    check_equal(outputs(nodes, GREEDY), first)


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_weights_come_by_every_road_and_can_be_read(
    nodes: Engine, model_folder: Path, tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From memory and from a folder, of which the other node opens nothing; and over a group, of which it is a rank."""
    folder = save_model(tmp_path, seed=1)
    before, names = nodes.digest(), shared_memory()
    new = dict(named_tensors(model_of(1)))
    nodes.update_weights_from_tensor(new.items(), "memory", mode=mode)
    after = nodes.digest()
    assert after != before
    for name in NAMES:
        assert (nodes.get_weights_by_name(name).numpy() == new[name].numpy()).all()
    nodes.update_weights_from_disk(model_folder, "folder", mode=mode)
    assert nodes.digest() == before
    trainer, port = TrainerProcess(), free_port()
    try:
        trainer.tell(do="init", port=port, name="g", world_size=3)
        nodes.init_weights_update_group("127.0.0.1", port, 1, 3, "g", "gloo", timeout=30)
        trainer.hear()
        session = nodes.begin_update("group", manifest_of(), mode=mode)
        trainer.tell(do="send", name="g", folder=str(folder), names=ALL_NAMES)
        nodes.stage_from_group(session, ALL_NAMES, "g")
        trainer.hear()
        nodes.commit(session)
        assert nodes.digest() == after
        nodes.destroy_weights_update_group("g")
    finally:
        trainer.close()
    nodes.update_weights_from_disk(model_folder, "again", mode=mode)
    assert nodes.digest() == before and shared_memory() == names


def test_what_is_refused_is_taken_when_it_is_right(nodes: Engine) -> None:
    before = nodes.digest()
    tensors = dict(named_tensors(model_of(1)))
    name = next(each for each in tensors if "down_proj" in each)
    bad = tensors[name].clone()
    bad[0, 0] = float("nan")
    with pytest.raises(HeadraceError, match="NaN"):
        nodes.update_weights_from_tensor({**tensors, name: bad}.items(), "bad", mode="shadow")
    assert nodes.digest() == before
    nodes.update_weights_from_tensor(tensors.items(), "good", mode="shadow")
    assert nodes.digest() != before
    nodes.update_weights_from_tensor(named_tensors(model_of(0)), "old", mode="shadow")
    assert nodes.digest() == before


def test_a_node_that_is_lost_is_named_and_the_replica_is_back_with_another(model_folder: Path) -> None:
    """One that ends by a signal is lost as well, here where no start is left."""
    address = f"{FIRST}:{free_port()}"
    with node(model_folder, address) as other, first_node(model_folder, address, max_core_restarts=1) as nodes:
        nodes.update_weights_from_disk(model_folder, "before")
        first, core = outputs(nodes, GREEDY), pid_of(nodes)
        lose(nodes, other, signal.SIGKILL)
        with node(model_folder, address) as another:
            wait_for(partial(has_other_core, nodes, core))
            with pytest.raises(NeedsWeightsError):
                outputs(nodes, GREEDY)
            nodes.update_weights_from_disk(model_folder, "after")
            check_equal(outputs(nodes, GREEDY), first)
            (rank,) = another.rank_pids
            another.process.send_signal(signal.SIGTERM)
            assert another.end()[0] == 0 and is_gone(rank)
            wait_for(lambda: not nodes.is_alive)
            with pytest.raises(HeadraceError, match="rank 1"):
                nodes.generate(input_ids=[1])


@pytest.mark.parametrize("sizes", [{"tp_size": 4}, {"tp_size": 2, "pp_size": 2}], ids=["tp 4", "tp 2 pp 2"])
def test_nodes_of_several_ranks(model_folder: Path, engine: Engine, tmp_path: Path, sizes: dict[str, Any]) -> None:
    """Of four ranks one shares memory with the first, and two have their bytes sent. They end with the first."""
    address = f"{FIRST}:{free_port()}"
    with node(model_folder, address, **sizes) as other:
        with first_node(model_folder, address, **sizes) as four:
            check_equal(outputs(four, GREEDY), outputs(engine, GREEDY))
            before = four.digest()
            new = dict(named_tensors(model_of(1)))
            four.update_weights_from_tensor(new.items(), "memory")
            for name in NAMES:
                assert (four.get_weights_by_name(name).numpy() == new[name].numpy()).all()
            four.update_weights_from_disk(model_folder, "folder")
            assert four.digest() == before == engine.digest()
            if "pp_size" in sizes:  # of shares and of stages
                four.save_sharded_model(tmp_path)
            assert len(other.rank_pids) == 2
        code, text = other.end()
        assert code == 0 and "rank 0 has ended" in text
    if "pp_size" in sizes:
        check_saved(tmp_path, before, sizes)


def check_saved(folder: Path, digests: dict[str, str], sizes: dict[str, Any]) -> None:
    """What ranks of two nodes have written, each its own, is read by as many of one."""
    with Engine(folder, inprocess=True, device="cpu", load_format="sharded", **SETTINGS, **sizes) as again:
        assert again.digest() == digests


def server_info(port: int) -> dict[str, Any]:
    """What a server says of itself, once it is ready."""
    found: list[dict[str, Any]] = []

    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=10) as reply:
                found.append(json.load(reply))
        except OSError:
            return False
        return True

    wait_for(ask)
    return found[0]


def test_a_server_is_the_first_node(model_folder: Path) -> None:
    """Every process here starts cold, as users' do."""
    address, port = f"{FIRST}:{free_port()}", free_port()
    with cold_starts(), node(model_folder, address) as other, node(model_folder, address, rank=0, port=port) as first:
        info = server_info(port)
        assert [info[name] for name in ("tp_size", "nnodes", "node_rank", "num_gpus")] == [2, 2, 0, 2]
        first.process.send_signal(signal.SIGTERM)
        assert [each.end()[0] for each in (first, other)] == [0, 0]


def start_in_thread(folder: Path, address: str, **settings: Any) -> tuple[threading.Thread, list[HeadraceError]]:
    errors: list[HeadraceError] = []

    def start() -> None:
        try:
            first_node(folder, address, **settings).shutdown()
        except HeadraceError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    return thread, errors


@pytest.mark.parametrize(
    ("field", "settings"), [("tp_size", {"tp_size": 4}), ("weights", {}), ("dtype", {"dtype": "bfloat16"})]
)
def test_nodes_that_differ_are_told_so_by_name(
    model_folder: Path, tmp_path: Path, field: str, settings: dict[str, Any]
) -> None:
    address = f"{FIRST}:{free_port()}"
    folder = save_model(tmp_path, seed=1) if field == "weights" else model_folder
    if field == "tp_size":
        settings = {"load_format": "dummy", **settings}
    thread, errors = start_in_thread(model_folder, address, inprocess=True)
    with node(folder, address, **settings) as other:
        code, text = other.end()
        thread.join(60.0)
        (error,) = errors
        assert isinstance(error, ConfigError) and error.field == field and "node 1" in error.message
        assert code == 2 and f"{field} is " in text and len(text.strip().splitlines()) == 1


def test_who_does_not_know_the_secret_is_no_node(model_folder: Path) -> None:
    address = f"{FIRST}:{free_port()}"
    thread, errors = start_in_thread(model_folder, address, start_timeout=15)
    with node(model_folder, address, secret="another secret than that") as other:
        code, text = other.end()
        assert code == 2 and "HEADRACE_DIST_SECRET" in text
    thread.join(90.0)
    (error,) = errors
    assert isinstance(error, DeadlineError) and "node 1 has not come" in error.message


def test_a_node_that_finds_no_first_says_so(model_folder: Path) -> None:
    with node(model_folder, f"{FIRST}:{free_port()}", start_timeout=1) as other:
        code, text = other.end()
        assert code == 2 and "has found no node 0" in text


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("node_rank", {"node_rank": 2}),
        ("node_rank", {"node_rank": 1}),
        ("nnodes", {"nnodes": 3}),
        ("dist_init_addr", {"dist_init_addr": "nowhere"}),
        ("dist_init_addr", {"dist_init_addr": None}),
        ("dist_init_addr", {"dist_init_addr": "192.0.2.1:4000"}),
    ],
)
def test_nodes_that_cannot_be_are_refused_by_name(model_folder: Path, field: str, settings: dict[str, Any]) -> None:
    given = {"tp_size": 2, "nnodes": 2, "dist_init_addr": f"{FIRST}:4000", **SETTINGS, **settings}
    with pytest.raises(ConfigError) as refusal:
        Engine(model_folder, inprocess=True, device="cpu", **given)
    assert refusal.value.field == field


def test_a_secret_is_needed(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_DIST_SECRET", "short")
    with pytest.raises(ConfigError) as refusal:
        first_node(model_folder, f"{FIRST}:4000", inprocess=True)
    assert refusal.value.field == "HEADRACE_DIST_SECRET"
