"""Memory given back and taken again: it is really free, everything comes back bit for bit, and nobody is lost."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import (
    CheckpointError,
    Engine,
    HeadraceError,
    NeedsWeightsError,
    PauseTimeoutError,
    RequestError,
    SamplingParams,
    UpdateConflictError,
)
from headrace.types.generation import Generation
from tests.engine.builders import model_of, named_tensors

Start = Callable[..., Engine]
ALL = ("cuda_graph", "kv_cache", "weights")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]
PARAMS = SamplingParams(max_new_tokens=12, temperature=1.0, ignore_eos=True, seed=3)
FEW = SamplingParams(max_new_tokens=3, temperature=1.0, ignore_eos=True, seed=3)
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True, seed=5)
KEPT = SamplingParams(max_new_tokens=80, ignore_eos=True, seed=5)
NUM_CYCLES = int(os.environ.get("HEADRACE_MEMORY_CYCLES", "2"))
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1 << 15,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
}
"""Of much memory and little work: a wide head, and many pages' worth of layers."""


def answers(engine: Engine, **options: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities, bit for bit: one prompt after the other, since the steps that prompts share depend
    on time."""
    found = [engine.generate(input_ids=prompt, sampling_params=PARAMS, **options)[0] for prompt in PROMPTS]
    return [(list(each.token_ids), list(each.logprobs)) for each in found]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def core_pid(engine: Engine) -> int:
    pid = engine.asynchronous.runtime.supervisor.host.pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("is_other_process", [True, False])
def test_a_release_gives_the_memory_to_the_system_before_it_returns(tmp_path: Path, is_other_process: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1, "seed": 0}
    settings["numerics"] = "invariant"  # whatever steps the prompts of a call come into
    with Engine(tmp_path, inprocess=not is_other_process, kv_pool_tokens=1 << 15, **settings) as engine:
        pid = core_pid(engine) if is_other_process else os.getpid()
        prompts = [[number + 1] * 500 for number in range(2)]
        expected = engine.generate(input_ids=prompts, sampling_params=FEW)
        weights = 4 * (2 * (1 << 15) * 128 + 128 + 16 * (4 * 128 * 128 + 3 * 128 * 128 + 2 * 128))
        pages = 2 * 500 * engine.resolved.kv_bytes_per_token
        gc.collect()
        before = resident_bytes(pid)
        engine.release_memory_occupation(["kv_cache"])
        without_kv = resident_bytes(pid)
        engine.release_memory_occupation()
        without_both = resident_bytes(pid)
        assert before - without_kv > 0.95 * pages
        assert without_kv - without_both > 0.95 * weights
        engine.resume_memory_occupation(restore="disk")
        found = engine.generate(input_ids=prompts, sampling_params=FEW)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert [each.logprobs for each in found] == [each.logprobs for each in expected]


@pytest.mark.parametrize(("restore", "overlap_depth"), [("copy", 0), ("disk", 1), ("auto", 1), ("update", 0)])
def test_cycles_move_no_bit(start: Start, restore: str, overlap_depth: int) -> None:
    """Whatever the steps are that the prompts of a call come into."""
    kept = restore in ("copy", "auto")
    engine = start(keep_weights_copy=kept, overlap_depth=overlap_depth, numerics="invariant")
    digests, expected = engine.digest(), answers(engine)
    for _ in range(NUM_CYCLES):
        engine.release_memory_occupation()
        if restore == "update":
            engine.resume_memory_occupation(["weights"])
            engine.update_weights_from_tensor(named_tensors(model_of(0)), "v1")
            engine.resume_memory_occupation(["kv_cache", "cuda_graph"])
        else:
            engine.resume_memory_occupation(restore=restore)  # type: ignore[arg-type]
        assert answers(engine) == expected
        assert engine.digest() == digests
    if restore != "update":
        status = engine.status()
        assert (status.version, status.epoch, status.state) == ("default", 0, "ready")


def test_the_flow_of_a_colocated_trainer(start: Start) -> None:
    engine, cold = start(), start()
    cold.update_weights_from_tensor(named_tensors(model_of(5)), "step-1")
    expected = answers(cold)
    answers(engine)
    engine.release_memory_occupation()
    assert engine.status().released == ALL and engine.is_alive
    assert not engine.is_ready
    engine.resume_memory_occupation(["weights"])
    with pytest.raises(NeedsWeightsError):
        answers(engine)
    report = engine.update_weights_from_tensor(named_tensors(model_of(5)), "step-1")
    assert report.epoch == 1
    engine.resume_memory_occupation(["kv_cache"])
    engine.resume_memory_occupation(["cuda_graph"])
    assert (engine.is_ready, engine.version) == (True, "step-1")
    assert answers(engine) == expected and engine.digest() == cold.digest()


def run_long(engine: Engine, found: list[Generation]) -> threading.Thread:
    """Generate in another thread, far enough that there are tokens."""
    thread = threading.Thread(target=lambda: found.extend(engine.generate(input_ids=PROMPTS, sampling_params=LONG)))
    thread.start()
    deadline = time.monotonic() + 60
    while engine.metrics()["num_generated_tokens"] < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return thread


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_requests_in_flight_are_answered_with_what_they_have(start: Start, overlap_depth: int) -> None:
    engine, found = start(overlap_depth=overlap_depth), list[Generation]()
    thread = run_long(engine, found)
    engine.release_memory_occupation(["kv_cache"])
    thread.join(60)
    assert [each.finish_reason for each in found] == ["abort", "abort"]
    assert all(0 < len(each.token_ids) == len(each.logprobs) < 900 for each in found)


@pytest.mark.parametrize("tags", [["kv_cache"], None])
def test_requests_that_are_kept_end_as_if_nothing_had_been(start: Start, tags: list[str] | None) -> None:
    engine, found = start(keep_weights_copy=True, numerics="invariant"), list[Generation]()
    expected = engine.generate(input_ids=PROMPTS, sampling_params=KEPT)
    engine.flush_cache()
    before = engine.metrics()["num_generated_tokens"]
    thread = threading.Thread(target=lambda: found.extend(engine.generate(input_ids=PROMPTS, sampling_params=KEPT)))
    thread.start()
    while engine.metrics()["num_generated_tokens"] < before + 8:
        time.sleep(0.01)
    engine.release_memory_occupation(tags, in_flight="recompute")  # type: ignore[arg-type]
    assert not found
    engine.resume_memory_occupation()
    thread.join(60)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.logprobs for each in found] == [each.logprobs for each in expected]
    assert all(each.finish_reason == "length" for each in found)


def test_requests_that_come_meanwhile_wait(start: Start) -> None:
    engine = start(keep_weights_copy=True, pause_timeout=0.3)
    engine.release_memory_occupation(["weights"])
    with pytest.raises(PauseTimeoutError):
        answers(engine)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(answers(engine)))
    thread.start()
    engine.resume_memory_occupation()
    thread.join(60)
    assert len(found) == len(PROMPTS)


def test_what_asks_for_released_weights_is_refused(start: Start) -> None:
    engine = start(keep_weights_copy=True)
    engine.release_memory_occupation(["weights"])
    assert engine.version == ""
    for call in (
        engine.digest,
        lambda: engine.get_weights_by_name("model.norm.weight"),
        lambda: engine.set_weight_version("v3"),
        lambda: engine.weights_checker("snapshot"),
    ):
        with pytest.raises(NeedsWeightsError, match="resume_memory_occupation"):
            call()
    with pytest.raises(UpdateConflictError, match="resume_memory_occupation"):
        engine.update_weights_from_tensor(named_tensors(model_of(1)), "v3")
    engine.resume_memory_occupation()
    assert engine.version == "default"


def test_an_open_update_refuses_a_release(start: Start) -> None:
    engine = start()
    manifest = [(name, tuple(tensor.shape), "float32") for name, tensor in named_tensors(model_of(1))]
    session = engine.begin_update("v1", manifest)
    with pytest.raises(UpdateConflictError, match=f"session {session.session_id} is open"):
        engine.release_memory_occupation()
    engine.abort_update(session)
    engine.release_memory_occupation()


def test_nothing_of_before_is_matched_after(start: Start) -> None:
    engine = start(keep_weights_copy=True)
    answers(engine)
    engine.release_memory_occupation(["kv_cache"])
    assert engine.metrics()["num_cached_pages"] == 0
    engine.resume_memory_occupation()
    found = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    assert [each.num_cached_tokens for each in found] == [0, 0]


def test_weights_come_back_from_the_folder_only_as_they_were(start: Start, model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    engine = start(folder)
    digests, expected = engine.digest(), answers(engine)
    engine.release_memory_occupation()
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    model_of(3).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="not those of the start") as caught:
        engine.resume_memory_occupation(restore="disk")
    assert caught.value.field == "restore" and engine.status().released == ALL
    with pytest.raises(UpdateConflictError) as conflict:
        engine.resume_memory_occupation(restore="copy")
    assert conflict.value.field == "restore"
    weights.write_bytes(kept)
    with pytest.raises(CheckpointError):
        engine.resume_memory_occupation(restore="disk")  # nobody knows that it is the same file again
    engine.resume_memory_occupation()
    engine.update_weights_from_disk(folder, "again")
    assert engine.digest() == digests and answers(engine) == expected


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda engine: engine.release_memory_occupation(["kv"]), "tags"),
        (lambda engine: engine.release_memory_occupation("weights"), "tags"),
        (lambda engine: engine.release_memory_occupation([None]), "tags"),
        (lambda engine: engine.release_memory_occupation(in_flight="keep"), "in_flight"),
        (lambda engine: engine.release_memory_occupation(timeout=-1), "timeout"),
        (lambda engine: engine.resume_memory_occupation(7), "tags"),
        (lambda engine: engine.resume_memory_occupation(restore="host"), "restore"),
    ],
)
def test_bad_arguments_are_named(engine: Engine, call: Callable[[Engine], None], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        call(engine)
    assert caught.value.field == field
    assert engine.status().released == ()


def test_no_tags_and_doubled_tags(start: Start) -> None:
    engine = start(keep_weights_copy=True)
    engine.release_memory_occupation([])
    assert engine.status().released == ALL
    engine.resume_memory_occupation(["weights", "weights"])
    assert engine.status().released == ALL[:2]
    engine.resume_memory_occupation([])
    assert engine.status().released == ()


def test_a_core_that_takes_a_dead_ones_place_holds_no_more_memory_than_it(start: Start) -> None:
    engine = start(inprocess=False, max_core_restarts=1)
    expected = answers(engine)
    engine.release_memory_occupation()
    os.kill(core_pid(engine), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        try:
            if engine.status().released == ALL:
                break
        except HeadraceError:
            time.sleep(0.05)
    engine.resume_memory_occupation(restore="disk")
    assert answers(engine) == expected
