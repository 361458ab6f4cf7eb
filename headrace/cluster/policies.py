"""Which replica a request goes to, decided on plain values. No clock, no I/O: the same calls give the same choices.

Owns what a policy remembers of its choices. Must not know health: whoever asks offers only those replicas that may be
chosen, and one that is not offered is never the answer, whatever is remembered of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import msgspec

from headrace.cluster.prefix_index import PrefixIndex

PolicyName = Literal["cache_aware", "round_robin", "shortest_queue", "fewest_tokens"]
POLICY_NAMES: tuple[str, ...] = get_args(PolicyName)

GROUP_SAMPLES = 64
"""So many samples of one prompt stay together; the next ones may go where it is cheaper, and stay together there."""
MAX_GROUPS = 1 << 16
"""Prompts and routing keys whose replica is remembered."""


class Candidate(msgspec.Struct, frozen=True):
    """A replica that may be chosen, and what it has to do: requests without an answer, and the tokens that these were
    expected to cost when they were sent. `number` orders replicas and is never used twice."""

    number: int
    num_requests: int = 0
    num_tokens: int = 0


class Ask(msgspec.Struct, frozen=True):
    """What a policy knows of a request. `blocks` names the beginnings of its prompt, the last one all of it; `key` is
    the caller's word for what belongs together."""

    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_samples: int = 1
    blocks: tuple[int, ...] = ()
    key: str = ""


class ReplicaChoice(msgspec.Struct, frozen=True):
    """The replica, and what it is expected to have to do for the request: tokens to compute and to generate."""

    number: int
    num_tokens: int
    num_cached_tokens: int = 0


class Policy(Protocol):
    """Chooses among candidates, of which there is at least one."""

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> ReplicaChoice:
        """The replica for a request that is sent there now."""
        ...

    def forget(self, number: int) -> None:
        """A replica holds nothing of what it was sent: other weights, a flushed cache, another process, or gone."""
        ...


class LeastBusy:
    """The candidate with the least `burden`; of equals the next one after the one chosen last."""

    def __init__(self, burden: Callable[[Candidate], int]) -> None:
        self._burden = burden
        self._turn = _Turn()

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> ReplicaChoice:
        """See `Policy`."""
        number = self._turn.least(candidates, self._burden)
        return ReplicaChoice(number, ask.num_prompt_tokens + ask.num_new_tokens * ask.num_samples)

    def forget(self, number: int) -> None:
        """See `Policy`. Nothing is remembered of a replica."""


class CacheAware:
    """The least expected cost: the tokens of the prompt that the replica does not hold, and those it has to do already.

    What a routing key came with stays with its replica; so do the samples of one prompt, `GROUP_SAMPLES` at a time.
    """

    def __init__(self, index: PrefixIndex, max_groups: int = MAX_GROUPS) -> None:
        self._index = index
        self._groups: OrderedDict[str | int, _Group] = OrderedDict()
        self._max_groups = max_groups
        self._turn = _Turn()

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> ReplicaChoice:
        """See `Policy`."""
        key: str | int | None = ask.key or (ask.blocks[-1] if ask.blocks else None)
        group = None if key is None else self._groups.get(key)
        offered = {each.number for each in candidates}
        if group is None or group.number not in offered or not (ask.key or group.num_samples < GROUP_SAMPLES):
            group = _Group(self._turn.least(candidates, lambda each: self._uncached(ask, each) + each.num_tokens))
        group.num_samples += ask.num_samples
        num_cached = ask.num_prompt_tokens - self._uncached_at(ask, group.number)
        if key is not None:
            self._remember(key, group)
        self._index.insert(group.number, ask.blocks)
        num_tokens = ask.num_prompt_tokens - num_cached + ask.num_new_tokens * ask.num_samples
        return ReplicaChoice(group.number, num_tokens, num_cached)

    def forget(self, number: int) -> None:
        """See `Policy`. Groups stay where they are: their prefixes are computed there once more."""
        self._index.forget(number)

    def _uncached(self, ask: Ask, candidate: Candidate) -> int:
        return self._uncached_at(ask, candidate.number)

    def _uncached_at(self, ask: Ask, number: int) -> int:
        """Tokens of the prompt that the replica has to compute, as far as the index knows."""
        if not ask.blocks:
            return ask.num_prompt_tokens
        num_held = self._index.match(number, ask.blocks)
        return ask.num_prompt_tokens - ask.num_prompt_tokens * num_held // len(ask.blocks)

    def _remember(self, key: str | int, group: _Group) -> None:
        self._groups[key] = group
        self._groups.move_to_end(key)
        if len(self._groups) > self._max_groups:
            self._groups.popitem(last=False)


class _Group:
    """Samples that belong together, and where they go."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_samples = 0


class _Turn:
    """Breaks ties in the order of numbers, going round."""

    def __init__(self) -> None:
        self._last = -1

    def least(self, candidates: Sequence[Candidate], burden: Callable[[Candidate], int]) -> int:
        """The number of the candidate with the least burden."""
        last = self._last
        chosen = min(candidates, key=lambda each: (burden(each), each.number <= last, each.number))
        self._last = chosen.number
        return chosen.number


def make_policy(name: PolicyName, max_index_blocks: int) -> Policy:
    """The policy of that name; `max_index_blocks` bounds what is remembered of each replica."""
    if name == "cache_aware":
        return CacheAware(PrefixIndex(max_index_blocks))
    burdens: dict[str, Callable[[Candidate], int]] = {
        "round_robin": lambda candidate: 0,
        "shortest_queue": lambda candidate: candidate.num_requests,
        "fewest_tokens": lambda candidate: candidate.num_tokens,
    }
    return LeastBusy(burdens[name])
