"""What a simulated run comes to. Owns every figure of the report, and what each means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from headrace.simulation.rollouts import SimulatedGroup

if TYPE_CHECKING:
    from headrace.simulation.simulator import Simulation

TAIL_SHARE = 0.9


class StepFigures(msgspec.Struct, frozen=True):
    """One training step: when its batch was complete, and when its push began and ended. Seconds since the start."""

    taken: float
    push_began: float
    pushed: float


class Spread(msgspec.Struct, frozen=True):
    p50: float
    p99: float
    max: float


class RunFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Times are simulated seconds, tokens real ones.

    num_replicas, num_requests, num_output_tokens  of the run
    seconds             in all
    tokens_per_second   output tokens of all replicas together, over all of the run
    generating_tokens_per_second
                        the same over the time in which requests ran
    busy_share          of the replicas' time in which requests ran, what they spent in steps
    tail_share          of the time of a batch, what its last tenth of samples took (mean over batches; one that is not
                        sent as a whole has none)
    request_seconds     from the sending of a sample to its end
    first_token_seconds from the sending of a sample to its first token
    hit_rate            of the tokens of prompts, those that a replica had in its cache (as samples that have ended were
                        asked the last time, with what a failure left of them)
    one_cache_hit_rate  the same, had one cache of any size seen all requests
    expected_hit_rate   what the fronts thought
    update_seconds      from a push's begin to its fence, mean
    front_busy_share    of the busiest front's core, what requests took while they ran, without looks
    front_look_share    of a core, what looking at the replicas takes; at 1 the front does not work
    front_wait_seconds  the longest that a request waited for its front
    num_preemptions     of all replicas
    num_failures        of replicas
    num_asked_again     requests that a failure sent elsewhere, each time counted
    num_lost_tokens     tokens that these had; num_void_tokens of them were generated again
    steps               each training step
    """

    num_replicas: int
    num_requests: int
    num_output_tokens: int
    seconds: float
    tokens_per_second: float
    generating_tokens_per_second: float
    busy_share: float
    tail_share: float | None
    request_seconds: Spread
    first_token_seconds: Spread
    hit_rate: float
    one_cache_hit_rate: float
    expected_hit_rate: float
    update_seconds: float
    front_busy_share: float
    front_look_share: float
    front_wait_seconds: float
    num_preemptions: int
    num_failures: int
    num_asked_again: int
    num_lost_tokens: int
    num_void_tokens: int
    steps: list[StepFigures]


class OneBigCache:
    """What a cache of any size would have that sees every request, in pages: of a prompt all whole pages that it, or
    one before it under the same weights, has."""

    def __init__(self, page_size: int) -> None:
        self.num_hits = 0
        self.num_tokens = 0
        self._page_size = page_size
        self._held: set[int] = set()
        self._epoch = 0
        self._seen = -1

    def ask(self, epoch: int, group: SimulatedGroup) -> None:
        """One sample more; samples of a group come one after the other."""
        if epoch != self._epoch:
            self._epoch, self._seen = epoch, -1
            self._held.clear()
        num_tokens = len(group.prompt) // 4
        most = (num_tokens - 1) // self._page_size  # the last token is always computed
        num_held = most if group.number == self._seen else self._insert(group.prompt, most)
        self._seen = group.number
        self.num_tokens += num_tokens
        self.num_hits += num_held * self._page_size

    def _insert(self, prompt: bytes, num_pages: int) -> int:
        """Returns how many leading pages were held."""
        size, name, num_held = 4 * self._page_size, 0, 0
        for page in range(num_pages):
            name = hash((name, prompt[page * size : (page + 1) * size]))
            num_held += num_held == page and name in self._held
            self._held.add(name)
        return num_held


def spread(values: Sequence[float]) -> Spread:
    p50, p99 = np.percentile(values, [50, 99]).tolist()
    return Spread(p50, p99, max(values))


def summarize(simulation: Simulation) -> RunFigures:
    """The figures of a run that is over. Of samples those that have ended count."""
    options, replicas, fronts = simulation.options, simulation.replicas, simulation.fronts
    ended = [each for each in simulation.rollouts if each.ended == each.ended]
    seconds = simulation.timeline.now
    num_tokens = sum(each.num_output for each in ended) * options.grain
    generating = _generating_seconds(simulation)
    num_prompt = sum(each.num_prompt + each.num_kept for each in ended)
    num_thought = sum(front.num_prompt_tokens for front in fronts)
    return RunFigures(
        num_replicas=len(replicas),
        num_requests=len(ended),
        num_output_tokens=num_tokens,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        generating_tokens_per_second=num_tokens / generating,
        busy_share=sum(each.busy_seconds for each in replicas) / (len(replicas) * generating),
        tail_share=_tail_share(simulation),
        request_seconds=spread([each.ended - each.sent for each in ended]),
        first_token_seconds=spread([each.first_token - each.sent for each in ended]),
        hit_rate=sum(each.num_cached for each in ended) / num_prompt,
        one_cache_hit_rate=simulation.cache.num_hits / simulation.cache.num_tokens,
        expected_hit_rate=sum(front.num_expected_hits for front in fronts) / num_thought,
        update_seconds=sum(each.pushed - each.push_began for each in simulation.steps) / len(simulation.steps),
        front_busy_share=max(front.busy_seconds for front in fronts) / generating,
        front_look_share=max(front.look_share for front in fronts),
        front_wait_seconds=max(front.longest_wait for front in fronts),
        num_preemptions=sum(each.num_preemptions for each in replicas),
        num_failures=simulation.num_failures,
        num_asked_again=sum(each.num_attempts - 1 for each in simulation.rollouts if each.num_attempts),
        num_lost_tokens=simulation.num_lost_tokens * options.grain,
        num_void_tokens=simulation.num_void_tokens * options.grain,
        steps=simulation.steps,
    )


def _generating_seconds(simulation: Simulation) -> float:
    """Time in which a sample was sent and had not ended."""
    if simulation.options.staleness:
        return simulation.timeline.now  # some always run
    began, total = 0.0, 0.0
    for step in simulation.steps:
        total += step.taken - began
        began = step.pushed
    return total


def _tail_share(simulation: Simulation) -> float | None:
    if simulation.options.staleness:
        return None
    began, shares = 0.0, []
    for step in simulation.steps:
        ends = sorted(each.ended for each in simulation.rollouts if began <= each.sent < step.taken)
        shares.append((step.taken - ends[int(TAIL_SHARE * (len(ends) - 1))]) / (step.taken - began))
        began = step.pushed
    return sum(shares) / len(shares)
