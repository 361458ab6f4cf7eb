"""Every step of an update, every road and actor, every fault: after each both sides know, the weights are whole old
ones, whole new ones, or said to be none, the next update succeeds, and nothing is left behind.

By default a sample of the matrix is run, another one by HEADRACE_FAULTS_SEED; all of it, some 45 minutes, with
HEADRACE_FAULTS=all.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from headrace import EngineDeadError, NeedsWeightsError, PoisonedError
from tests.faults.site import DEADLINE, GRACE, Site, Trainer
from tests.faults.trainer import CHUNKS

SEED = int(os.environ.get("HEADRACE_FAULTS_SEED", "0"))
CHUNK_STEPS = tuple(f"chunk{number}" for number in range(CHUNKS))
LAST = CHUNK_STEPS[-1]
STEPS = {
    **dict.fromkeys(("shared", "bytes", "buckets"), ("connect", "begin", *CHUNK_STEPS, "commit", "free")),
    "group": ("connect", *CHUNK_STEPS, "leave", "free"),
    "disk": ("connect", LAST, "commit", "free"),
}
"""At which something happens to a process."""

MISTAKES = ("corrupt", "drop", "double", "rename", "reorder")
HARMLESS = {
    *((road, "reorder", "begin") for road in ("shared", "bytes")),
    *(("buckets", "double", step) for step in CHUNK_STEPS),
    *(("group", "double", step) for step in CHUNK_STEPS[:-1]),
}
"""Mistakes that are none: an order that is free, a tensor that replaces itself. After the last broadcast of all the
weights are live, and another would begin the next update."""

RESTART_SECONDS = 60.0
NUM_SAMPLED = {
    **{"kill core": 1, "stop core": 2, "kill trainer": 3, "stop trainer": 4, "mistake": 8},
    **{"kill rank 1": 1, "stop rank 1": 2},
}
"""Cases of a kind. What kills a process is dear: the next one loads torch."""


class Case(msgspec.Struct, frozen=True):
    """`fault` at `step` of an update by `road`: "kill" or "stop" an `actor`, before it or while it is done, or a
    mistake of the trainer. The core is rank 0 of so many `ranks`."""

    road: str
    step: str
    fault: str
    actor: str = "trainer"
    moment: str = "before"
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.road} {self.step} {self.fault} {self.actor} {self.moment} of {self.ranks}"

    @property
    def kind(self) -> str:
        return "mistake" if self.fault in MISTAKES else f"{self.fault} {self.actor}"

    @property
    def is_harmless(self) -> bool:
        return (self.road, self.fault, self.step) in HARMLESS


ALWAYS = Case("buckets", LAST, "kill", "core")
"""Memory with a name in /dev/shm, of which nobody is left who has heard."""


def matrix() -> list[Case]:
    cases = []
    for road, steps in STEPS.items():
        places = [
            (step, fault, moment) for step in steps for fault in ("kill", "stop") for moment in ("before", "while")
        ]
        for step, fault, moment in places:
            cases += [Case(road, step, fault, actor, moment) for actor in ("trainer", "core")]
            cases += [Case(road, step, fault, actor, moment, 2) for actor in ("trainer", "core", "rank 1")]
        for step in (*(["begin"] if road in ("shared", "bytes") else []), *CHUNK_STEPS):
            cases += [Case(road, step, mistake, ranks=ranks) for mistake in MISTAKES for ranks in (1, 2)]
    return sorted(cases, key=lambda case: case.ranks)


def chosen() -> list[Case]:
    cases = matrix()
    if os.environ.get("HEADRACE_FAULTS") == "all":
        return cases
    rng = random.Random(SEED)
    sampled = [ALWAYS]
    for kind, count in NUM_SAMPLED.items():
        sampled += rng.sample([case for case in cases if case.kind == kind], count)
    return sorted(set(sampled), key=lambda case: (case.ranks, str(case)))


@pytest.fixture(scope="module")
def site_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Site]]:
    """The site whose engine has so many ranks."""
    sites: dict[int, Site] = {}

    def find(ranks: int) -> Site:
        if ranks not in sites:
            sites[ranks] = Site(tmp_path_factory.mktemp("faults"), ranks)
        return sites[ranks]

    yield find
    for each in sites.values():
        each.close()


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_after_a_fault_everybody_knows_and_the_next_update_succeeds(site_of: Callable[[int], Site], case: Case) -> None:
    site = site_of(case.ranks)
    settle(site)
    try:
        try_fault(site, case)
    except BaseException:  # a trainer that is in the middle of something is of no use to the next test
        site.drop_trainer(case.road)
        raise


def try_fault(site: Site, case: Case) -> None:
    rng = random.Random(f"{SEED} {case}")
    site.push(case.road, site.other)
    before, core = site.belongings(), site.core
    old, new, mode = site.live, site.other, rng.choice(("shadow", "inplace"))
    trainer = site.trainer(case.road)
    wrong = {"wrong": case.fault, "at": case.step} if case.kind == "mistake" else {}
    trainer.tell(site.order(case.road, new, mode=mode, **wrong))
    told = follow(site, trainer, case, rng)
    if case.kind == "kill trainer":
        site.drop_trainer(case.road)
    elif case.fault == "kill":
        site.until(lambda: site.core != core or not site.is_alive, GRACE, lambda: "nobody has noticed the death")
    settle(site)
    check_weights(site, case, told, old, new)
    site.push(case.road, site.other)
    site.until(lambda: not site.grown(before), GRACE, lambda: f"more than before: {site.grown(before)}")


def follow(site: Site, trainer: Trainer, case: Case, rng: random.Random) -> dict[str, Any]:
    """Have the fault happen at its step. Returns what the trainer told in the end, nothing if it was killed."""
    while "step" in (said := trainer.hear(DEADLINE + GRACE)):
        if case.kind == "mistake" or said["step"] != case.step:
            trainer.tell()
            continue
        if case.moment == "while":
            trainer.tell()
            time.sleep(rng.uniform(0.0, 0.01))
        strike(site, trainer, case)
        if case.moment == "before":
            trainer.tell()
    if "error" in said and case.actor == "trainer":
        assert said["seconds"] < DEADLINE * 2 + GRACE, said
    assert said or case.kind == "kill trainer"
    return said


def strike(site: Site, trainer: Trainer, case: Case) -> None:
    pid = {"core": lambda: site.core, "rank 1": lambda: site.second, "trainer": lambda: trainer.process.pid}[
        case.actor
    ]()
    if case.fault == "kill":
        os.kill(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(DEADLINE + 0.7)
        with contextlib.suppress(ProcessLookupError):  # a rank that stands still for so long may be ended by the others
            os.kill(pid, signal.SIGCONT)


def settle(site: Site) -> None:
    """Nothing of the update is left, within the deadline and some seconds; a dead core is replaced."""
    site.until(
        lambda: site.is_quiet or not site.is_alive,
        DEADLINE + GRACE,
        lambda: f"the update is still open: {site.status()}",
    )
    site.until(lambda: site.is_quiet, RESTART_SECONDS, lambda: "no other core has started")


def check_weights(site: Site, case: Case, told: dict[str, Any], old: str, new: str) -> None:
    """They are the old ones, the new ones, or said to be none; and the trainer knows."""
    status = site.status()
    assert status is not None
    if status.state in ("poisoned", "needs_weights"):
        refused = PoisonedError if status.state == "poisoned" else NeedsWeightsError
        with pytest.raises(refused):
            site.generate()
        with pytest.raises(refused):
            site.engine.digest()
        assert site.engine.version == "" and ("done" not in told or case.step == "free")
        site.live = "neither"
        return
    assert status.state == "ready"
    digest, tokens = site.engine.digest(), site.generate()
    if told.get("error") == "Differs" and "live weights differ" in told["message"]:
        assert case.kind == "mistake" and digest not in site.digests.values()
        site.live = "neither"
        return
    site.live = next((name for name, each in site.digests.items() if each == digest), "neither")
    assert site.live in (old, new), f"the weights are neither {old} nor {new}"
    assert (site.engine.version, tokens) == (site.live, site.tokens[site.live])
    if case.kind == "mistake":
        assert ("done" in told) == case.is_harmless, told
    if "done" in told:
        assert site.live == new


def test_a_request_in_flight_is_told_of_a_core_that_is_killed(site_of: Callable[[int], Site]) -> None:
    site = site_of(1)
    settle(site)
    site.push("shared", site.other)
    pieces = site.engine.stream(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 900, "ignore_eos": True})
    next(pieces)
    killed = time.monotonic()
    os.kill(site.core, signal.SIGKILL)
    with pytest.raises(EngineDeadError) as caught:
        for _ in pieces:
            pass
    assert caught.value.retryable and time.monotonic() - killed < GRACE
    settle(site)
    site.push("shared", "a")
