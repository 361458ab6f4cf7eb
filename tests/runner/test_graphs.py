"""Which graphs are captured, dropped and captured again, over a fake of torch. What a device shows is in tests/gpu."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.layers.linear import GemmCounter
from headrace.runner.graphs import Graphs


class FakeTorch:
    """Keeps account of the graphs that hold memory of a pool, and of what is done in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.held: list[Any] = []
        self.pools = iter(range(1, 1000))
        self.is_capturing = False
        self.free_bytes = 1000

    def graph_type(self) -> Any:
        fake = self

        class Graph:
            pool = 0

            def capture_begin(self, pool: int, *, capture_error_mode: str) -> None:
                assert not gc.isenabled() and capture_error_mode == "thread_local"
                self.pool, fake.is_capturing = pool, True
                fake.held.append(self)

            def capture_end(self) -> None:
                fake.is_capturing = False

            def replay(self) -> None:
                assert self in fake.held
                fake.done.append("replay")

            def reset(self) -> None:
                if self in fake.held:
                    fake.held.remove(self)

        return Graph

    def segments(self, pool: int, *, include_traces: bool) -> list[dict[str, int]]:
        """Each graph takes some more of its pool."""
        assert not include_traces
        return [{"total_size": 200} for graph in self.held if graph.pool == pool]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorch]:
    found = FakeTorch()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", found.graph_type())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(found.pools))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (found.free_bytes, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", found.segments)
    yield found
    assert gc.isenabled()


def bodies(fake: FakeTorch, counter: GemmCounter) -> dict[str, Callable[[], None]]:
    def body(name: str) -> Callable[[], None]:
        def run() -> None:
            counter.num_calls += 2
            fake.done.append(f"{'capture' if fake.is_capturing else 'run'} {name}")

        return run

    return {name: body(name) for name in ("large", "small", "sample")}


def test_what_was_dropped_is_captured_again_in_its_order_and_run_as_it_is_meanwhile(fake: FakeTorch) -> None:
    counter = GemmCounter()
    graphs, found = Graphs(counter, enabled=True), bodies(fake, counter)
    for key, body in found.items():
        graphs.capture(key, body, (lambda: fake.done.append("run few")) if key == "large" else None)
    assert fake.done[0] == "run few", "what is run ahead of a capture may be less"
    fake.done[0] = "run large"
    assert fake.done == [f"{how} {name}" for name in found for how in ("run", "capture")]
    pools = {graph.pool for graph in fake.held}
    for _ in range(2):
        graphs.drop()
        assert not fake.held and graphs.num_graphs == 0 and list(graphs.dropped) == list(found)
    fake.done.clear()
    graphs.run("small", found["small"])
    assert fake.done == ["run small"] and graphs.num_replays == 0
    fake.done.clear()
    for again in list(graphs.dropped):
        graphs.capture_again(again)
    assert fake.done == [f"capture {name}" for name in found] and not list(graphs.dropped)
    assert len({graph.pool for graph in fake.held} | pools) == 2  # one pool of all each time
    before = counter.num_calls
    graphs.run("small", found["small"])
    assert fake.done[-1] == "replay" and graphs.num_replays == 1 and counter.num_calls == before + 2


def test_a_capture_that_fails_holds_nothing_even_while_its_error_is_kept(fake: FakeTorch) -> None:
    counter = GemmCounter()
    graphs, found = Graphs(counter, enabled=True), bodies(fake, counter)
    graphs.capture("large", found["large"])
    is_short = False

    def body() -> None:
        if is_short:
            raise torch.OutOfMemoryError("CUDA out of memory")

    graphs.capture("small", body)
    graphs.drop()
    graphs.capture_again("large")
    is_short = True
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture_again("small")
    assert len(fake.held) == 1 and list(graphs.dropped) == ["small"]
    graphs.drop()
    assert not fake.held
    is_short = False
    for key in list(graphs.dropped):
        graphs.capture_again(key)
    assert len(fake.held) == 2


def test_without_room_for_all_none_is_captured(fake: FakeTorch) -> None:
    """Nor after a drop of some: what all of them had is what counts."""
    graphs = Graphs(GemmCounter(), enabled=True)
    for key, body in bodies(fake, GemmCounter()).items():
        graphs.capture(key, body)
    graphs.drop()
    fake.free_bytes = 600
    graphs.check_room()
    graphs.capture_again("large")
    graphs.drop()
    fake.free_bytes = 599
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        graphs.check_room()


def test_without_graphs_there_is_nothing_to_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace())  # of which nothing is asked
    counter = GemmCounter()
    graphs, done = Graphs(counter, enabled=False), list[str]()
    graphs.capture("key", lambda: done.append("run"))
    graphs.drop()
    assert not list(graphs.dropped)
    graphs.run("key", lambda: done.append("run"))
    assert done == ["run", "run"] and graphs.num_graphs == 0
