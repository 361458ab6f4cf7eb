"""The device sampler against the CPU's, its oracle: tokens, log-probabilities, extras, prompt scores, re-entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.sampling.device_sampler import DeviceSampler
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobMode
from tests.sampling.device_pair import DEVICE, MODES, VOCAB, Pair, make_init, normal
from tests.sampling.masks import allow


def test_plain_and_truncated_rows_are_launches_only() -> None:
    pair = Pair(VOCAB, 8)
    truncated = [TokenSampling(0.8, top_k=5), TokenSampling(1.2, top_p=0.7), TokenSampling(min_p=0.2)]
    plain = [TokenSampling(), TokenSampling(0.0), TokenSampling(0.6), TokenSampling(0.0, top_k=3), TokenSampling(1.5)]
    modes = (*MODES, *MODES, "raw", "sampled")
    pair.enter(*(make_init(slot, sampling, mode=modes[slot]) for slot, sampling in enumerate(plain + truncated)))
    pair.step(normal(5, 4), [4, 0, 1, 3, 2], [4] * 5)
    pair.step(normal(8, 40), [7, 0, 6, 1, 5, 2, 3, 4], list(range(4, 12)))
    pair.step(normal(1, 5), [2], [5])
    assert pair.paths == ["plain", "full", "plain"]


@pytest.mark.parametrize("mode", MODES)
def test_bias_mask_and_penalties_in_every_mode(mode: LogprobMode) -> None:
    logits = normal(6, 2)
    best = logits.argmax(axis=1)
    bias = ((int(best[0]), -9.0), (17, 12.0), (VOCAB - 1, 8.0), (VOCAB, 50.0))
    samplings = [
        TokenSampling(logit_bias=bias),
        TokenSampling(0.7, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3),
        TokenSampling(0.0, repetition_penalty=0.6),
        TokenSampling(1.3, 40, 0.9, 0.01, 1.2, -0.5, 0.25, tuple((token, 0.01 * token) for token in range(600))),
        TokenSampling(0.0),
        TokenSampling(1.1, 30),
    ]
    pair = Pair(VOCAB, 6)
    pair.enter(
        *(
            make_init(
                slot, sampling, mode=mode, output=(9, 9, int(best[slot])), num_top=6, asked=(17, 9),
                stop_ids=(int(best[slot]), 17, VOCAB + 3), min_length=9 if slot != 2 else 0,
            )
            for slot, sampling in enumerate(samplings)
        )
    )  # fmt: skip
    masked, unmasked = (pair.step(logits, [0, 1, 2, 3, 4, 5], [position] * 6)[4] for position in (8, 9))
    assert masked != best[4] and unmasked == best[4]
    assert pair.paths == ["eager"] * 2


def test_penalties_follow_the_tokens_that_are_sampled_without_the_host() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, [70, 80, 90]] = 6.0, 5.0, 4.5
    pair = Pair(VOCAB, 3)
    pair.enter(
        make_init(0, TokenSampling(0.0, frequency_penalty=1.0)),
        make_init(2, TokenSampling(0.0, repetition_penalty=1.3)),
    )
    taken = [pair.step(logits, [2, 0], [position] * 2).tolist() for position in range(4, 9)]
    assert taken == [[70, 70], [80, 70], [70, 80], [70, 90], [70, 70]]
    # Preempted after five tokens and back in another slot; the old slot goes to a sequence that has no penalties.
    output = tuple(token for _, token in taken)
    pair.enter(make_init(1, TokenSampling(0.0, frequency_penalty=1.0), output=output), make_init(0))
    assert pair.step(logits[:1], [1], [9]).tolist() == [80]
    pair.step(normal(2, 4), [0, 1], [4, 10])
    pair.step(normal(1, 5), [0], [5])
    assert pair.paths == ["full"] * 7 + ["plain"]


def test_extras_alone_change_nothing_about_sampling() -> None:
    pair = Pair(VOCAB, 5)
    pair.enter(
        make_init(0, num_top=5),
        make_init(1, TokenSampling(0.0), mode="sampled", num_top=3, asked=(7, VOCAB, 1 << 30)),
        make_init(2, TokenSampling(0.5, top_k=4), mode="sampled", num_top=9, asked=(0,)),
        make_init(3, TokenSampling(0.0), mode="raw", asked=tuple(range(300))),
        make_init(4, TokenSampling(2.0), mode="raw"),
    )
    logits = normal(5, 8)
    logits[:, 4100:4104] = logits[:, 30:34] = logits.max(axis=1)[:, None]  # equal ones in both blocks
    pair.step(logits, [3, 1, 4, 0, 2], [6, 7, 8, 9, 10])
    pair.step(np.round(normal(5, 9)), [0, 1, 2, 3, 4], [4] * 5)
    pair.step(normal(1, 10), [0], [5])


def test_the_tokens_that_could_have_been_drawn() -> None:
    """Of rows that are truncated, processed, greedy or none of it; of equal ones at the threshold; behind a mask."""
    samplings = [
        TokenSampling(0.7, top_p=0.8), TokenSampling(1.5, top_k=33), TokenSampling(0.9, min_p=0.02), TokenSampling(0.0),
        TokenSampling(1.2, 50, 0.9, repetition_penalty=1.3, logit_bias=((8, 30.0), (4199, 29.0))), TokenSampling(),
        TokenSampling(0.0, top_k=5, presence_penalty=0.5),
    ]  # fmt: skip
    pair = Pair(VOCAB, 8)
    pair.enter(
        *(
            make_init(slot, each, mode=MODES[slot % 3], num_top=slot % 2, max_kept=9, stop_ids=(5, 6), min_length=9)
            for slot, each in enumerate(samplings)
        ),
        make_init(7, TokenSampling(1.1, top_k=4)),
    )
    logits = np.round(normal(8, 12))
    logits[5, 31:VOCAB] = -np.inf
    pair.step(logits, [3, 1, 0, 6, 2, 5, 4, 7], [8] * 8)
    pair.step(normal(8, 13), list(range(8)), [9] * 8)
    patch = allow([0, 2], [np.arange(0, VOCAB, 7), np.arange(2, VOCAB, 31)], VOCAB)
    pair.step(normal(8, 14), list(range(8)), [10] * 8, patch=patch)
    pair.step(normal(1, 15), [3], [11])


def test_more_top_ids_than_tokens_and_rows_with_few_left() -> None:
    pair = Pair(97, 3)
    pair.enter(
        make_init(0, num_top=1000),
        make_init(1, TokenSampling(0.0), mode="sampled", num_top=200),
        make_init(2, TokenSampling(top_k=2, logit_bias=((5, 1.0),)), mode="sampled", num_top=6),
    )
    logits = normal(3, 1, 97)
    logits[0, 20:] = -np.inf
    logits[0, :4] = [0.0, -0.0, 0.0, -0.0]
    pair.step(logits, [0, 1, 2], [4, 5, 6])


def test_processed_rows_beside_others_with_everything_asked_of_each() -> None:
    pair = Pair(VOCAB, 7)
    samplings = [TokenSampling(0.9, repetition_penalty=1.5), TokenSampling(logit_bias=((8, 9.0),)), TokenSampling(0.4)]
    pair.enter(
        *(
            make_init(
                slot,
                samplings[slot % 3],
                mode=MODES[slot % 2],
                prompt_mode="sampled",
                num_top=slot,
                asked=(8,),
                max_kept=9,
            )
            for slot in range(7)
        )
    )
    pair.step(normal(7, 4), [6, 5, 4, 3, 2, 1, 0], [4] * 7)
    pair.score(normal(5, 3), np.array([8, 0, 1, 2, 4100]), 1)


@pytest.mark.parametrize("mode", ["raw", "sampled"])
def test_a_mask_that_comes_late_acts_before_every_processor(mode: LogprobMode) -> None:
    """On plain rows, in slots that a reshaped sequence has left, too; and on these alone."""
    bias = TokenSampling(logit_bias=((17, 12.0), (18, 30.0)))
    penalised = TokenSampling(0.7, 4, repetition_penalty=1.4, presence_penalty=0.5)
    pair = Pair(VOCAB, 6)
    pair.enter(*(make_init(slot, bias) for slot in range(5)))
    pair.step(normal(5, 1), [0, 1, 2, 3, 4], [4] * 5)
    samplings = [TokenSampling(0.0), TokenSampling(), bias, penalised, TokenSampling()]
    pair.enter(*(make_init(slot, each, mode=mode, num_top=3, asked=(17,)) for slot, each in enumerate(samplings)))
    ids = [np.arange(5 + row, VOCAB, 37 + row) for row in range(4)]
    logits = normal(5, 2)
    patch = allow([3, 0, 2, 1], [ids[3], ids[0], ids[2], ids[1]], VOCAB)
    tokens = pair.step(logits, [0, 1, 2, 3, 4], [5] * 5, patch=patch)
    assert all(tokens[row] in ids[row] for row in range(4))
    assert tokens[0] == ids[0][logits[0, ids[0]].argmax()]
    assert pair.step(logits[4:], [4], [5]).tolist() == [tokens[4]]


@pytest.mark.parametrize("prompt_mode", MODES)
def test_prompt_scores(prompt_mode: LogprobMode) -> None:
    bias = ((5, 4.0), (4150, -2.0))
    pair = Pair(VOCAB, 4, max_rows=4)
    pair.enter(
        make_init(0, TokenSampling(0.7, 30, 0.9, 0.0, 1.3, 0.2, 0.2, bias), prompt_mode=prompt_mode),
        make_init(1, TokenSampling(0.0, logit_bias=bias), prompt_mode=prompt_mode, num_top=2, asked=(5,)),
        make_init(2, TokenSampling(1.4, top_p=0.6), prompt_mode=prompt_mode, num_top=40),
        make_init(3, TokenSampling(1.4), prompt_mode=prompt_mode, stop_ids=(1,), min_length=99, asked=(5, 6, VOCAB)),
    )
    logits = normal(5, 21)
    targets = np.array([0, 5, int(logits[2].argmax()), 4150, 4199])
    for slot in range(4):
        pair.score(logits, targets, slot)
    pair.score(logits[:1], targets[:1].astype(np.int32), 0)


def test_random_mixes_over_steps_with_reentry() -> None:
    """Any mixture of parameters, rows in any order, sequences that end, are preempted and come back elsewhere."""
    generator = np.random.default_rng(5)
    num_slots, vocab_size = 6, 500
    pair = Pair(vocab_size, num_slots)

    def random_init(slot: int, length: int) -> SlotInit:
        def one_of(*values: float) -> float:
            return float(generator.choice(values))

        tokens = tuple(generator.integers(0, vocab_size, length).tolist())
        num_prompt = int(generator.integers(1, length + 1))
        biased = generator.choice(vocab_size + 20, int(one_of(0, 0, 3, 60)), replace=False).tolist()
        sampling = TokenSampling(
            one_of(0.0, 0.4, 1.0, 1.0, 2.0), int(one_of(0, 0, 1, 20)), one_of(1.0, 1.0, 0.8), one_of(0.0, 0.0, 0.05),
            one_of(1.0, 1.0, 1.3, 0.8), one_of(0.0, 0.0, 0.6), one_of(0.0, 0.0, -0.4),
            tuple((token, float(generator.normal())) for token in biased),
        )  # fmt: skip
        return make_init(
            slot, sampling, seed=int(generator.integers(0, 1 << 63)), prompt=tokens[:num_prompt],
            output=tokens[num_prompt:], mode=MODES[generator.integers(3)], num_top=int(one_of(0, 0, 3, 12)),
            asked=tuple(generator.integers(0, vocab_size, int(one_of(0, 0, 2))).tolist()),
            stop_ids=tuple(generator.integers(0, vocab_size, int(one_of(0, 2, 30))).tolist()),
            min_length=length + int(one_of(0, 0, 3)), max_kept=int(one_of(0, 0, 9)),
        )  # fmt: skip

    lengths = dict.fromkeys(range(num_slots), 0)
    for _ in range(9):
        entering = [slot for slot, length in lengths.items() if length == 0 or generator.random() < 0.15]
        lengths.update({slot: int(generator.integers(2, 40)) for slot in entering})
        pair.enter(*(random_init(slot, lengths[slot]) for slot in entering))
        slots = generator.permutation(num_slots)[: generator.integers(1, num_slots + 1)].tolist()
        logits = (generator.standard_normal((len(slots), vocab_size)) * 3.0).astype(np.float32)
        pair.step(logits, slots, [lengths[slot] for slot in slots], padding=int(generator.integers(0, 3)))
        for slot in slots:
            lengths[slot] += 1
    assert pair.paths.count("eager") > 4


def test_warming_changes_no_state() -> None:
    pair = Pair(VOCAB, 2)
    pair.device.warm()
    pair.enter(make_init(0, TokenSampling(0.0, frequency_penalty=2.0), num_top=5), make_init(1, max_kept=9))
    pair.device.warm()
    for position in range(4, 6):
        pair.step(normal(2, 3), [0, 1], [position] * 2)


def test_a_row_of_nan_gives_a_token_and_harms_no_other() -> None:
    sampler = DeviceSampler(VOCAB, 3, 3, DEVICE)
    inits = [make_init(0, num_top=4), make_init(1, TokenSampling(0.0), num_top=4), make_init(2, num_top=4)]
    sampler.write_slots(torch.from_numpy(np.stack([sampler.enter(init) for init in inits])).to(DEVICE))
    logits = torch.from_numpy(normal(3, 1)).to(DEVICE)
    slots, positions = (torch.arange(3, dtype=torch.int32, device=DEVICE) for _ in range(2))
    results = []
    for poisoned in (False, True):
        if poisoned:
            logits[0, ::2], logits[1, 7] = float("nan"), float("nan")
        tokens, logprobs = torch.full_like(slots, -1), torch.zeros(3, device=DEVICE)
        pending = sampler.sample_eager(logits, slots, positions, tokens, logprobs, np.arange(3), np.arange(3))
        assert pending is not None
        results.append((tokens, logprobs, pending.finish()))
    (tokens, logprobs, extras), (poisoned_tokens, poisoned_logprobs, poisoned_extras) = results
    assert int(poisoned_tokens.min()) >= 0 and int(poisoned_tokens.max()) < VOCAB
    assert poisoned_logprobs[:2].isnan().all()
    assert poisoned_tokens[2] == tokens[2] and poisoned_logprobs[2] == logprobs[2]
    np.testing.assert_array_equal(poisoned_extras[2].top_ids, extras[2].top_ids)
