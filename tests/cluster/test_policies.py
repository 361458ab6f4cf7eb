"""What every policy holds, over random sequences of events; and what each of them is for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from headrace.cluster.policies import (
    GROUP_SAMPLES,
    POLICY_NAMES,
    Ask,
    CacheAware,
    Candidate,
    Policy,
    ReplicaChoice,
    make_policy,
)
from headrace.cluster.prefix_index import BLOCK_BYTES, MAX_BLOCKS, PrefixIndex, blocks_of

NUM_SEQUENCES = 500
MAX_INDEX_BLOCKS = 200


class Fleet:
    """Replicas as a router counts them, and a policy that is told what happens to them."""

    def __init__(self, policy: Policy, num_replicas: int) -> None:
        self.policy = policy
        self.load = {number: [0, 0] for number in range(num_replicas)}
        self.dead: set[int] = set()
        self.running: list[ReplicaChoice] = []

    def offered(self) -> list[Candidate]:
        return [Candidate(number, *load) for number, load in self.load.items() if number not in self.dead]

    def send(self, ask: Ask) -> ReplicaChoice:
        choice = self.policy.choose(ask, self.offered())
        self.load[choice.number][0] += 1
        self.load[choice.number][1] += choice.num_tokens
        self.running.append(choice)
        return choice

    def finish(self, choice: ReplicaChoice) -> None:
        self.running.remove(choice)
        self.load[choice.number][0] -= 1
        self.load[choice.number][1] -= choice.num_tokens


def random_ask(words: random.Random) -> Ask:
    prompt = bytes([words.randrange(3)]) * words.randrange(2000) + bytes([words.randrange(3)]) * words.randrange(500)
    key = words.choice(["", "", "", "a", "b"])
    return Ask(len(prompt), words.randrange(300), words.randrange(1, 5), blocks_of(prompt), key)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_only_what_is_offered_is_chosen_and_loads_are_never_negative(name: str) -> None:
    for seed in range(NUM_SEQUENCES):
        words = random.Random(seed)
        fleet = Fleet(make_policy(name, MAX_INDEX_BLOCKS), words.randrange(1, 6))  # type: ignore[arg-type]
        for _ in range(30):
            event = words.random()
            if event < 0.15 and len(fleet.dead) < len(fleet.load) - 1:
                dead = words.choice([number for number in fleet.load if number not in fleet.dead])
                fleet.dead.add(dead)
                if words.random() < 0.5:
                    fleet.policy.forget(dead)
            elif event < 0.3 and fleet.dead:
                fleet.dead.remove(words.choice(sorted(fleet.dead)))
            elif event < 0.5 and fleet.running:
                fleet.finish(words.choice(fleet.running))
            else:
                ask = random_ask(words)
                choice = fleet.send(ask)
                assert choice.number not in fleet.dead
                assert 0 <= choice.num_cached_tokens <= ask.num_prompt_tokens and choice.num_tokens >= 0
        while fleet.running:
            fleet.finish(fleet.running[0])
        assert all(load == [0, 0] for load in fleet.load.values())


def test_round_robin_is_fair_whoever_comes_and_goes() -> None:
    for seed in range(NUM_SEQUENCES):
        words, policy = random.Random(seed), make_policy("round_robin", 0)
        members = list(range(words.randrange(1, 7)))
        for _ in range(4):
            counts = Counter(policy.choose(Ask(), [Candidate(each) for each in members]).number for _ in range(20))
            assert max(counts.values()) - min(counts[each] for each in members) <= 1
            members = sorted(set(members) ^ {words.randrange(7)}) or [0]


@pytest.mark.parametrize(("name", "field"), [("shortest_queue", "num_requests"), ("fewest_tokens", "num_tokens")])
def test_the_least_busy_is_chosen_and_ties_go_round(name: str, field: str) -> None:
    for seed in range(NUM_SEQUENCES):
        words, policy = random.Random(seed), make_policy(name, 0)  # type: ignore[arg-type]
        for _ in range(20):
            offered = [Candidate(number, words.randrange(4), words.randrange(4)) for number in range(5)]
            chosen = offered[policy.choose(Ask(), offered).number]
            assert getattr(chosen, field) == min(getattr(each, field) for each in offered)
    idle = [Candidate(number) for number in range(3)]
    assert sorted(policy.choose(Ask(), idle).number for _ in range(3)) == [0, 1, 2]


def common(one: bytes, other: bytes) -> int:
    """Blocks in which two prompts agree; the last of a prompt counts only if the other has the same."""
    num = 0
    while num * BLOCK_BYTES < len(one) and one[: (num + 1) * BLOCK_BYTES] == other[: (num + 1) * BLOCK_BYTES]:
        num += 1
    return num


def test_cache_aware_takes_the_least_expected_cost() -> None:
    """Against a definition that remembers every prompt whole. Prompts are told apart so that no group has two."""
    for seed in range(NUM_SEQUENCES):
        words, policy = random.Random(seed), CacheAware(PrefixIndex(1 << 20))
        sent: dict[int, list[bytes]] = {number: [] for number in range(4)}
        for turn in range(20):
            prompt = bytes([words.randrange(2)]) * words.choice([256, 512, 1024]) + b"%d" % turn
            blocks, offered = blocks_of(prompt), [Candidate(number, 0, words.randrange(400)) for number in range(4)]
            costs = {}
            for each in offered:
                num_held = max((common(prompt, other) for other in sent[each.number]), default=0)
                costs[each.number] = len(prompt) - len(prompt) * num_held // len(blocks) + each.num_tokens
            choice = policy.choose(Ask(len(prompt), 7, 2, blocks), offered)
            assert costs[choice.number] == min(costs.values())
            assert choice.num_tokens - 14 == costs[choice.number] - offered[choice.number].num_tokens
            sent[choice.number].append(prompt)
            if words.random() < 0.1:
                policy.forget(choice.number)
                sent[choice.number] = []


def test_samples_of_a_prompt_stay_together_whatever_the_load_until_there_are_many() -> None:
    policy, blocks = make_policy("cache_aware", 1000), blocks_of(b"x" * 300)
    fleet = Fleet(policy, 4)
    numbers = [fleet.send(Ask(75, 256, 1, blocks)).number for _ in range(3 * GROUP_SAMPLES)]
    thirds = [set(numbers[start : start + GROUP_SAMPLES]) for start in range(0, len(numbers), GROUP_SAMPLES)]
    assert [len(third) for third in thirds] == [1, 1, 1]
    assert len(set.union(*thirds)) == 3  # more than one group's worth does not stay on one replica


def test_a_routing_key_stays_where_it_is_until_that_replica_is_gone() -> None:
    fleet = Fleet(make_policy("cache_aware", 1000), 3)
    asks = [Ask(100, 10, 1, blocks_of(b"%d" % turn * 200), "session") for turn in range(200)]
    (home,) = {fleet.send(ask).number for ask in asks}
    fleet.dead.add(home)
    (next_home,) = {fleet.send(ask).number for ask in asks}
    assert next_home != home
    fleet.dead.clear()
    assert {fleet.send(ask).number for ask in asks} == {next_home}


def test_groups_of_a_step_hit_as_in_one_big_cache_and_all_replicas_work() -> None:
    """64 groups of 16 samples over a shared system prompt, interleaved, four steps with new prompts each."""
    words = random.Random(1)
    fleet = Fleet(make_policy("cache_aware", 1 << 16), 8)
    num_prompt = num_cached = num_cached_by_one = 0
    one = CacheAware(PrefixIndex(1 << 20))
    sent: Counter[int] = Counter()
    for step in range(4):
        asks = []
        for group in range(64):
            prompt = b"s" * 1024 + b"%d-%d " % (step, group) * 60
            asks += [Ask(len(prompt) // 4, 256, 1, blocks_of(prompt))] * 16
        order = [index for start in range(0, len(asks), 128) for index in words.sample(range(start, start + 128), 128)]
        for index in order:
            choice = fleet.send(asks[index])
            sent[choice.number] += 1
            num_prompt += asks[index].num_prompt_tokens
            num_cached += choice.num_cached_tokens
            num_cached_by_one += one.choose(asks[index], [Candidate(0)]).num_cached_tokens
        while fleet.running:
            fleet.finish(fleet.running[0])
    assert num_cached_by_one / num_prompt - num_cached / num_prompt < 0.02
    assert max(sent.values()) <= 1.25 * min(sent.values())


def test_the_index_is_bounded_and_drops_ends_of_prompts_before_their_beginnings() -> None:
    index, words = PrefixIndex(64), random.Random(2)
    for _ in range(2000):
        index.insert(words.randrange(3), blocks_of(words.randbytes(words.randrange(4000))))
        assert index.num_blocks <= 3 * 64
    long = blocks_of(bytes(100 * BLOCK_BYTES))
    index.insert(0, long)
    assert index.match(0, long) == 64
    index.forget(0)
    assert index.match(0, long) == 0


def test_blocks_name_beginnings() -> None:
    prompt = bytes(range(256)) * 3
    assert blocks_of(prompt)[:2] == blocks_of(prompt + b"more")[:2] and blocks_of(b"") == ()
    assert blocks_of(prompt)[1] != blocks_of(b"y" + prompt[1:])[1]  # the same block after another beginning
    assert len(blocks_of(bytes(2 * MAX_BLOCKS * BLOCK_BYTES))) == MAX_BLOCKS


def test_what_is_remembered_of_groups_is_bounded() -> None:
    policy = CacheAware(PrefixIndex(10), max_groups=5)
    for turn in range(100):
        policy.choose(Ask(1, 1, 1, (), f"key {turn}"), [Candidate(0), Candidate(1)])
    assert len(policy._groups) == 5
