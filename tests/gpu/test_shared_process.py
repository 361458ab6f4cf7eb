"""An engine in a trainer's process: on the trainer's device, beside its captures, without touching its settings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import Engine, SamplingParams
from headrace.engine.update_session import manifest_of
from tests.gpu.builders import SETTINGS
from tests.parity.models import make_model, save_model

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL: dict[str, Any] = {**SETTINGS, "kv_pool_tokens": 1 << 13, "max_running_requests": 16, "dtype": "bfloat16"}
PROMPTS = [[index % 90 + 1 for index in range(length)] for length in (3, 17, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", head_dim=64, **SIZES), tmp_path_factory.mktemp("tiny"))


def generate(engine: Engine, num_tokens: int = 64) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, seed=3)
    return [found.token_ids for found in engine.generate(input_ids=PROMPTS, sampling_params=params)]


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """`work` again and again in another thread; its first failure is raised at the end."""
    is_over = threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        while not is_over.is_set() and not failures:
            try:
                work()
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert not failures, failures


def test_an_engine_runs_on_the_callers_current_device(folder: Path) -> None:
    last = torch.cuda.device_count() - 1
    others = [torch.cuda.memory_allocated(index) for index in range(last)]
    before = torch.cuda.memory_allocated(last)
    with torch.cuda.device(last):
        stream = torch.cuda.current_stream()
        with Engine(folder, **SMALL) as engine:
            generate(engine)
            assert torch.cuda.memory_allocated(last) > before
            assert [torch.cuda.memory_allocated(index) for index in range(last)] == others
            assert torch.cuda.current_device() == last and torch.cuda.current_stream() == stream
        with Engine(folder, **{**SMALL, "inprocess": False}) as engine:
            found = engine.resolved.cuda
            assert found is not None and found.index == last and len(generate(engine)) == 3


def test_a_trainer_may_capture_while_the_engine_works(folder: Path) -> None:
    """In the mode that is torch's default, which forbids other threads what might be unsafe."""
    x = torch.ones(64, 64, device="cuda")
    stream = torch.cuda.Stream()

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            y = x
            for _ in range(200):
                y = y * 1.0
            graph.capture_end()
            graph.replay()
        stream.synchronize()
        assert torch.equal(y, x)

    with Engine(folder, **SMALL, numerics="invariant") as engine:
        expected = generate(engine, 200)
        with beside(capture):
            for _ in range(5):
                assert generate(engine, 200) == expected
        assert engine.metrics()["num_failed_steps"] == 0


def test_an_engine_starts_while_a_trainer_allocates_and_waits(folder: Path) -> None:
    """Its captures do not mind."""

    def work() -> None:
        torch.empty(1 << 26, dtype=torch.uint8, device="cuda").fill_(1)
        torch.cuda.current_stream().synchronize()

    with beside(work), Engine(folder, **SMALL) as engine:
        assert len(generate(engine)) == 3


def test_the_precision_of_a_trainers_products_is_never_touched(folder: Path) -> None:
    seen: set[str] = set()
    torch.set_float32_matmul_precision("medium")
    try:
        with Engine(folder, **SMALL) as engine, beside(lambda: seen.add(torch.get_float32_matmul_precision())):
            generate(engine)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"medium"}


def test_a_commit_is_answered_when_the_device_has_copied(folder: Path) -> None:
    """And is staged beside the steps: requests go on meanwhile."""
    with Engine(folder, **SMALL) as engine:
        model = make_model("qwen3", seed=1, head_dim=64, **SIZES)
        tensors = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
        manifest = manifest_of((name, tensor.shape, str(tensor.dtype)) for name, tensor in tensors)
        before, deadline = engine.digest(), time.monotonic() + 60
        with beside(lambda: generate(engine, 128)):
            session = engine.begin_update("v1", manifest, mode="shadow", in_flight="keep")
            engine.stage(session, tensors[:1])
            while not engine.metrics()["staged_steps"]:
                assert time.monotonic() < deadline
            engine.stage(session, tensors[1:])
            report = engine.commit(session)
        assert report.version == "v1" and report.pause_ms > 0.0
        assert engine.digest().keys() == before.keys() and engine.digest() != before
