"""The sampler against its float64 reference: distribution, processors, modes, extras, batches, scoring."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from headrace.sampling import Sampled, Sampler
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobMode, LogprobOptions
from tests.sampling import reference
from tests.sampling.masks import allow

MODES: tuple[LogprobMode, ...] = ("raw", "temperature", "sampled")
CPU = torch.device("cpu")


def make_init(
    slot: int = 0,
    *,
    seed: int = 1,
    prompt: tuple[int, ...] = (3, 4, 5, 5),
    output: tuple[int, ...] = (),
    sampling: TokenSampling | None = None,
    mode: LogprobMode = "temperature",
    prompt_mode: LogprobMode = "raw",
    num_top: int = 0,
    asked: tuple[int, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    min_length: int = 0,
    max_kept: int = 0,
) -> SlotInit:
    return SlotInit(
        slot=slot,
        seed=seed,
        num_prompt_tokens=len(prompt),
        token_ids=np.array(prompt + output, np.int32),
        sampling=sampling or TokenSampling(),
        logprobs=LogprobOptions(mode, prompt_mode, None, num_top, asked, max_kept),
        stop_token_ids=stop_token_ids,
        min_length=min_length,
    )


def make_sampler(*inits: SlotInit, vocab_size: int, numerics: str = "fast") -> Sampler:
    sampler = Sampler(vocab_size, max(init.slot for init in inits) + 1)
    for init in inits:
        sampler.enter(init)
    return sampler


def draw(sampler: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int]) -> Sampled:
    return sampler.sample(logits, torch.tensor(slots, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64))


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    "sampling",
    [
        TokenSampling(),
        TokenSampling(temperature=0.6),
        TokenSampling(temperature=1.7),
        TokenSampling(temperature=0.9, top_k=12),
        TokenSampling(top_p=0.8),
        TokenSampling(min_p=0.1),
        TokenSampling(temperature=1.3, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.4),
    ],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_tokens_follow_the_distribution_they_are_drawn_from(sampling: TokenSampling, varied: str) -> None:
    num_draws, vocab_size = 6000, 60
    row = random_logits(1, vocab_size, 1, 1.5)
    slots = list(range(num_draws))
    inits = [make_init(slot, seed=slot if varied == "seed" else 77, sampling=sampling) for slot in slots]
    positions = slots if varied == "position" else [4] * num_draws
    sampled = draw(make_sampler(*inits, vocab_size=vocab_size), row.expand(num_draws, -1), slots, positions)
    counts = np.bincount(sampled.token_ids.numpy(), minlength=vocab_size)
    expected = np.exp(reference.drawn_from(row[0].double().numpy(), inits[0], 4)) * num_draws
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 6


def test_a_log_probability_below_the_least_float_is_minus_infinity_without_a_word() -> None:
    sampler = make_sampler(make_init(sampling=TokenSampling(temperature=1e-3), num_top=2), vocab_size=2)
    with np.errstate(over="raise"):
        sampled = draw(sampler, torch.tensor([[3e38, -3e37]]), [0], [4])
    assert sampled.extras[0].top_logprobs.tolist() == [[0.0, -math.inf]]


def test_seeds_and_positions_are_independent_draws() -> None:
    vocab_size, num_slots = 40, 3000
    row = random_logits(1, vocab_size, 5, 1.5)
    sampler = make_sampler(*(make_init(slot, seed=slot) for slot in range(num_slots)), vocab_size=vocab_size)
    pairs = np.zeros((2, 2))
    first, second = (
        draw(sampler, row.expand(num_slots, -1), list(range(num_slots)), [position] * num_slots).token_ids.numpy()
        for position in (4, 5)
    )
    probabilities = torch.softmax(row[0], -1).numpy()
    likely = np.flatnonzero(np.argsort(np.argsort(-probabilities)) < 5)
    share = probabilities[likely].sum()
    for a, b in zip(np.isin(first, likely), np.isin(second, likely), strict=True):
        pairs[int(a), int(b)] += 1
    expected = num_slots * np.outer([1 - share, share], [1 - share, share])
    assert ((pairs - expected) ** 2 / expected).sum() < 18  # 3 degrees of freedom, 99.95th percentile


PENALTIES = [
    TokenSampling(),
    TokenSampling(repetition_penalty=1.4),
    TokenSampling(presence_penalty=0.7, frequency_penalty=-0.3),
    TokenSampling(
        repetition_penalty=0.7, presence_penalty=-0.5, frequency_penalty=0.6, logit_bias=((2, 5.0), (9, -50.0))
    ),
]
GRID = list(itertools.product((0.0, 0.3, 1.0, 2.5), (0, 1, 7), (1.0, 0.6), (0.0, 0.1), PENALTIES))


@pytest.mark.parametrize("mode", MODES)
def test_every_processor_matches_float64_over_the_grid(mode: LogprobMode) -> None:
    vocab_size = 97
    logits = random_logits(len(GRID), vocab_size, 11)
    inits = [
        make_init(
            slot,
            seed=slot * 7919,
            prompt=(1, 2, 3, 3),
            output=(3, 8, 8, 9),
            mode=mode,
            num_top=vocab_size,
            max_kept=vocab_size,
            sampling=TokenSampling(
                temperature,
                top_k,
                top_p,
                min_p,
                penalties.repetition_penalty,
                penalties.presence_penalty,
                penalties.frequency_penalty,
                penalties.logit_bias,
            ),
            stop_token_ids=(int(logits[slot].argmax()), 5),
            min_length=9 if slot % 2 else 0,
        )
        for slot, (temperature, top_k, top_p, min_p, penalties) in enumerate(GRID)
    ]
    sampler = make_sampler(*inits, vocab_size=vocab_size)
    before = logits.clone()
    sampled = draw(sampler, logits, list(range(len(GRID))), [8] * len(GRID))
    assert torch.equal(logits, before)
    for slot, init in enumerate(inits):
        row = logits[slot].double().numpy()
        expected = reference.in_mode(row, init, 8, mode)
        found = np.full(vocab_size, np.nan)
        found[sampled.extras[slot].top_ids[0]] = sampled.extras[slot].top_logprobs[0]
        assert np.array_equal(np.isinf(found), np.isinf(expected)), init.sampling
        could_be = np.flatnonzero(~np.isinf(reference.drawn_from(row, init, 8)))
        assert sampled.extras[slot].kept_ids.tolist() == could_be.tolist(), init.sampling
        assert sampled.extras[slot].kept_counts.tolist() == [len(could_be)]
        alive = ~np.isinf(expected)
        assert np.allclose(found[alive], expected[alive], rtol=0, atol=3e-5), init.sampling
        token = int(sampled.token_ids[slot])
        assert token == int(reference.scores(row, init, 8).argmax()), init.sampling
        assert float(sampled.logprobs[slot]) == pytest.approx(expected[token], abs=3e-5)


@pytest.mark.parametrize("vocab_size", [300, 151936])
@pytest.mark.parametrize("mode", MODES)
def test_logprobs_in_every_mode_at_real_vocabulary_sizes(mode: LogprobMode, vocab_size: int) -> None:
    temperatures = (0.0, 0.2, 1.0, 1.8)
    logits = random_logits(len(temperatures), vocab_size, 2, 6.0)
    inits = [make_init(slot, mode=mode, sampling=TokenSampling(t, top_p=0.9)) for slot, t in enumerate(temperatures)]
    inits += [make_init(slot + 4, mode=mode, sampling=TokenSampling(t)) for slot, t in enumerate(temperatures)]
    sampled = draw(make_sampler(*inits, vocab_size=vocab_size), logits.repeat(2, 1), list(range(8)), [4] * 8)
    for slot, init in enumerate(inits):
        expected = reference.in_mode(logits[slot % 4].double().numpy(), init, 4, mode)
        assert float(sampled.logprobs[slot]) == pytest.approx(expected[int(sampled.token_ids[slot])], abs=2e-5)


def test_greedy_takes_the_lowest_id_among_equals_and_its_logprob_is_raw() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, 0.0], [4.0, 1.0, 4.0, 4.0]])
    raw = torch.log_softmax(logits.double(), -1)
    for mode in MODES:
        inits = [make_init(slot, prompt=(0,), mode=mode, sampling=TokenSampling(0.0)) for slot in (0, 1)]
        sampled = draw(make_sampler(*inits, vocab_size=4), logits, [0, 1], [1, 1])
        assert sampled.token_ids.tolist() == [1, 0]
        expected = [0.0, 0.0] if mode == "sampled" else [float(raw[0, 1]), float(raw[1, 0])]
        assert sampled.logprobs.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_temperature_below_the_greedy_bound_is_greedy() -> None:
    logits = random_logits(1, 50)
    sampler = make_sampler(make_init(sampling=TokenSampling(1e-7)), vocab_size=50)
    assert draw(sampler, logits, [0], [4]).token_ids.tolist() == [int(logits.argmax())]


def test_extras_are_sorted_with_the_lowest_id_first_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 1.0, 1.0]])
    init = make_init(prompt=(0,), num_top=4, asked=(5, 1, 99), mode="raw")
    extras = draw(make_sampler(init, vocab_size=6), logits, [0], [1]).extras[0]
    raw = torch.log_softmax(logits.double(), -1)[0]
    assert extras.top_ids.tolist() == [[1, 3, 2, 4]] and extras.top_ids.dtype == np.int32
    assert extras.top_logprobs[0].tolist() == pytest.approx([float(raw[i]) for i in (1, 3, 2, 4)], abs=1e-6)
    assert extras.asked_logprobs[0, :2].tolist() == pytest.approx([float(raw[5]), float(raw[1])], abs=1e-6)
    assert extras.asked_logprobs[0, 2] == -np.inf


def test_extras_come_only_for_rows_that_asked_and_at_most_the_vocabulary() -> None:
    keeping = make_init(3, max_kept=1, sampling=TokenSampling(top_k=7))  # how many is not the sampler's concern
    inits = [make_init(0), make_init(1, num_top=1000), make_init(2, asked=(4,)), keeping]
    sampled = draw(make_sampler(*inits, vocab_size=30), random_logits(4, 30), [0, 1, 2, 3], [4, 4, 4, 4])
    assert sorted(sampled.extras) == [1, 2, 3] and sampled.extras[3].kept_counts.tolist() == [7]
    assert all(len(sampled.extras[row].kept_counts) == 0 for row in (1, 2))
    assert sampled.extras[1].top_ids.shape == (1, 30) and sampled.extras[1].asked_logprobs.shape == (1, 0)
    assert sampled.extras[2].top_ids.shape == (1, 0) and sampled.extras[2].asked_logprobs.shape == (1, 1)


def mixed_inits(num_slots: int) -> list[SlotInit]:
    """Every kind of slot, in a fixed shuffle."""
    random = np.random.default_rng(4)
    return [
        make_init(
            slot,
            seed=int(random.integers(0, 1 << 63)),
            mode=MODES[slot % 3],
            prompt=(1, 2, 3),
            output=(4, 5)[: slot % 3],
            num_top=3 * (slot % 4 == 0),
            asked=(7,) * (slot % 5 == 0),
            stop_token_ids=(6,),
            min_length=slot % 9,
            sampling=TokenSampling(
                temperature=(0.0, 0.5, 1.0, 1.5)[slot % 4],
                top_k=(0, 0, 9)[slot % 3],
                top_p=(1.0, 0.7)[slot % 7 == 0],
                repetition_penalty=(1.0, 1.2)[slot % 6 == 0],
            ),
        )
        for slot in range(num_slots)
    ]


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
@pytest.mark.parametrize("vocab_size", [19, 1000, 70000])
def test_a_row_is_bitwise_the_same_in_any_batch(numerics: str, vocab_size: int) -> None:
    num_slots = 24
    inits = mixed_inits(num_slots)
    logits = random_logits(num_slots, vocab_size, 8)
    positions = [5 + slot % 3 for slot in range(num_slots)]
    whole = draw(
        make_sampler(*inits, vocab_size=vocab_size, numerics=numerics), logits, list(range(num_slots)), positions
    )
    random = np.random.default_rng(0)
    batches = [[slot] for slot in range(num_slots)] + [random.permutation(num_slots)[:9].tolist() for _ in range(6)]
    for slots in batches:
        sampler = make_sampler(*inits, vocab_size=vocab_size, numerics=numerics)
        some = draw(sampler, logits[slots].clone(), slots, [positions[slot] for slot in slots])
        assert some.token_ids.tolist() == whole.token_ids[slots].tolist()
        assert some.logprobs.numpy().tobytes() == whole.logprobs[slots].numpy().tobytes()
        for row, slot in enumerate(slots):
            assert (row in some.extras) == (slot in whole.extras)
            if row in some.extras:
                assert some.extras[row].top_ids.tobytes() == whole.extras[slot].top_ids.tobytes()
                assert some.extras[row].top_logprobs.tobytes() == whole.extras[slot].top_logprobs.tobytes()
                assert some.extras[row].asked_logprobs.tobytes() == whole.extras[slot].asked_logprobs.tobytes()


def test_torch_threads_change_nothing() -> None:
    inits, logits = mixed_inits(16), random_logits(16, 70000, 1)
    threads = torch.get_num_threads()
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        results.append(draw(make_sampler(*inits, vocab_size=70000), logits, list(range(16)), [6] * 16))
    torch.set_num_threads(threads)
    assert results[0].token_ids.tolist() == results[1].token_ids.tolist()
    assert results[0].logprobs.numpy().tobytes() == results[1].logprobs.numpy().tobytes()


def test_the_slot_number_and_what_it_held_before_do_not_matter() -> None:
    logits = random_logits(1, 80)
    clean = draw(make_sampler(make_init(0, seed=5), vocab_size=80), logits, [0], [4])
    heavy = TokenSampling(0.1, 2, 0.5, 0.5, 2.0, 1.0, 1.0, ((1, 90.0),))
    reused = make_sampler(
        make_init(3, seed=9, sampling=heavy, num_top=5, mode="sampled", stop_token_ids=(1,), min_length=99),
        make_init(3, seed=5),
        vocab_size=80,
    )
    again = draw(reused, logits, [3], [4])
    assert again.token_ids.tolist() == clean.token_ids.tolist() and again.extras == {}
    assert again.logprobs.tolist() == clean.logprobs.tolist()


def test_penalties_count_sampled_tokens_as_a_preempted_sequence_recounts_them() -> None:
    sampling = TokenSampling(0.8, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.9)
    vocab_size, num_steps = 12, 40
    logits = random_logits(num_steps, vocab_size, 6, 1.0)
    going_on = make_sampler(make_init(sampling=sampling), vocab_size=vocab_size)
    output: tuple[int, ...] = ()
    for step in range(num_steps):
        restarted = make_sampler(make_init(sampling=sampling, output=output), vocab_size=vocab_size)
        results = [draw(sampler, logits[step : step + 1], [0], [4 + step]) for sampler in (going_on, restarted)]
        assert results[0].token_ids.tolist() == results[1].token_ids.tolist()
        assert results[0].logprobs.tolist() == results[1].logprobs.tolist()
        init = make_init(sampling=sampling, output=output)
        expected = reference.scores(logits[step].double().numpy(), init, 4 + step)
        assert int(results[0].token_ids[0]) == int(expected.argmax())
        output += (int(results[0].token_ids[0]),)
    assert len(set(output)) == vocab_size  # the penalties were felt


def test_stop_ids_are_masked_until_the_minimum_length() -> None:
    logits = torch.full((1, 10), -20.0)
    logits[0, 7] = 20.0
    sampler = make_sampler(make_init(stop_token_ids=(7, 8), min_length=6), vocab_size=10)
    tokens = [int(draw(sampler, logits, [0], [position]).token_ids[0]) for position in range(4, 9)]
    assert 7 not in tokens[:2] and 8 not in tokens[:2]
    assert tokens[2:] == [7, 7, 7]


def test_what_is_not_finite_stays_in_sight_behind_a_mask() -> None:
    sampler = make_sampler(*(make_init(slot, mode="sampled") for slot in range(3)), vocab_size=100)
    logits = torch.zeros(3, 100)
    logits[0, 7], logits[1, 7] = math.nan, math.inf
    found = sampler.sample(logits, torch.arange(3), torch.full((3,), 9), allow([0, 1, 2], [[5], [5], [5]], 100))
    assert found.logprobs.isnan().tolist() == [True, True, False] and found.token_ids[2] == 5


def test_ids_beyond_the_vocabulary_are_harmless() -> None:
    init = make_init(
        sampling=TokenSampling(logit_bias=((500, 5.0), (1, 0.5))), stop_token_ids=(500, 2), min_length=9, asked=(500,)
    )
    sampled = draw(make_sampler(init, vocab_size=10), random_logits(1, 10), [0], [4])
    assert int(sampled.token_ids[0]) not in (2, 500)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_score_matches_float64(mode: LogprobMode, temperature: float) -> None:
    sampling = TokenSampling(temperature, 9, 0.8, 0.01, 1.5, 0.5, 0.5, ((3, 2.0),))
    init = make_init(
        sampling=sampling, prompt_mode=mode, num_top=4, asked=(2, 3), stop_token_ids=(1,), min_length=100, output=(1, 2)
    )
    logits = random_logits(30, 50, 3)
    targets = logits.argsort(dim=-1, descending=True)[torch.arange(30), torch.arange(30) % 6]
    values, extras = make_sampler(init, vocab_size=50).score(logits, targets, 0)
    assert extras is not None and extras.top_ids.shape == (30, 4) and values.dtype == torch.float32
    for index in range(30):
        expected = reference.in_mode(logits[index].double().numpy(), init, 0, mode, scoring=True)
        assert float(values[index]) == pytest.approx(expected[int(targets[index])], abs=2e-5)
        assert extras.asked_logprobs[index].tolist() == pytest.approx(expected[[2, 3]].tolist(), abs=2e-5)
        assert extras.top_logprobs[index].tolist() == pytest.approx(np.sort(expected)[::-1][:4].tolist(), abs=2e-5)


def test_score_is_bitwise_independent_of_how_the_prompt_is_cut() -> None:
    logits, targets = random_logits(20, 9000, 1), torch.arange(20)
    sampler = make_sampler(make_init(prompt_mode="temperature", sampling=TokenSampling(0.7)), vocab_size=9000)
    whole, extras = sampler.score(logits, targets, 0)
    pieces = [sampler.score(logits[a:b], targets[a:b], 0)[0] for a, b in ((0, 1), (1, 8), (8, 20))]
    assert extras is None
    assert torch.cat(pieces).numpy().tobytes() == whole.numpy().tobytes()


def test_no_rows_is_no_work() -> None:
    sampled = draw(make_sampler(make_init(), vocab_size=10), torch.zeros(0, 10), [], [])
    assert sampled.token_ids.shape == (0,) and sampled.logprobs.shape == (0,) and sampled.extras == {}
