"""`VerlEngine`: trainers of several real ranks around one engine, held against transformers and a cold load."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from headrace.rl.demo import checkpoint_digests
from headrace.rl.verl_engine import _settings
from tests.free_ports import free_port
from tests.rl import verl_bodies as bodies
from tests.rl.trainer_ranks import run_ranks, start_ranks
from tests.server.builders import save_random_model

ENGINE: dict[str, Any] = {}
INPROCESS: dict[str, Any] = {"inprocess": True}
RANKS: dict[str, Any] = {"tp_size": 2}
SERVER: dict[str, Any] = {"launch_server": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model; `newer/` below it has other weights."""
    path = save_random_model(tmp_path_factory.mktemp("model"), seed=0)
    save_random_model(path / "newer", seed=1)
    return str(path)


@pytest.fixture(scope="module")
def newer(folder: str) -> str:
    return f"{folder}/newer"


@functools.cache
def expected_ids(folder: str) -> list[int]:
    """What transformers generates."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([bodies.PROMPT])
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return list(found[0, len(bodies.PROMPT) :].tolist())


def expected(folder: str) -> tuple[list[int], dict[str, str]]:
    return expected_ids(folder), checkpoint_digests(Path(folder))


def check_live(seen: list[list[Any]], folder: str, leading: tuple[int, ...] = (0,)) -> None:
    """Every rank got what transformers generates from a folder; the engine holds what a cold load of it does."""
    ids, digests = expected(folder)
    assert [each[0] for each in seen] == [ids] * len(seen)
    assert [each[1] for each in seen] == [digests if rank in leading else None for rank in range(len(seen))]


@pytest.mark.parametrize("options", [RANKS, SERVER], ids=["ranks", "server"])
def test_a_sharded_model_changes_the_weights_again_and_again(folder: str, newer: str, options: dict[str, Any]) -> None:
    seen = run_ranks(2, bodies.update_from_fsdp, folder, options)
    for number, live in enumerate((folder, newer, folder, newer)):
        check_live([each[number] for each in seen], live)


@pytest.mark.parametrize("far", [False, True], ids=["same machine", "other machines"])
def test_every_placement_arrives_in_pieces(folder: str, newer: str, far: bool) -> None:
    check_live(run_ranks(4, bodies.update_in_pieces, folder, newer, far), newer)


def test_shards_of_different_sizes(folder: str, newer: str) -> None:
    check_live(run_ranks(3, bodies.update_uneven, folder, newer), newer)


def test_two_engines_of_one_trainer(folder: str, newer: str) -> None:
    check_live(run_ranks(4, bodies.two_engines, folder, newer), newer, leading=(0, 2))


def test_a_generator_may_use_one_buffer_and_an_update_several_calls(folder: str, newer: str) -> None:
    check_live(run_ranks(2, bodies.update_from_one_buffer, folder, newer), newer)


@pytest.mark.parametrize(("num_ranks", "options"), [(4, INPROCESS), (2, SERVER)], ids=["engine", "server"])
def test_a_generator_may_gather_each_tensor_with_a_collective(
    folder: str, newer: str, num_ranks: int, options: dict[str, Any]
) -> None:
    seen = run_ranks(num_ranks, bodies.update_by_collectives, folder, newer, options, seconds=90)
    for found, live in zip(zip(*seen, strict=True), [folder] * 4 + [newer], strict=True):
        check_live([each[1:] for each in found], live)
        assert len({tuple(each[0]) for each in found}) == 1
    assert [error[1] for error, *_ in seen[0]] == ["load_format", "rank", bodies.NORM, bodies.NORM, ""]


@pytest.mark.usefixtures("cold_processes")
@pytest.mark.parametrize("options", [ENGINE, SERVER], ids=["engine", "server"])
def test_what_a_rank_brings_next_is_not_part_of_an_update_that_it_gave_up(
    folder: str, newer: str, options: dict[str, Any]
) -> None:
    seen = run_ranks(2, bodies.give_updates_up, folder, newer, options)
    for how in ("late", "stopped"):
        (leading, old), (following, also_old) = (each[how] for each in seen)
        assert following[0][:2] == ("DeadlineError", "rank_timeout")
        error, label, digests = leading
        assert digests == checkpoint_digests(Path(newer if label == "given up" else folder)), error
        check_live([old, also_old], folder)


def test_an_error_is_that_of_all_ranks_and_changes_nothing(folder: str, newer: str) -> None:
    seen = run_ranks(2, bodies.refusals, folder, newer)
    check_live([after for _, after in seen], newer)
    fields = {
        **{"rank 0 has fewer": "last", "rank 1 has fewer": "last", "another order": "lm_head.weight"},
        **{"another shape": bodies.NORM, "a shape that no rank can mean": bodies.NORM, "an unknown name": "nobody"},
        **{"not finite": bodies.NORM, "no tensor": bodies.NORM, "no pairs": "named_tensors"},
        **{"load format": "load_format", "flush cache": "flush_cache", "version": "version", "mode": "mode"},
        **{"prompt": "input_ids", "parameters": "sampling_params.top_p"},
        **{"infinite": "sampling_params[0].temperature", "image": "image_data", "streamed": "stream"},
        **{"tags": "tags", "pause": "mode", "different calls": "rank"},
    }
    fields |= {what: "rank" for what in seen[0][0] if "within" in what}
    (leading, _), (following, _) = seen
    for what, field in fields.items():
        assert leading[what] == following[what], what
        assert leading[what][0] in ("WeightUpdateError", "RequestError"), (what, leading[what])
        assert field == "last" or leading[what][1] == field, (what, leading[what])
    assert leading["what had come before is forgotten"] == ("no error", "", "None")
    for rank, found in enumerate((leading, following)):
        for on in (0, 1):
            kind, field, message = found[f"generator of rank {on}"]
            assert (kind, field) == (("ValueError", "") if on == rank else ("WeightUpdateError", "rank"))
            assert "on fire" in message and (on == rank or f"rank {on} failed: ValueError" in message)


@pytest.mark.parametrize("options", [INPROCESS, SERVER], ids=["engine", "server"])
def test_control(folder: str, newer: str, options: dict[str, Any]) -> None:
    leading, following = run_ranks(2, bodies.control, folder, newer, options)
    many, *ids, end, streamed, closed = leading
    assert leading[:-1] == following[:-1]
    assert closed[0] == following[-1][0] == "ShutdownError"
    assert ids == [expected_ids(folder)] * 3 and end == "abort" and streamed == ("RequestError", "stream")
    assert [each["meta_info"]["id"] for each in many] == ["a_0", "a_1", "b_0", "b_1"]
    assert all(len(each["output_ids"]) == 12 and isinstance(each["text"], str) for each in many)
    assert all(len(each["meta_info"]["output_top_logprobs"][0]) == 2 for each in many)


def test_http_in_front_of_an_engine_that_runs(folder: str) -> None:
    leading, following = run_ranks(2, bodies.served, folder)
    assert leading[0] == following[0]
    (ids, metrics, refused), called = leading[1:]
    assert ids == expected_ids(folder) and "headrace_num_generated_tokens" in metrics and refused == "ConfigError"
    assert called == ["ready"] and following[1:] == [[]]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", [bodies.KILL, bodies.STOP], ids=["killed", "stopped"])
def test_a_lost_rank_is_named(folder: str, how: int, which: int) -> None:
    started = start_ranks(3, bodies.lost, folder, int(how), which)
    try:
        for rank in {0, 1, 2} - {which}:
            error, is_soon = started.result(rank)
            kind, verb = ("UnavailableError", "is gone") if how == bodies.KILL else ("DeadlineError", "has not come")
            assert error[0] == kind and f"rank {which} {verb}" in error[2], error
            assert is_soon
    finally:
        pid = started.processes[which].pid
        if how == bodies.STOP and pid is not None:
            os.kill(pid, signal.SIGKILL)
        started.end()


def test_bad_settings_are_those_of_all(folder: str) -> None:
    for *found, ids in run_ranks(2, bodies.refused_settings, folder):
        fields = ["no_such", "nnodes", "model_path", "dtype", "rank_timeout", "rank_timeout", "launch_server"]
        assert found == [("ConfigError", field) for field in (*fields, *["device_mesh_cpu"] * 3)]
        assert ids == expected_ids(folder)


@pytest.mark.parametrize(("options", "num_updates"), [(ENGINE, 1000), (SERVER, 100)], ids=["engine", "server"])
def test_a_thousand_updates_leave_nothing_behind(tmp_path: Path, options: dict[str, Any], num_updates: int) -> None:
    old, new = (str(save_random_model(tmp_path / str(seed), seed, num_layers=1)) for seed in (0, 1))
    seen = run_ranks(2, bodies.many_updates, old, new, num_updates, options, seconds=500)
    for sizes, ids in seen:
        assert sizes[0] == sizes[1]
        assert ids == expected_ids(new)


def test_stages_leave_fewer_ranks_for_each() -> None:
    given = {"model_path": "m", "pipeline_parallel_size": 2}
    assert _settings(given, 4, 1) == {"nnodes": 1, "model": "m", "tp_size": 2, "pp_size": 2}
    assert _settings({**given, "tp_size": 1}, 4, 1)["tp_size"] == 1
    assert _settings({"model": "m"}, 4, 1) == {"nnodes": 1, "model": "m", "tp_size": 4}


@pytest.mark.parametrize(("children", "options"), [([0, 0, 2, 0], ENGINE), ([0, 1], SERVER)], ids=["engine", "server"])
def test_an_engine_over_two_nodes_of_the_mesh(
    folder: str, newer: str, children: list[int], options: dict[str, Any]
) -> None:
    """Two process trees, which meet at an address of loopback: of each the first trainer starts what is there."""
    seen = run_ranks(len(children), bodies.over_nodes, folder, newer, f"127.0.0.2:{free_port()}", options)
    for number, live in enumerate((folder, newer)):
        check_live([each[number] for each in seen], live)
    assert [each[2] for each in seen] == children, "ranks that are children of a trainer"
    assert not any(each[3] for each in seen)


def test_what_keeps_a_node_from_its_part_all_ranks_raise(folder: str) -> None:
    """Before the engine is started; a rank that was told another number of nodes is named."""
    seen = run_ranks(4, bodies.refused_nodes, folder, f"127.0.0.2:{free_port()}")
    assert [each[0] for each in seen] == [("ConfigError", "dtype")] * 4
    assert [each[1] for each in seen] == [("ConfigError", "HEADRACE_DIST_SECRET")] * 4
    assert [each[2] for each in seen] == [("RequestError", "rank")] * 4
