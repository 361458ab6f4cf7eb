"""The rule of deadlines, over random commands that are given up, time out and are tried again.

What was not acknowledged never happens later, what was acknowledged happened once, and what its caller gave up is over
before the caller goes on: a pause given up pauses nobody, and the next update finds no session open.

A real front and a real core over a link of one process. Time is virtual: it passes while the core executes a step or
moves weights, and the front goes on meanwhile, as in two processes. No torch.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest

from headrace.config import ModelSpec, ResolvedConfig, SettledConfig
from headrace.core.executor import CheckpointSlices
from headrace.core.fake_executor import FreeExecutor, FreeWeights
from headrace.core.loop import CoreLoop
from headrace.engine.client import CoreClient
from headrace.engine.control import UpdateTerms
from headrace.engine.health import HealthLimits
from headrace.engine.lookback import Lookback
from headrace.engine.update import Updater
from headrace.ipc import Pulse, PulsePage, make_pair
from headrace.types.errors import DeadlineError, HeadraceError, ShutdownError, UpdateConflictError
from headrace.types.memory import MemoryTag, Restore
from headrace.types.messages import (
    AbortUpdate,
    BeginUpdate,
    Command,
    CommitUpdate,
    CoreReady,
    DescribeWeights,
    Digest,
    Discard,
    ExtendUpdate,
    FlushCache,
    FreezeGc,
    GetWeight,
    JoinGroup,
    LeaveGroup,
    Pause,
    Profile,
    Receive,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    SetVersion,
    SlowDown,
    Stage,
    StagePayload,
    UpdateFromDisk,
    WeightsChecker,
)
from headrace.types.plan import StepResult
from headrace.types.request import Delta, Request, pack_ids
from headrace.types.weights import TensorInfo, UpdateMode, UpdateReport
from headrace.weights.memory import ResolvedMode, Ticket
from tests.rounds import rounds

NUM_WORLDS = 20
NUM_SEQUENCES = rounds(60)
MAX_LIMIT = 8.0
LONGEST_TURN = 16.0
VOCAB_SIZE = 101
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
TENSORS = {f"t{number}": np.zeros(4, np.float32) for number in range(3)}
INFOS = [TensorInfo(name, (4,), "float32") for name in TENSORS]
SMALL: dict[str, tuple[Callable[[int], Command], Any]] = {
    "relabel": (lambda call_id: SetVersion(call_id, "relabelled"), NoneType),
    "flush": (FlushCache, int),
    "slow": (lambda call_id: SlowDown(call_id, 0.0), NoneType),
    "reset": (lambda call_id: WeightsChecker(call_id, "reset_tensors"), dict[str, str]),
    "digest": (Digest, dict[str, str]),
    "release": (lambda call_id: ReleaseMemory(call_id, ("kv_cache",), "recompute"), NoneType),
    "take": (lambda call_id: ResumeMemory(call_id, ("kv_cache",)), NoneType),
}
"""Calls that are one command, and what they are answered with."""

UPDATE_CALLS: tuple[type, ...] = (BeginUpdate, Stage, CommitUpdate, AbortUpdate, UpdateFromDisk)
TRIED: tuple[type, ...] = (Pause, Resume, *UPDATE_CALLS, *(type(make(0)) for make, _ in SMALL.values()))
NOT_TRIED: dict[type, str] = {
    **dict.fromkeys((GetWeight, DescribeWeights), "tests/core/test_reading.py: a read, as a digest is"),
    ExtendUpdate: "tests/core/test_open_sessions.py: late and given up",
    **dict.fromkeys((FreezeGc, Profile), "tests/core/test_commands.py, tests/core/test_probing.py: done at once"),
    StagePayload: "tests/core/test_open_sessions.py and tests/core/test_commands.py: an upload, as Stage is",
    **dict.fromkeys(
        (JoinGroup, LeaveGroup, Receive, Discard), "tests/core/test_commands.py, tests/engine/test_weight_groups.py"
    ),
}
"""Commands with a deadline that these sequences send, and where the others' deadlines are tested."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when it waits, and only then."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def wait(timeout: float | None) -> Any:
            assert timeout is not None, "everything waits for something that never comes"
            self.now += max(timeout, 0.0)
            return select(0)

        selector.select = wait

    def time(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        """Whoever waits on the loop goes on for so long."""
        self.call_at(self.now + seconds, self.stop)
        self.run_forever()


class Attempt:
    """One call of one caller, and what came of it. `keys` are what its effects go by in the log."""

    def __init__(self, name: str, key: Any = None) -> None:
        self.name = name
        self.key = key
        self.outcome = ""
        self.error: BaseException | None = None
        self.over_at = 0
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"{self.name}({self.key}): {self.outcome}, {self.error!r}"


class World:
    """A front, a core, and the log of what the core did, in order."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.clock = VirtualLoop()
        self.log: list[tuple[str, Any]] = []
        self.claimed = 0
        self.num_labels = 0
        page = PulsePage()
        pulse = Pulse(page)
        claim = pulse.claim
        front, self.link = make_pair()
        self.weights = SlowWeights(self)
        executor = SlowExecutor(self)
        self.core = CoreLoop(settings(seed % 2), executor, self.link, clock=self.clock.time, pulse=pulse)

        def claims(call_id: int) -> None:
            self.claimed = call_id
            claim(call_id)

        pulse.claim = claims  # type: ignore[method-assign]
        self._spy()
        limits = HealthLimits(watchdog=1e9, patience=1e9, hopeless=1e9)
        self.client = CoreClient(front, page, MAX_LIMIT, lambda _: None, limits, clock=self.clock.time)
        self.updater = Updater(self.client, self.clock, Lookback(), shares_process=False)
        self.link.send(CoreReady())
        start = self.clock.create_task(self.client.start(60.0))
        self.run_until(start.done)
        start.result()

    def _spy(self) -> None:
        """Log what changes a replica, by the call the core has come to."""
        replica = self.core.replica
        watched: list[tuple[str, Any, str]] = [
            ("resume", replica.pause, "resume"),
            ("flush", replica.scheduler, "flush_cache"),
            ("relabel", replica.update.machine, "relabel"),
            ("reset", replica.update.machine, "lose"),
        ]
        for name, owner, method in watched:
            setattr(owner, method, self._logged(name, getattr(owner, method)))
        commit = replica.update.machine.commit

        def logged_commit(session_id: int) -> Any:
            is_live = commit(session_id)
            self.log.append(("commit", replica.update.machine.version))
            return is_live

        replica.update.machine.commit = logged_commit  # type: ignore[method-assign]

    def _logged(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*arguments: Any) -> Any:
            result = method(*arguments)
            self.log.append((name, self.claimed))
            return result

        return spy

    def lose_time(self, most: float) -> None:
        """The core is busy, mostly shortly and sometimes for as long as deadlines are."""
        seconds = self.chance.choice([0.0, 0.02, 0.1, 0.1, most])
        self.clock.pass_time(seconds * self.chance.random())

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Turn the core until then."""
        for _ in range(5000):
            if condition():
                return
            self.clock.pass_time(self.chance.choice([0.0, 0.01, 0.1]))
            self.core.turn(0.0)
        raise AssertionError("somebody waits for ever")

    def label(self) -> str:
        self.num_labels += 1
        return f"v{self.num_labels}"

    def close(self) -> None:
        ending = self.clock.create_task(self.client.close(ShutdownError("over")))
        self.clock.run_until_complete(ending)
        self.clock.run_until_complete(self.updater.close())
        self.clock.close()


class SlowExecutor(FreeExecutor):
    """Steps that take time, and a folder with weights."""

    def __init__(self, world: World) -> None:
        super().__init__(VOCAB_SIZE, weights=world.weights)
        self._world = world

    def collect(self) -> StepResult:
        self._world.lose_time(3.0)
        return super().collect()

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        yield from self._move("release")

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        yield from self._move("take")

    def _move(self, name: str) -> Generator[None]:
        for _ in range(3):
            self._world.lose_time(1.0)
            yield
        self._world.log.append((name, self._world.core.replica.memory.jobs[0].command.call_id))

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        for _ in range(2):
            self._world.lose_time(0.5)
            yield
        return INFOS, iter(TENSORS.items())


class SlowWeights(FreeWeights):
    """Weights whose every handling takes time."""

    def __init__(self, world: World) -> None:
        self._world = world

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode:
        self._world.lose_time(1.0)
        return super().begin(manifest, mode, partial)

    def stage(self, index: int, data: Any, start: int | None = None) -> Any:
        return SlowCopy(self._world)

    def commit(self) -> Ticket:
        self._world.lose_time(3.0)
        return super().commit()

    def digest_in_slices(self, rank: int | None = None) -> Iterator[tuple[str, str] | None]:
        for name in TENSORS:
            self._world.lose_time(0.1)
            yield name, "hash"


class SlowCopy:
    def __init__(self, world: World) -> None:
        self.has_written = False
        self._world = world

    def advance(self, budget_s: float) -> bool:
        self.has_written = True
        self._world.lose_time(1.0)
        return self._world.chance.random() < 0.7


def settings(overlap_depth: int) -> ResolvedConfig:
    sizes: dict[str, Any] = {"max_num_batched_tokens": 64, "page_size": 4, "max_running_requests": 4}
    engine = SettledConfig(model="tiny", seed=0, overlap_depth=overlap_depth, pause_timeout=1e6, **sizes)
    return ResolvedConfig(
        engine=engine,
        model=ModelSpec.from_config(LLAMA),
        folder="",
        device="cpu",
        dtype="float32",
        kv_dtype="float32",
        context_length=256,
        num_pages=257,
        num_threads=1,
        attention_backend="cpu",
        explanations=(),
    )


class Sink:
    """Whoever asked for a sequence; what comes of it is not looked at here."""

    def on_delta(self, delta: Delta) -> None: ...

    def on_failure(self, error: HeadraceError) -> None: ...


class Callers:
    """Callers of one sequence of commands: each does a few things in turn, and none waits for ever."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.chance = world.chance
        self.attempts: list[Attempt] = []

    def start(self) -> list[asyncio.Task[None]]:
        makers = [self._update, self._pause, self.chance.choice([self._pause, self._small, self._small])]
        calls = [self._generate(), *(self._call_in_turn(maker) for maker in makers)]
        return [self.world.clock.create_task(call) for call in calls]

    async def _generate(self) -> None:
        for _ in range(self.chance.randrange(3)):
            handle = self.world.client.new_handle()
            num_tokens = self.chance.choice([2, 6, 20])
            self.world.client.submit(Request(handle, f"r{handle}", pack_ids([1, 2, 3]), num_tokens, handle), Sink())

    async def _call_in_turn(self, make: Callable[[], tuple[Attempt, Coroutine[Any, Any, Any]]]) -> None:
        for _ in range(self.chance.randint(1, 2)):
            if self.chance.random() < 0.5:
                await asyncio.sleep(self.chance.random() * 0.5)
            attempt, call = make()
            self.attempts.append(attempt)
            began = self.world.clock.now
            await self._attend(attempt, call)
            attempt.over_at = len(self.world.log)
            attempt.seconds = self.world.clock.now - began

    async def _attend(self, attempt: Attempt, call: Coroutine[Any, Any, Any]) -> None:
        """Wait for a call in one of the ways in which callers do, or stop waiting."""
        way = self.chance.choice(["patient", "patient", "wait_for", "cancel", "cancel twice"])
        patience = self.chance.random() * self.chance.choice([0.0, 0.1, 1.0, 4.0])
        try:
            if way == "patient":
                await call
            elif way == "wait_for":
                await asyncio.wait_for(call, patience)
            else:
                await self._cancelled(asyncio.ensure_future(call), patience, twice=way == "cancel twice")
            attempt.outcome = "done"
        except (asyncio.CancelledError, TimeoutError):
            attempt.outcome = "given up"
        except HeadraceError as error:
            attempt.error = error
            attempt.outcome = "too late" if isinstance(error, DeadlineError) else "refused"

    async def _cancelled(self, task: asyncio.Task[Any], patience: float, *, twice: bool) -> None:
        done, _ = await asyncio.wait([task], timeout=patience)
        if not done:
            task.cancel()
            if twice:
                await asyncio.wait([task], timeout=self.chance.random() * 0.2)
                task.cancel()
        await task

    def _limit(self) -> float:
        return self.chance.choice([0.05, 0.5, 2.0, MAX_LIMIT])

    def _update(self) -> tuple[Attempt, Coroutine[Any, Any, Any]]:
        label = self.world.label()
        mode: Any = self.chance.choice(["shadow", "shadow", "inplace"])
        in_flight: Any = self.chance.choice(["drain", "keep", "recompute", "abort"])
        if self.chance.random() < 0.5:
            disk = functools.partial(UpdateFromDisk, path="/", version=label, mode=mode, in_flight=in_flight)
            return Attempt("disk", label), self._change(disk, self._limit(), UpdateReport)
        updater, terms = self.world.updater, UpdateTerms(label, mode, in_flight, 30.0)
        return Attempt("update", label), updater.update_from_tensors(_await, TENSORS, terms, updater.begin)

    def _pause(self) -> tuple[Attempt, Coroutine[Any, Any, Any]]:
        attempt = Attempt("pause")
        if self.chance.random() < 0.3:
            attempt.name = "resume"
            return attempt, self._change(self._keyed(attempt, Resume), self._limit(), NoneType)
        mode: Any = self.chance.choice(["drain", "drain", "keep", "recompute", "abort"])
        return attempt, self._change(self._keyed(attempt, lambda i: Pause(i, mode)), self._limit(), NoneType)

    def _small(self) -> tuple[Attempt, Coroutine[Any, Any, Any]]:
        name = self.chance.choice(list(SMALL))
        attempt = Attempt(name)
        command, reply = SMALL[name]
        return attempt, self._change(self._keyed(attempt, command), self._limit(), reply)

    def _keyed(self, attempt: Attempt, make: Callable[[int], Command]) -> Callable[[int], Command]:
        def keyed(call_id: int) -> Command:
            attempt.key = call_id
            return make(call_id)

        return keyed

    async def _change(self, make: Callable[[int], Command], timeout: float, reply: Any) -> Any:
        return await self.world.client.change(make, reply, timeout)


async def _await(step: Awaitable[Any]) -> Any:
    return await step


LOGGED = {"disk": "commit", "update": "commit"} | {
    name: name for name in ("resume", "relabel", "flush", "reset", "release", "take")
}


def check_attempt(attempt: Attempt, log: list[tuple[str, Any]]) -> None:
    """What came of one call against what the core did for it."""
    assert attempt.outcome, "everybody is answered"
    if attempt.name in ("disk", "update"):
        assert not isinstance(attempt.error, UpdateConflictError), "the update before it is not over"
    if attempt.name != "update":  # which is many calls, each with its deadline
        assert attempt.seconds <= MAX_LIMIT + LONGEST_TURN, f"{attempt} took {attempt.seconds} s"
    kind = LOGGED.get(attempt.name)
    if kind is None:
        return
    happened = [at for at, event in enumerate(log) if event == (kind, attempt.key)]
    assert all(at < attempt.over_at for at in happened), f"{attempt} happened later"
    if attempt.outcome == "done" and (happened or attempt.name not in ("release", "take")):  # it may be so already
        assert len(happened) == 1, f"{attempt} happened {len(happened)} times"
    elif attempt.outcome in ("done", "given up"):
        assert len(happened) <= 1, f"{attempt} happened {len(happened)} times"
    else:
        assert not happened, f"{attempt} happened"


def check_memory(world: World) -> None:
    """It is where the last call that was done has left it."""
    moves = [name for name, _ in world.log if name in ("release", "take")]
    memory = world.core.replica.memory
    assert not memory.jobs
    assert memory.released == memory.lacks == ({"kv_cache"} if moves[-1:] == ["release"] else set())


def check_pauses(world: World, attempts: list[Attempt]) -> None:
    """Nobody is paused by who was told that he is not, and who was told so has paused."""
    acknowledged = {a.key for a in attempts if a.name == "pause" and a.outcome == "done"}
    in_force = set(world.core.replica.pause.pauses)
    assert in_force <= acknowledged, f"paused by nobody: {in_force - acknowledged}"
    resumes = [at for at, event in enumerate(world.log) if event[0] == "resume"]
    later = {key for kind, key in world.log[resumes[-1] :] if kind == "resume"} if resumes else {0}
    assert in_force >= {key for key in acknowledged if key > max(later)}, "an acknowledged pause is lost"


async def begin_again(client: CoreClient) -> None:
    """Nothing is paused or released and nothing runs."""
    await client.change(Resume, NoneType)
    await client.change(ResumeMemory, NoneType)
    client.abort(list(client._sinks), "over")


def play_sequence(world: World) -> None:
    """One sequence of commands, checked, and then everything as at its beginning."""
    world.log.clear()
    callers = Callers(world)
    tasks = callers.start()
    world.run_until(lambda: all(task.done() for task in tasks))
    for task in tasks:
        task.result()
    replica = world.core.replica
    assert replica.update.machine.session is None, "a session is left over"
    assert not replica.update._jobs and not replica.reading.reads
    check_memory(world)
    check_pauses(world, callers.attempts)
    for _ in range(3):
        world.core.turn(0.0)
        world.clock.pass_time(0.1)
    for attempt in callers.attempts:
        check_attempt(attempt, world.log)
    assert len(world.updater._host._free) == world.updater._host._num_buffers
    ending = world.clock.create_task(begin_again(world.client))
    world.run_until(ending.done)
    ending.result()


@pytest.mark.parametrize("block", range(10))
def test_what_is_not_acknowledged_never_happens_later(block: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="headrace")  # weights are lost all the time here
    for seed in range(block * NUM_WORLDS // 10, (block + 1) * NUM_WORLDS // 10):
        world = World(seed)
        try:
            for _ in range(NUM_SEQUENCES):
                play_sequence(world)
        finally:
            world.close()
