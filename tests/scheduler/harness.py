"""Drives a scheduler against the fake device, checks every invariant, and knows what each request must get."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import numpy as np

from headrace.cache.radix_tree import Node
from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.types.errors import ErrorInfo
from headrace.types.plan import LAST_TOKEN, StepPlan
from headrace.types.request import Delta, Request, unpack_floats, unpack_ids
from tests.cache.trees import nodes
from tests.scheduler.fake_device import FakeDevice
from tests.scheduler.oracle import VOCAB_SIZE, Truth, cell_value, empty_prefix, extend, logprob

ERROR = ErrorInfo("DeadlineError", "too late")


class Received:
    """What one request has got so far."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[str] = []
        self.num_landed = 0
        self.prompt_logprobs: list[float] | None = None
        self.prompt_spans: tuple[tuple[str, int], ...] = ()
        self.num_preemptions = 0
        self.final: Delta | None = None


class Harness:
    """One scheduler, one device, and the books of every request, by handle. A request's seed is its handle."""

    def __init__(self, limits: SchedulerLimits, num_tokens: tuple[int, int] = (1, 1)) -> None:
        """`num_tokens`: fewest and most tokens that a row of a step brings."""
        self.limits = limits
        self.scheduler = Scheduler(limits, version="0")
        self.truths: dict[int, Truth] = {}
        self.device = FakeDevice(limits, self.truths, num_tokens)
        self.received: dict[int, Received] = {}
        self.versions: dict[int, dict[int, tuple[str, int]]] = {}
        self.epochs = {"0": 0}
        self.discarded: set[int] = set()
        self.num_versions = 1
        self.has_pictures = False
        self.plan_log = hashlib.sha256()

    def add(self, request: Request, now: float = 0.0, units: bytes = b"") -> None:
        """Add a request, which must be acceptable. `units` are those of its prompt, where they are not its ids."""
        assert request.seed == request.handle
        self.scheduler.add(request, now)
        if units:
            roster = self.scheduler._roster
            sequence = roster.by_handle[request.handle]
            roster.waiting.remove(sequence)
            sequence.units = units
            roster.waiting.push(sequence)
        self.truths[request.handle] = Truth(request, self.limits.context_length, units or request.prompt)
        self.received[request.handle] = Received()
        self.versions[request.handle] = {}

    def issue(self, *, admit_new: bool = True) -> StepPlan | None:
        """Plan one step and give it to the device."""
        plan = self.scheduler.plan(admit_new=admit_new)
        if plan is None:
            self._check_progress(admit_new=admit_new)
            return None
        for array in (plan.row_slots, plan.row_starts, plan.row_lengths, plan.token_ids, plan.page_ids):
            self.plan_log.update(array.tobytes())
        assert self.limits.num_cohorts == 1 or LAST_TOKEN not in plan.token_ids, "a token of a step in flight is needed"
        self.device.submit(plan)
        for handle, positions in self.device.in_flight[-1].sampled:
            versions = self.versions[handle]
            assert self.device.max_tokens > 1 or positions.start not in versions, "a position was sampled twice"
            for position in positions:
                versions.setdefault(position, (self.scheduler.version, plan.step_id))
        self._check_in_flight_pages()
        return plan

    def land(self) -> None:
        """Apply the oldest result."""
        sampled = self.device.in_flight[0].sampled
        self.take(self.scheduler.apply(self.device.collect()))
        for handle, positions in sampled:
            received, truth = self.received[handle], self.truths[handle]
            every = truth.request.deliver_every
            received.num_landed = max(received.num_landed, positions.stop - len(truth.prompt))
            is_live = received.final is None and handle not in self.discarded
            assert not (is_live and every) or received.num_landed - len(received.token_ids) < every, "a delta is late"
        self._check_in_flight_pages()

    def settle(self) -> None:
        """Apply every result in flight."""
        while self.scheduler.num_in_flight:
            self.land()

    def run(self, *, admit_new: bool = True) -> None:
        """Step until nothing is left, each result held back as long as the scheduler can still plan without it."""
        while True:
            plan = self.issue(admit_new=admit_new)
            if plan is None:
                if not self.scheduler.num_in_flight:
                    return
                self.land()

    def end(self, num_rounds: int | None = None) -> None:
        """Run until nothing is left, or give up what is left after so many more results; then everything comes back."""
        for _ in range(num_rounds or 0):
            while self.issue() is not None:
                pass
            if self.scheduler.num_in_flight:
                self.land()
        if num_rounds is not None:
            self.settle()
            self.take(self.scheduler.abort(None, "enough"))
        self.run()
        self.check_end()

    def forget_steps(self) -> None:
        """No plan in flight will have a result: undo what this model of the device and of versions noted for them."""
        for issued in self.device.in_flight:
            self.device.forget(issued)
            for handle, positions in issued.sampled:
                for position in positions:
                    if self.versions[handle].get(position, ("", -1))[1] == issued.plan.step_id:
                        self.versions[handle].pop(position)
        self.device.in_flight.clear()

    def lose_steps(self) -> None:
        """The oldest step in flight fails: what it was to write is void, as is all that those after it did."""
        self.forget_steps()
        self.take(self.scheduler.lose_step(ERROR))

    def update(self, in_flight: str) -> None:
        """Change the weights between steps."""
        if in_flight == "drain":
            self.run(admit_new=False)
            assert self.scheduler.num_started == 0
        self.settle()
        if in_flight == "abort":
            self.take(self.scheduler.abort(None, "updating"))
        elif in_flight == "recompute":
            self.scheduler.recompute_running()
        self.device.epoch += 1
        self.scheduler.set_weights(self.next_version(), self.device.epoch)

    def next_version(self) -> str:
        """A label that sorts after all before it as a number."""
        self.num_versions += 1
        self.epochs[str(self.num_versions - 1)] = self.device.epoch
        return str(self.num_versions - 1)

    def discard(self, handles: list[int]) -> None:
        """The front ends requests itself."""
        self.scheduler.discard(handles)
        self.discarded |= set(handles)

    def take(self, deltas: list[Delta]) -> None:
        """Book deltas, checking each against the truth."""
        for delta in deltas:
            assert delta.handle not in self.discarded, "a delta for a request that was given up"
            received = self.received[delta.handle]
            assert received.final is None, "a delta after the terminal one"
            self._take(delta, received)
            if delta.finish is not None:
                received.final = delta
                self._check_final(delta, received)

    def _take(self, delta: Delta, received: Received) -> None:
        truth = self.truths[delta.handle]
        first = len(truth.prompt) + len(received.token_ids)
        token_ids = unpack_ids(delta.token_ids).tolist()
        count = len(token_ids)
        assert token_ids == [truth.token(first + index) for index in range(count)]
        assert unpack_floats(delta.logprobs).tolist() == [logprob(delta.handle, first + i) for i in range(count)]
        assert sum(number for _, number in delta.spans) == count and all(number > 0 for _, number in delta.spans)
        versions = [version for version, number in delta.spans for _ in range(number)]
        assert versions == [self.versions[delta.handle][first + index][0] for index in range(count)]
        assert delta.span_epochs == tuple(self.epochs[version] for version, _ in delta.spans)
        options = truth.request.logprobs
        positions = np.arange(first, first + count)
        assert unpack_ids(delta.extras.top_ids).tolist() == np.repeat(positions % VOCAB_SIZE, options.num_top).tolist()
        assert unpack_floats(delta.extras.top_logprobs).tolist() == np.repeat(positions, options.num_top).tolist()
        asked = np.repeat(positions, len(options.token_ids)).tolist()
        assert unpack_floats(delta.extras.asked_logprobs).tolist() == asked
        received.token_ids += token_ids
        received.versions += versions
        assert received.versions == sorted(received.versions, key=int), "a version went backwards"
        assert delta.num_preemptions >= received.num_preemptions
        received.num_preemptions = delta.num_preemptions
        every = truth.request.deliver_every
        is_due = every > 0 and every <= count < every + self.device.max_tokens
        assert delta.finish is not None or is_due, "a delta that was not due"
        if delta.prompt_logprobs:
            assert received.prompt_logprobs is None, "prompt logprobs came twice"
            received.prompt_logprobs = unpack_floats(delta.prompt_logprobs).tolist()
            self._check_prompt_extras(delta, truth)
        if delta.prompt_spans:
            received.prompt_spans = delta.prompt_spans

    @staticmethod
    def _check_prompt_extras(delta: Delta, truth: Truth) -> None:
        """Where a position was scored, what else was asked of it is of that very position."""
        options = truth.request.logprobs
        is_scored = ~np.isnan(unpack_floats(delta.prompt_logprobs))
        start = options.prompt_start or 0
        positions = np.arange(start, start + len(is_scored))[is_scored]
        for packed, width in (
            (delta.prompt_extras.top_logprobs, options.num_top),
            (delta.prompt_extras.asked_logprobs, len(options.token_ids)),
        ):
            values = unpack_floats(packed).reshape(len(is_scored), width)
            assert (values[is_scored] == positions[:, None]).all()

    def _check_final(self, delta: Delta, received: Received) -> None:
        truth, finish = self.truths[delta.handle], delta.finish
        assert finish is not None
        expected, matched = truth.output()
        if finish.type in ("stop", "length"):
            assert received.token_ids == expected and finish.matched == matched
            assert finish.type == ("length" if matched is None else "stop")
        else:
            assert len(received.token_ids) <= len(expected)
        self._check_prompt(truth, received, is_whole=finish.type in ("stop", "length"))

    def _check_prompt(self, truth: Truth, received: Received, *, is_whole: bool) -> None:
        start, values = truth.request.logprobs.prompt_start, received.prompt_logprobs
        self._check_prompt_spans(truth, received, is_whole=is_whole)
        if start is None or start >= len(truth.prompt):
            assert values is None
        elif values is not None or is_whole:
            assert values is not None and len(values) == len(truth.prompt) - start
            for position, value in enumerate(values, start):
                is_missing = bool(np.isnan(value))
                assert is_missing or value == logprob(truth.request.seed, position)
                assert not is_missing or position == 0 or not is_whole

    def _check_prompt_spans(self, truth: Truth, received: Received, *, is_whole: bool) -> None:
        """Scores are all of one set of weights, whatever its labels, and of that of the first token."""
        spans = received.prompt_spans
        labels = [version for version, _ in spans] + received.versions[:1]
        assert not spans or len({self.epochs[label] for label in labels}) == 1, "two sets of weights scored a prompt"
        start = truth.request.logprobs.prompt_start
        is_scored = (start is not None and start < len(truth.prompt)) or not truth.output()[0]
        num_scored = sum(count for _, count in spans)
        assert num_scored == len(truth.prompt) if is_whole and is_scored else num_scored <= len(truth.prompt)
        if received.prompt_logprobs is not None:
            known = np.flatnonzero(~np.isnan(received.prompt_logprobs))
            assert not len(known) or (start or 0) + int(known[-1]) < num_scored, "a score without a version"

    def _check_progress(self, *, admit_new: bool) -> None:
        scheduler = self.scheduler
        if scheduler.num_in_flight == 0:
            assert scheduler.num_started == 0, "started sequences do not progress"
            assert scheduler.num_waiting == 0 or not admit_new, "waiting requests are not admitted"

    def _check_in_flight_pages(self) -> None:
        if not self.device.in_flight:
            return
        pool = self.scheduler._roster.leases.pool
        free = set(pool._free[: pool.num_free].tolist())
        for issued in self.device.in_flight:
            assert not free & issued.pages, "a page of a step in flight is free"

    def check_published(self) -> None:
        """Every published page holds the KV of its very prefix, computed by the weights of its namespace."""
        for node, prefix_hash in self._published():
            units = np.frombuffer(node.key, dtype=np.int32).tolist()
            cells: list[int | None] = []
            for unit in units:
                prefix_hash = extend(prefix_hash, unit)
                cells.append(cell_value(node.namespace.epoch, prefix_hash))
            assert self.device.cells(node.pages.tolist()) == cells, "a published page holds something else"

    def _published(self) -> list[tuple[Node, int]]:
        """Nodes of the tree with the hash of what is before them."""
        hashes: dict[Node, int] = {}
        found = []
        for node in nodes(self.scheduler._roster.leases.tree):
            path = [node]
            while path[-1].parent is not None:
                path.append(path[-1].parent)
            before = empty_prefix(node.namespace.extra_key)
            for above in reversed(path[1:]):
                if above not in hashes:
                    hashes[above] = before
                    for unit in np.frombuffer(above.key, dtype=np.int32).tolist():
                        hashes[above] = extend(hashes[above], unit)
                before = hashes[above]
            found.append((node, before))
        return found

    def check_books(self) -> None:
        """Recount pages, pins and slots from what holds them."""
        leases, table = self.scheduler._roster.leases, self.scheduler._roster.table
        references = np.zeros(self.limits.num_pages, dtype=np.int32)
        leased: set[int] = set()
        pinned: set[Node] = set()
        for slot, sequence in enumerate(table.sequences):
            assert (sequence is None) == (leases.num_pages[slot] == 0)
            pages = leases.pages[slot, : leases.num_pages[slot]]
            references[pages] += 1
            leased |= set(pages.tolist())
            node = leases._nodes[slot]
            while node is not None and node not in pinned:
                pinned.add(node)
                node = node.parent
        for step in self.scheduler._in_flight:
            for load in step.moves.loads if step.moves else ():
                references[load.pages] += 1
            if step.moves and leases.offload and step.moves.num_flushes == leases.offload._num_flushes:
                below = [load.below for load in step.moves.loads]
                for node in [save.node for save in step.moves.saves] + below:
                    while node is not None and node not in pinned:
                        pinned.add(node)
                        node = node.parent
        found = nodes(leases.tree)
        for node in found:
            references[node.pages] += 1
            assert (node.num_pins > 0) == (node in pinned)
        evictable = {page for node in found if node not in pinned for page in node.pages.tolist()}
        free = set(leases.pool._free[: leases.pool.num_free].tolist())
        assert references.tolist() == leases.pool._references.tolist()
        assert len(free) == leases.pool.num_free and not free & set(np.flatnonzero(references).tolist())
        assert len(evictable) == leases.tree.num_evictable and not evictable & leased
        assert self.scheduler.num_used_tokens == leases.num_used * self.limits.page_size
        assert leases.pool.num_free + leases.num_used + leases.tree.num_evictable == self.limits.num_pages - 1
        self._check_host_books()
        assert len(table.free_slots) + sum(s is not None for s in table.sequences) == self.limits.num_slots

    def _check_host_books(self) -> None:
        """Recount the host's pages, and who has what kept there: those that wait to come back."""
        roster = self.scheduler._roster
        kept = Counter[bytes]()
        for sequence in roster.by_handle.values():
            kept.update(sequence.kept_by_host)
            assert not sequence.kept_by_host or sequence in roster.preempted
        if roster.leases.offload is None:
            assert not kept
            return
        tier = roster.leases.offload.tier
        assert tier._keepers == kept and len(kept) <= tier.num_pages
        assert tier._kept.keys() <= kept.keys() and not tier._held.keys() & kept.keys()
        pages = [*tier._held.values(), *tier._kept.values(), *tier._coming.values(), *tier._free, *tier._forgotten]
        assert sorted(pages) == list(range(tier.num_pages)), "a host page is lost, or is twice somebody's"

    def check_end(self) -> None:
        """Every accepted request was answered, and everything comes back."""
        for handle, received in self.received.items():
            assert (received.final is None) == (handle in self.discarded)
        assert self.scheduler.num_started == self.scheduler.num_waiting == self.scheduler.num_running == 0
        self.check_books()
        self.check_published()
        assert self.scheduler.num_used_tokens == 0
        self.scheduler.flush_cache()
        assert self.scheduler.metrics()["num_free_pages"] == self.limits.num_pages - 1
        self.check_books()


def random_limits(random_: random.Random, overlap_depth: int, num_cohorts: int = 1) -> SchedulerLimits:
    """Small limits, so that pages, slots, budget and context all run out."""
    page_size = random_.choice((1, 1, 2, 2, 3, 4, 8, 16))
    context_length = random_.randint(6, 26)
    least = -(-context_length // page_size)
    costs = random.Random(64 * context_length + page_size)
    return SchedulerLimits(
        max_running_requests=random_.choice((1, 2, 4, 6, 8)),
        max_waiting_requests=100,
        max_num_batched_tokens=random_.choice((2, 5, 9, 16, 30, 100)),
        context_length=context_length,
        page_size=page_size,
        num_pages=1 + least + random_.randint(0, max(1, least // 2)),
        prefix_cache=random_.random() < 0.9,
        overlap_depth=overlap_depth,
        vocab_size=5,
        num_host_pages=random_.choice((0, 0, 1, 4, 30)),
        max_page_moves=random_.choice((1, 3, 100)),
        num_cohorts=num_cohorts,
        prefill_step_tokens=random_.choice((0, 1, 12, 40)),
        max_step_cost=costs.choice((0, 0, 1, 7, 20)),
        attended_per_token=costs.choice((1, 4, 30)),
    )
