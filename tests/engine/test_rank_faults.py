"""The loss of one rank is the loss of the replica: told with its cause, to everybody, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headrace import ConfigError, Engine, EngineDeadError, HeadraceError, NeedsWeightsError
from headrace.types.errors import DeviceLostError
from tests.arch.source import ROOT, child_environment
from tests.engine.builders import SETTINGS, model_of, named_tensors, shared_memory
from tests.engine.test_ranks import GREEDY, LONG, PROMPTS, rank_pids
from tests.engine.test_restart import is_gone, pid_of, wait_for

Start = Callable[..., Engine]


@pytest.fixture
def start_ranks(model_folder: Path) -> Iterator[Start]:
    """Start engines of two ranks that end with the test."""
    started: list[Engine] = []

    def start_engine(**settings: Any) -> Engine:
        started.append(Engine(model_folder, **{"tp_size": 2, "device": "cpu", **SETTINGS, **settings}))
        return started[-1]

    yield start_engine
    for each in started:
        each.shutdown()


def generate_in_thread(engine: Engine, outcomes: list[HeadraceError]) -> threading.Thread:
    """Requests that are all running when this returns; `outcomes` are what they fail with."""

    def generate() -> None:
        try:
            engine.generate(input_ids=[PROMPTS[0]] * 4, sampling_params=LONG)
        except HeadraceError as error:
            outcomes.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    wait_for(lambda: engine.metrics()["num_running"] == 4)
    return thread


LAYOUTS: dict[str, dict[str, Any]] = {
    "process": {},
    "inprocess": {"inprocess": True},
    "stages": {"tp_size": 1, "pp_size": 2},
    "stages-inprocess": {"tp_size": 1, "pp_size": 2, "inprocess": True},
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("process", signal.SIGKILL),
        ("inprocess", signal.SIGSTOP),
        ("stages", signal.SIGSTOP),
        ("stages-inprocess", signal.SIGKILL),
    ],
)
def test_a_rank_that_is_lost_while_requests_run_ends_the_replica(
    start_ranks: Start, name: str, how: signal.Signals
) -> None:
    """Every layout; and either signal with shares and with stages, with a core's process and without."""
    names, layout = shared_memory(), LAYOUTS[name]
    engine = start_ranks(**layout)
    core = None if "inprocess" in layout else pid_of(engine)
    (rank,) = rank_pids(engine)
    outcomes: list[HeadraceError] = []
    thread = generate_in_thread(engine, outcomes)
    os.kill(rank, how)
    thread.join(60.0)
    (error,) = outcomes
    assert isinstance(error, DeviceLostError) and error.retryable and error.status == 503
    assert f"rank 1 (process {rank})" in error.message
    assert ("killed by signal 9" if how == signal.SIGKILL else "stopped by a signal") in error.message
    with pytest.raises(EngineDeadError):
        engine.generate(input_ids=[1])
    wait_for(lambda: is_gone(rank) and (core is None or is_gone(core)))
    assert shared_memory() == names


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_is_one_of_them(start_ranks: Start, how: signal.Signals) -> None:
    engine = start_ranks()
    (rank,), core = rank_pids(engine), pid_of(engine)
    outcomes: list[HeadraceError] = []
    thread = generate_in_thread(engine, outcomes)
    os.kill(core, how)
    thread.join(60.0)
    assert [type(error) for error in outcomes] == [EngineDeadError] and outcomes[0].retryable
    wait_for(lambda: is_gone(rank) and is_gone(core))


