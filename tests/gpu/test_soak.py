"""Mixed traffic for a while, then silence: every page and every byte is back, and everybody has had one answer.

`make test-gpu SOAK=300` sets the number of seconds.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

from headrace import Engine
from tests.gpu.builders import Checkpoints, Starter, check_greedy, greedy, wait_for
from tests.gpu.soak import Client, Control, Shared, find_probes

SECONDS = float(os.environ.get("HEADRACE_SOAK_SECONDS") or 20)
NUM_CLIENTS = 16
POOL_TOKENS = 4096


@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_mixed_traffic_leaves_nothing_behind(checkpoints: Checkpoints, start: Starter, num_devices: int) -> None:
    if torch.cuda.device_count() < num_devices:
        pytest.skip("one device")
    variant = "qwen3" if num_devices == 1 else "qwen3-even-vocabulary"
    versions = {"first": checkpoints.get(variant), "second": checkpoints.get(variant, seed=1)}
    probes = find_probes(versions, count=4)
    engine = start(
        versions["first"],
        dtype="float32",
        initial_version="first",
        kv_pool_tokens=POOL_TOKENS,
        max_running_requests=64,
        max_num_batched_tokens=256,
        tp_size=num_devices,
        inprocess=num_devices == 1,
    )
    pages, num_bytes = engine.metrics()["num_free_pages"], allocated_bytes()
    shared = Shared(engine, probes)
    weights = {version: checkpoint.named_tensors() for version, checkpoint in versions.items()}
    clients, control = [Client(shared, number) for number in range(NUM_CLIENTS)], Control(shared, weights)
    for thread in (*clients, control):
        thread.start()
    shared.is_over.wait(SECONDS)
    shared.is_over.set()
    for thread in (control, *clients):
        thread.join(120.0)
        assert not thread.is_alive(), f"{thread.name} still waits for an answer"
    if shared.failures:
        raise shared.failures[0]

    assert sum(client.num_asked for client in clients) == sum(client.num_answered for client in clients) > 0
    check_that_it_happened(engine, clients, control)
    last = versions[engine.version]
    for probe, piece in zip(
        probes,
        engine.generate(input_ids=[probe.prompt for probe in probes], sampling_params=greedy(16)),
        strict=True,
    ):
        check_greedy(last, probe.prompt, piece, 1e-4)
    wait_for(lambda: engine.metrics()["num_running"] == engine.metrics()["num_waiting"] == 0)
    engine.flush_cache()
    metrics = engine.metrics()
    assert metrics["num_used_tokens"] == metrics["num_cached_pages"] == 0
    assert metrics["num_free_pages"] == pages
    assert metrics["num_failed_steps"] == metrics["num_invariant_breaches"] == 0
    assert allocated_bytes() == num_bytes


def allocated_bytes() -> int:
    """What this process's tensors hold on the device."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def check_that_it_happened(engine: Engine, clients: list[Client], control: Control) -> None:
    """A soak in which nothing was preempted, aborted or updated would prove little."""
    metrics = engine.metrics()
    for name in ("num_preemptions", "num_aborted", "num_chunked_prompts", "num_shared_prefills", "num_cached_tokens"):
        assert metrics[name] > 0, f"{name} is 0"
    assert metrics["num_updates"] == control.num_updates > 0
    assert control.num_pauses > 0
    assert sum(client.num_probed for client in clients) > 0
