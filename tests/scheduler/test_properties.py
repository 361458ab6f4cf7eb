"""Random event sequences against the strict device and the books, at several overlap depths."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import numpy as np
import pytest

from headrace.types.request import Request, pack_ids, unpack_ids
from headrace.types.sampling_params import LogprobOptions
from tests.rounds import rounds
from tests.scheduler.harness import ERROR, Harness, random_limits

NUM_SEQUENCES = rounds(240)
EVENTS = (
    ("issue", 34),
    ("land", 26),
    ("add", 16),
    ("abort", 4),
    ("discard", 2),
    ("fail", 2),
    ("expire", 1),
    ("abort_all", 1),
    ("flush", 2),
    ("update", 4),
    ("relabel", 1),
    ("drain", 1),
    ("lose_step", 1),
    ("books", 6),
)
PICTURE_ID = 4
PICTURES = [np.random.default_rng(content).integers(-(1 << 31), 0, 64, dtype=np.int32) for content in range(2)]
NAMES = [name for name, weight in EVENTS for _ in range(weight)]
HAPPENED = (
    "num_preemptions",
    "num_chunked_prompts",
    "num_evicted_pages",
    "num_cached_tokens",
    "num_resumed_tokens",
    "num_overshoot_tokens",
    "num_grouped_rows",
    "num_aborted",
    "num_failed",
)
NUM_ROUNDS = (None, 2, 6)
"""How many results a sequence has after its last event; None: until all requests have ended."""
IN_FLIGHT = ("keep", "keep", "keep", "recompute", "abort", "drain")


def random_request(random_: random.Random, handle: int, harness: Harness, family: int) -> Request:
    """A request that fits; prompts of one family share long prefixes."""
    context = harness.limits.context_length
    stem = random.Random(family % 3)
    length = random_.randint(1, random_.choice((context // 3, context // 2, context)))
    max_new = random_.choice((0, 1, 3, 6, 10, 40))
    if family % 2:
        length, max_new = min(length, 1 + context // 4), 40
    shared = [stem.randrange(5) for _ in range(random_.choice((0, length, length // 2, length - 1)))]
    prompt = (shared + [random_.randrange(5) for _ in range(length)])[:length]
    longest = min(max_new, context - length)
    logprobs = LogprobOptions()
    if random_.random() < 0.2:
        start = random_.choice((None, 0, 1, length // 2, length))
        logprobs = LogprobOptions(prompt_start=start, num_top=random_.choice((0, 2)))
    return Request(
        handle,
        f"r{handle}",
        pack_ids(prompt),
        max_new,
        seed=handle,
        logprobs=logprobs,
        min_new_tokens=random_.randint(0, longest) if random_.random() < 0.2 else 0,
        stop_token_ids=random_.choice(((), (), (2,), (0, 4), tuple(range(1, 20)))),
        priority=random_.choice((0, 0, 0, 1, -1)),
        extra_key=random_.choice(("", "", "", "b")),
        deliver_every=random_.choice((0, 0, 1, 3)),
    )


def with_a_picture(random_: random.Random, request: Request) -> tuple[Request, bytes]:
    """One of two pictures in the middle of the prompt: the ids there are all the same, the units are of its content."""
    prompt = unpack_ids(request.prompt).copy()
    first = random_.choice((0, len(prompt) // 3))
    last = random_.randint(first, len(prompt))
    prompt[first:last] = PICTURE_ID
    units = prompt.copy()
    units[first:last] = random_.choice(PICTURES)[: last - first]
    return msgspec.structs.replace(request, prompt=pack_ids(prompt)), units.tobytes()


def play(
    seed: int,
    depth: int,
    num_events: int,
    num_tokens: tuple[int, int] = (1, 1),
    *,
    has_pictures: bool = False,
    num_cohorts: int = 1,
) -> Harness:
    """Run one random event sequence, and one in three of them to its end: what is left goes its way in many steps in
    which nothing else happens."""
    random_ = random.Random(seed)
    harness = Harness(random_limits(random_, depth, num_cohorts), num_tokens)
    harness.has_pictures = has_pictures
    family = random_.randrange(100)
    for now in range(num_events):
        play_event(random_.choice(NAMES), random_, harness, family, float(now))
    harness.end(NUM_ROUNDS[seed % len(NUM_ROUNDS)])
    return harness


def play_event(name: str, random_: random.Random, harness: Harness, family: int, now: float) -> None:
    """One event. Handles of past requests are named too, which must do nothing."""
    scheduler = harness.scheduler
    handles = random_.sample(sorted(harness.received), min(len(harness.received), random_.randint(1, 2)))
    if name == "issue":
        harness.issue(admit_new=random_.random() < 0.95)
    elif name == "land" and scheduler.num_in_flight:
        harness.land()
    elif name == "add":
        for _ in range(random_.choice((1, 1, 5))):
            request, units = random_request(random_, len(harness.received), harness, family), b""
            if harness.has_pictures and random_.random() < 0.7:
                request, units = with_a_picture(random_, request)
            harness.add(request, now, units)
    elif name == "abort":
        harness.take(scheduler.abort([*handles, 10**6], "stopped"))
    elif name == "discard":
        live = [handle for handle in handles if harness.received[handle].final is None]
        harness.discard(live)
    elif name == "fail":
        harness.take(scheduler.fail(handles, ERROR))
    elif name == "expire":
        harness.take(scheduler.expire(now - 5, ERROR))
    elif name == "abort_all":
        harness.take(scheduler.abort(None, "all"))
    elif name == "books":
        harness.check_books()
        harness.check_published()
    else:
        play_command(name, random_, harness)


def play_command(name: str, random_: random.Random, harness: Harness) -> None:
    """An event that touches the cache, the weights, or the steps in flight."""
    if name == "flush":
        harness.scheduler.flush_cache()
    elif name == "update":
        harness.update(random_.choice(IN_FLIGHT))
    elif name == "relabel":
        harness.scheduler.relabel(harness.next_version())
    elif name == "drain":
        harness.run(admit_new=False)
    elif name == "lose_step" and harness.scheduler.num_in_flight:
        harness.lose_steps()


def num_events(seed: int) -> int:
    """Mostly short, so that many fit; some long."""
    return 80 if seed % 64 == 0 else 10 + seed % 20


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_random_events_keep_every_promise(depth: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(NUM_SEQUENCES):
        harness = play(seed * 4 + depth, depth, num_events(seed))
        total.update({name: int(value) for name, value in harness.scheduler.metrics().items()})
        total["num_grouped_rows"] += harness.device.num_grouped_rows
    for name in (
        "preemptions",
        "chunked_prompts",
        "evicted_pages",
        "cached_tokens",
        "resumed_tokens",
        "overshoot_tokens",
        "pages_saved",
        "pages_loaded",
    ):
        assert total[f"num_{name}"] > 0, f"{name} never happened, so it was not tested"
    assert total["num_grouped_rows"] > 0 and total["num_aborted"] > 0 and total["num_failed"] > 0


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("num_tokens", [(1, 2), (1, 4), (0, 1), (0, 4)])
def test_steps_may_bring_any_number_of_tokens_a_row_at_any_depth(depth: int, num_tokens: tuple[int, int]) -> None:
    total: Counter[str] = Counter()
    for seed in range(rounds(24)):
        harness = play(10_000 + seed * 4 + depth, depth, num_events(seed), num_tokens)
        total.update({name: int(value) for name, value in harness.scheduler.metrics().items()})
    assert total["num_generated_tokens"] > 144 and total["num_preemptions"] > 0
    assert total["num_invariant_breaches"] == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_prefixes_of_equal_ids_and_other_units_are_never_shared(depth: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(rounds(60)):
        harness = play(20_000 + seed * 4 + depth, depth, num_events(seed), has_pictures=True)
        total.update({name: int(value) for name, value in harness.scheduler.metrics().items()})
    assert total["num_cached_tokens"] > 33 and total["num_resumed_tokens"] > 0 and total["num_preemptions"] > 0


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_same_events_give_the_same_plans(depth: int) -> None:
    digests = set()
    for seed in range(20):
        first, second = (play(seed, depth, 20).plan_log.hexdigest() for _ in range(2))
        assert first == second
        digests.add(first)
    assert len(digests) > 16


@pytest.mark.parametrize("num_cohorts", [2, 3, 5])
@pytest.mark.parametrize("num_tokens", [(1, 1), (1, 3), (0, 2)])
def test_with_cohorts_no_step_has_a_token_that_is_not_known(num_cohorts: int, num_tokens: tuple[int, int]) -> None:
    """`Harness.issue` holds plans against that."""
    total: Counter[str] = Counter()
    for seed in range(rounds(40)):
        depth = num_cohorts - 1
        harness = play(30_000 + seed, depth, num_events(seed), num_tokens, num_cohorts=num_cohorts)
        total.update({name: int(value) for name, value in harness.scheduler.metrics().items()})
    assert total["num_generated_tokens"] > 300 and total["num_preemptions"] > 0
    assert total["num_invariant_breaches"] == 0