def stop_for_a_while(pids: list[int]) -> None:
    """As a container that is paused does: one after the other, which go on in the other order."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.45)
    time.sleep(3.0)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)


def test_ranks_that_were_all_stopped_for_a_while_go_on_until_a_shutdown_ends_them(start_ranks: Start) -> None:
    """Each finds the other stopped before it is stopped, and when it goes on. The shutdown comes while requests run."""
    engine = start_ranks()
    expected = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)[0].token_ids
    (rank,), core = rank_pids(engine), pid_of(engine)
    for order in ([rank, core], [core, rank]):
        stop_for_a_while(order)
        assert engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)[0].token_ids == expected
    outcomes: list[HeadraceError] = []
    thread = generate_in_thread(engine, outcomes)
    engine.shutdown()
    thread.join(60.0)
    assert not outcomes and is_gone(rank) and is_gone(core)


def has_other_core(engine: Engine, former: int) -> bool:
    return pid_of(engine) != former and engine.asynchronous.runtime.client.is_alive


def test_a_replica_is_started_again_and_serves_with_current_weights_only(start_ranks: Start) -> None:
    """Whatever ended it: its core dies while a rank stands still, or a rank while nothing runs. One that stands still
    while nothing runs is noticed as well: it is the end where no start is left."""
    engine = start_ranks(max_core_restarts=2)
    first, digests = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY), engine.digest()
    (rank,), core = rank_pids(engine), pid_of(engine)
    os.kill(rank, signal.SIGSTOP)
    os.kill(core, signal.SIGKILL)
    wait_for(partial(has_other_core, engine, core))
    wait_for(lambda: is_gone(rank) and is_gone(core))
    assert engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)[0].token_ids == first[0].token_ids
    engine.update_weights_from_tensor(named_tensors(model_of(1)), "b")
    (second,), core = rank_pids(engine), pid_of(engine)
    os.kill(second, signal.SIGKILL)
    wait_for(partial(has_other_core, engine, core))
    with pytest.raises(NeedsWeightsError):
        engine.generate(input_ids=PROMPTS[0])
    engine.update_weights_from_tensor(named_tensors(model_of(0)), "c")
    assert engine.digest() == digests
    (third,) = rank_pids(engine)
    os.kill(third, signal.SIGSTOP)
    wait_for(lambda: not engine.is_alive)
    with pytest.raises(EngineDeadError, match=rf"rank 1 \(process {third}\)"):
        engine.digest()
    wait_for(lambda: is_gone(second) and is_gone(third))


SCRIPT = """
import sys, time
from headrace import Engine
from tests.engine.builders import SETTINGS
from tests.processes import children_of
if __name__ == "__main__":
    settings = {**SETTINGS, "tp_size": 2, "device": "cpu", "skip_tokenizer_init": True}
    engine = Engine(sys.argv[1], inprocess=sys.argv[2] == "True", **settings)
    core = engine.asynchronous.runtime.host.pid
    print(core, *children_of(core, word="headrace.core.rank_process"), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(("inprocess", "stands_still"), [(False, True), (True, False)])
def test_the_parents_death_ends_all_ranks(model_folder: Path, inprocess: bool, stands_still: bool) -> None:
    """Also those that stand still, as above where the core that dies is the parent's."""
    command = [sys.executable, "-c", SCRIPT, str(model_folder), str(inprocess)]
    environment = child_environment()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as parent:
        assert parent.stdout is not None
        core, rank = map(int, parent.stdout.readline().split())
        if stands_still:
            os.kill(rank, signal.SIGSTOP)
        parent.kill()
    wait_for(lambda: is_gone(rank) and is_gone(core))


@pytest.mark.parametrize(
    ("tp_size", "match"), [(0, "tp_size must be"), (3, "do not split"), ("2", "tp_size"), (2.5, "tp_size")]
)
def test_a_number_of_ranks_that_cannot_be_is_refused_by_name(start_ranks: Start, tp_size: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as refusal:
        start_ranks(tp_size=tp_size)
    assert refusal.value.field == "tp_size"


def test_more_stages_than_layers_are_refused_by_name(start_ranks: Start) -> None:
    with pytest.raises(ConfigError, match="pp_size 4.*3 layers") as refusal:
        start_ranks(tp_size=1, pp_size=4)
    assert refusal.value.field == "pp_size"


def test_what_keeps_a_start_from_its_end_is_told(start_ranks: Start, model_folder: Path, tmp_path: Path) -> None:
    """A checkpoint that lacks a tensor is found out by every rank."""
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HeadraceError, match=r"model\.norm\.weight"):
        Engine(tmp_path, tp_size=2, device="cpu", **SETTINGS)
