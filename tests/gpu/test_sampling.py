"""The device sampler on a device: equal to the CPU's at real sizes, captured, never waiting, never compiling."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from headrace.kernels.compile_counter import CompileCounter
from headrace.sampling.device_sampler import DeviceSampler, PendingExtras
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling
from tests.sampling.device_pair import DEVICE, MODES, Pair, assert_same_extras, make_init, normal

VOCAB = 151936
NUM_SLOTS = 64

SAMPLINGS = [
    TokenSampling(),
    TokenSampling(0.7),
    TokenSampling(0.0),
    TokenSampling(0.9, top_k=50),
    TokenSampling(1.0, top_k=200, min_p=0.02),
    TokenSampling(0.8, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1),
    TokenSampling(0.0, logit_bias=tuple((token, 0.5) for token in range(0, 4000, 7))),
    TokenSampling(1.3, top_k=40, repetition_penalty=0.9, logit_bias=((5, 3.0), (VOCAB - 1, 9.0))),
]


def any_init(slot: int, num_top: int = 0) -> SlotInit:
    return make_init(
        slot, SAMPLINGS[slot % len(SAMPLINGS)], mode=MODES[slot % 3], prompt_mode=MODES[(slot // 5) % 3],
        num_top=num_top if slot % 4 else 0, asked=(1, 7, VOCAB) if slot % 5 == 0 else (),
        stop_ids=(2, 3, 9), min_length=6 if slot % 7 == 0 else 0,
    )  # fmt: skip


@pytest.mark.parametrize("num_top", [5, 20, 300])
def test_it_equals_the_cpu_at_real_sizes(num_top: int) -> None:
    pair = Pair(VOCAB, NUM_SLOTS)
    pair.device.warm()
    pair.enter(*(any_init(slot, num_top) for slot in range(NUM_SLOTS)))
    order = np.random.default_rng(num_top)
    for position in (4, 5, 6):
        slots = order.permutation(NUM_SLOTS).tolist()
        pair.step(normal(NUM_SLOTS, position, VOCAB), slots, [position] * NUM_SLOTS)
    plain, truncated = [0, 1, 2, 9, 10], [1, 2, 3, 11, 17]
    pair.enter(*(make_init(slot, SAMPLINGS[slot % 8]) for slot in {*plain, *truncated}))
    for slots in (plain, truncated):
        pair.step(normal(5, slots[0], VOCAB), slots, [4] * 5)
    assert pair.paths == ["eager"] * 3 + ["plain", "full"]
    for slot in range(0, NUM_SLOTS, 5):
        pair.score(normal(3, slot, VOCAB), np.array([0, slot, VOCAB - 1]), slot)


class Batch:
    """Static memory of one step, as a runner has it."""

    def __init__(self, num_rows: int) -> None:
        self.logits = torch.randn(num_rows, VOCAB, device=DEVICE) * 3
        self.slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
        self.positions = torch.full_like(self.slots, 4)
        self.tokens = torch.full_like(self.slots, -1)
        self.logprobs = torch.zeros(num_rows, device=DEVICE)
        self.arrays = np.arange(num_rows, dtype=np.int32), np.full(num_rows, 4, np.int32)

    def sample(self, sampler: DeviceSampler, *, plain: bool) -> None:
        sampler.sample(self.logits, self.slots, self.positions, self.tokens, self.logprobs, plain=plain)

    def sample_eager(
        self, sampler: DeviceSampler, rows: slice = slice(None), logits: torch.Tensor | None = None
    ) -> PendingExtras | None:
        return sampler.sample_eager(
            (self.logits if logits is None else logits)[rows], self.slots[rows], self.positions[rows],
            self.tokens[rows], self.logprobs[rows], *(array[rows] for array in self.arrays),
        )  # fmt: skip


def entered(*inits: SlotInit) -> DeviceSampler:
    sampler = DeviceSampler(VOCAB, len(inits), len(inits), DEVICE)
    sampler.warm()
    records = np.stack([sampler.enter(init) for init in inits])
    sampler.write_slots(torch.from_numpy(records).to(DEVICE))
    return sampler


@pytest.mark.parametrize("plain", [True, False])
def test_a_captured_step_repeats_the_eager_one(plain: bool) -> None:
    """Of rows whose penalties act as well: each sees what the other has counted, so it goes from the same counts."""
    inits = [make_init(slot, SAMPLINGS[slot % (3 if plain else 8)], mode=MODES[slot % 3]) for slot in range(32)]
    sampler, batch = entered(*inits), Batch(32)
    again = entered(*inits)
    batch.sample(again, plain=plain)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.sample(again, plain=plain)
    batch.sample(sampler, plain=plain)
    for position in (4, 5):
        batch.positions.fill_(position)
        batch.sample(sampler, plain=plain)
        tokens, logprobs = batch.tokens.clone(), batch.logprobs.clone()
        batch.tokens.fill_(-1)
        graph.replay()
        assert torch.equal(batch.tokens, tokens) and torch.equal(batch.logprobs, logprobs)
        assert torch.equal(again.last_tokens, tokens)


def test_rows_have_the_same_bits_alone_and_their_numbers_agree() -> None:
    sampler = entered(*(any_init(slot, 5) for slot in range(16)))
    batch = Batch(16)
    batch.positions.fill_(7)
    batch.arrays[1].fill(7)
    unpenalised = [slot for slot in range(16) if not SAMPLINGS[slot % 8].has_penalties]
    pending = batch.sample_eager(sampler)
    torch.cuda.synchronize()
    assert pending is not None
    extras, tokens, logprobs = pending.finish(), batch.tokens.tolist(), batch.logprobs.tolist()
    for slot in unpenalised:
        again = batch.sample_eager(sampler, slice(slot, slot + 1))
        torch.cuda.synchronize()
        assert batch.tokens[slot] == tokens[slot] and batch.logprobs[slot] == logprobs[slot]
        if again is not None:
            found = again.finish()[0]
            assert_same_extras(found, extras[slot])
            assert found.top_logprobs.tobytes() == extras[slot].top_logprobs.tobytes()
    for slot, extra in extras.items():
        at = np.flatnonzero(extra.top_ids[0] == tokens[slot])
        assert all(extra.top_logprobs[0, at] == np.float32(logprobs[slot])), "one formula, one value"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Torch raises where an operation would wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_are_enqueued_without_waiting_and_keep_their_own_results() -> None:
    inits = [any_init(slot, 5) for slot in range(16)]
    sampler, batch = entered(*inits), Batch(16)
    expected = batch.sample_eager(sampler)
    other_logits = batch.logits.flip(1).contiguous()
    targets = torch.arange(16, device=DEVICE)
    with no_waiting():
        for init in inits:  # counts as they were
            sampler.enter(init)
        sampler.score(batch.logits, targets, 14)
        scores = sampler.score(batch.logits, targets, 8)
        first = batch.sample_eager(sampler)
        second = batch.sample_eager(sampler, logits=other_logits)
        other_scores = sampler.score(other_logits, targets, 8)
    torch.cuda.synchronize()
    assert expected is not None and first is not None and second is not None
    wanted, found, others = expected.finish(), first.finish(), second.finish()
    for slot in wanted:
        assert_same_extras(found[slot], wanted[slot])
    assert any(not np.array_equal(others[slot].top_ids, found[slot].top_ids) for slot in found)
    assert not np.array_equal(scores.finish()[0], other_scores.finish()[0])


def test_nothing_compiles_after_warming() -> None:
    counter = CompileCounter()
    vocab_size = 50257  # rows begin at no multiple of 16 bytes
    pair = Pair(vocab_size, 24, max_rows=32)
    pair.device.warm()
    counter.arm()
    try:
        for position, num_rows in ((4, 1), (5, 3), (6, 16), (7, 24)):
            for num_top in (0, 1, 5, 33):
                pair.enter(*(any_init(slot, num_top) for slot in range(24)))
                pair.step(normal(num_rows, position, vocab_size), list(range(num_rows)), [position] * num_rows)
                pair.step(normal(1, position, vocab_size), [1], [position], padding=num_rows)
            for slot in (num_rows - 1, 14):
                pair.score(normal(num_rows * 3, 1, vocab_size), np.arange(num_rows * 3), slot)  # in parts
    finally:
        counter.disarm()
    assert counter.num_calls == 0
