"""Every value a request gets, scored again by the weights its version names, whatever met it on its way.

Prompts longer than a step, scores, pauses, updates of every policy, labels given twice, relabelling, memory released
and resumed, aborts, failing steps and full pools at random. What was sampled by kept sequences is scored over KV of the
weights that computed it, which the spans say too: the KV of a token is of the step that sampled the next one, and what
was computed again is of the step that sampled first after that.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from headrace.types.memory import MEMORY_TAGS
from headrace.types.messages import Abort, CommitUpdate, Pause, ReleaseMemory, Resume, ResumeMemory, SetVersion
from headrace.types.request import Delta, unpack_floats, unpack_ids
from headrace.types.sampling_params import LogprobOptions
from headrace.types.weights import UpdateReport
from tests.core.harness import VOCAB_SIZE, Core, new_tensors, request, tiny_config
from tests.core.remembering_executor import PAGE_SIZE, RememberingExecutor, Scorer
from tests.rounds import rounds

NUM_SEQUENCES = rounds(120)
NUM_EVENTS = 24
POLICIES = ("keep", "keep", "keep", "recompute", "drain", "abort")
TENSORS = new_tensors(1.0)


class Answer(NamedTuple):
    """All that came of a request; one entry per token."""

    token_ids: list[int]
    logprobs: list[float]
    labels: list[str]
    epochs: list[int]
    prompt_logprobs: list[float]
    prompt_labels: list[str]
    last: Delta


class Driver:
    """One core, random commands, and what they make true."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        settings = {
            "overlap_depth": (0, 1, 3)[seed % 3],
            "page_size": PAGE_SIZE,
            "max_running_requests": chance.choice((2, 4, 8)),
            "max_num_batched_tokens": chance.choice((5, 8, 13, 64)),
            "kv_pool_tokens": chance.choice((64, 96, 512)),
            "prefix_cache": chance.random() < 0.8,
            "pause_timeout": 1e6,
            "keep_weights_copy": chance.random() < 0.5,
        }
        num_pages = tiny_config(**settings).num_pages
        self.executor = RememberingExecutor(VOCAB_SIZE, num_pages, chance, chance.choice((0.0, 0.0, 0.03)))
        self.core = Core(self.executor, **settings)
        self.labels = [{"default"}]  # of each epoch
        self.prompts: dict[int, list[int]] = {}
        self.starts: dict[int, int | None] = {}
        self.num_released = 0
        self.repeats_labels = chance.random() < 0.5
        self.stem = [chance.randint(1, 9) for _ in range(40)]

    def event(self) -> None:
        actions = [self.submit] * 4 + [self.turn] * 10 + [self.pause, self.resume] + [self.update] * 4
        self.chance.choice([*actions, self.relabel, self.abort, self.release, *[self.resume_memory] * 2])()

    def submit(self) -> None:
        """Requests for samples and scores, some of one prompt, some with a prefix that others have."""
        chance = self.chance
        length = chance.choice((1, 3, 11, 20, 30, 40))
        num_shared = chance.choice((0, length // 2, length))
        prompt = self.stem[:num_shared] + [chance.randint(1, 9) for _ in range(length - num_shared)]
        for _ in range(chance.choice((1, 1, 1, 4))):
            handle = len(self.prompts) + 1
            start = chance.choice((None, None, 0, length // 2))
            start = None if start is not None and start >= length else start
            self.prompts[handle], self.starts[handle] = prompt, start
            every = chance.choice((0, 1, 3))
            options = LogprobOptions(prompt_start=start)
            self.core.submit(request(handle, prompt, chance.choice((0, 2, 12)), deliver_every=every, logprobs=options))

    def turn(self) -> None:
        self.core.turn(self.chance.randint(1, 3))

    def pause(self) -> None:
        self.core.start(Pause, self.chance.choice(POLICIES))
        self.core.turn()

    def resume(self) -> None:
        self.core.call(Resume)

    def release(self) -> None:
        tags = tuple(self.chance.sample(MEMORY_TAGS, self.chance.randint(0, 3)))
        self.core.call(ReleaseMemory, tags, self.chance.choice(("abort", "recompute", "recompute")))
        self.num_released += 1

    def resume_memory(self) -> None:
        self.core.call(ResumeMemory, tuple(self.chance.sample(MEMORY_TAGS, self.chance.randint(0, 3))))

    def update(self) -> None:
        core, policy = self.core, self.chance.choice(POLICIES)
        memory = core.loop.replica.memory
        if "weights" in memory.released:
            core.call(ResumeMemory, ("weights",))
        label = self.chance.choice("ab") if self.repeats_labels else f"v{len(self.labels)}"
        if core.status().paused == "drain":
            self.resume()
        is_paused = core.status().paused != "" or bool(memory.lacks)
        session = core.begin(TENSORS, label, mode=self.chance.choice(("shadow", "inplace")), in_flight=policy)
        core.stage(session, TENSORS)
        report = core.call(CommitUpdate, session, kind=UpdateReport)
        assert report.epoch == len(self.labels) == self.executor.counting.serial
        self.labels.append({label})
        if policy in ("recompute", "abort") or (policy == "drain" and not is_paused):
            self.executor.floor = report.epoch

    def relabel(self) -> None:
        if self.core.status().state != "ready":
            return
        label = self.chance.choice("ab") if self.repeats_labels else f"r{len(self.labels)}"
        self.core.call(SetVersion, label)
        self.labels[-1].add(label)

    def abort(self) -> None:
        self.core.send(Abort(tuple(self.chance.sample(sorted(self.prompts), min(1, len(self.prompts))))))

    def answer(self, handle: int) -> Answer:
        """What a request was answered."""
        deltas = self.core.link.deltas[handle]
        spans = [(*span, epoch) for delta in deltas for span, epoch in zip(delta.spans, delta.span_epochs, strict=True)]
        scored = b"".join(delta.prompt_logprobs for delta in deltas)
        return Answer(
            [token for delta in deltas for token in unpack_ids(delta.token_ids).tolist()],
            [value for delta in deltas for value in unpack_floats(delta.logprobs).tolist()],
            [label for label, count, _ in spans for _ in range(count)],
            [epoch for _, count, epoch in spans for _ in range(count)],
            unpack_floats(scored).tolist(),
            [label for label, count in deltas[-1].prompt_spans for _ in range(count)],
            deltas[-1],
        )


@pytest.mark.parametrize("part", range(2))
def test_every_value_is_that_of_the_weights_its_version_names(part: int) -> None:
    seen: Counter[str] = Counter()
    for number in range(NUM_SEQUENCES):
        driver = Driver(part * NUM_SEQUENCES + number)
        for _ in range(NUM_EVENTS):
            driver.event()
        driver.resume()
        driver.core.call(ResumeMemory)
        if driver.core.status().state != "ready":
            driver.update()
        driver.core.settle()
        seen["released"] += driver.num_released
        for handle in driver.prompts:
            check(driver, handle, seen)
    for kind in (
        "tokens",
        "mixed",
        "again",
        "twice",
        "scores",
        "scores alone",
        "restarted scores",
        "relabelled scores",
        "released",
        "kept through a release",
    ):
        assert seen[kind] > 0, f"the sequences never show {kind}: {seen}"


def check(driver: Driver, handle: int, seen: Counter[str]) -> None:
    answer = driver.answer(handle)
    finish = answer.last.finish
    assert finish is not None
    seen["kept through a release"] += driver.num_released > 0 and answer.last.num_preemptions > 0
    check_tokens(driver, handle, answer, seen)
    check_prompt(driver, handle, answer, is_whole=finish.type == "length", seen=seen)


def check_tokens(driver: Driver, handle: int, answer: Answer, seen: Counter[str]) -> None:
    """Each over the KV that its spans, and the moments at which it was computed again, say it had."""
    prompt, epochs = driver.prompts[handle], answer.epochs
    tokens, num_prompt = prompt + answer.token_ids, len(prompt)
    assert all(label in driver.labels[epoch] for label, epoch in zip(answer.labels, epochs, strict=True))
    assert epochs == sorted(epochs)
    by_entry: dict[int, Scorer] = {}
    for number, (value, epoch) in enumerate(zip(answer.logprobs, epochs, strict=True)):
        position = num_prompt + number
        entered = max(known for known in driver.executor.entered[handle] if known <= position)
        if entered not in by_entry:
            rebuilt = [epochs[entered - num_prompt]] * entered
            by_entry[entered] = Scorer(tokens, rebuilt + epochs[entered - num_prompt + 1 :])
            seen["again"] += entered > num_prompt
        assert value == by_entry[entered].logprob(position, epoch)
    seen["tokens"] += len(epochs)
    seen["mixed"] += len(set(epochs)) > 1
    changes = zip(
        zip(answer.labels, epochs, strict=True), zip(answer.labels[1:], epochs[1:], strict=True), strict=False
    )
    seen["twice"] += any(one[0] == two[0] and one[1] != two[1] for one, two in changes)


def check_prompt(driver: Driver, handle: int, answer: Answer, *, is_whole: bool, seen: Counter[str]) -> None:
    """All scores by one set of weights, which their labels name and which sampled the first token."""
    prompt, start, labels = driver.prompts[handle], driver.starts[handle], answer.prompt_labels
    is_scored = start is not None or not answer.token_ids
    if is_whole:
        assert len(labels) == (len(prompt) if is_scored else 0)
        assert bool(answer.prompt_logprobs) == (start is not None)
    values = answer.prompt_logprobs
    known: list[int] = np.flatnonzero(~np.isnan(values)).tolist()
    if not known or start is None:
        return
    assert not is_whole or len(known) == len(prompt) - max(1, start)
    assert start + known[-1] < len(labels)
    named = [epoch for epoch, theirs in enumerate(driver.labels) if theirs >= set(labels)]
    candidates = [epoch for epoch in named if not answer.epochs or epoch == answer.epochs[0]]
    scorers = {epoch: Scorer(prompt, [epoch] * len(prompt)) for epoch in candidates}
    assert any(
        all(values[number] == scorer.logprob(start + number, epoch) for number in known)
        for epoch, scorer in scorers.items()
    ), f"scores of {labels} are of none of the epochs {candidates}"
    seen["scores"] += 1
    seen["scores alone"] += not answer.epochs
    seen["restarted scores"] += answer.last.num_preemptions > 0
    seen["relabelled scores"] += len(set(labels)) > 1
