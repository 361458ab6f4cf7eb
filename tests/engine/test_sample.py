from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from headrace.engine.sample import Sample, extend_spans, slice_spans
from headrace.types.generation import Generation
from headrace.types.request import Delta, Request, RoutedPart, TokenExtras, pack_ids
from headrace.types.sampling_params import LogprobOptions
from tests.types.packing import pack_floats

NAN = float("nan")


def request(**options: object) -> Request:
    return Request(1, "r", pack_ids([1, 2, 3]), 8, 0, logprobs=LogprobOptions(**options))  # type: ignore[arg-type]


def delta(ids: list[int], version: str = "a", epoch: int = 0, **fields: Any) -> Delta:
    spans, epochs = (((version, len(ids)),), (epoch,)) if ids else ((), ())
    return Delta(1, pack_ids(ids), pack_floats([-float(i) for i in ids]), spans, span_epochs=epochs, **fields)


def fields_from(sample: Sample, start: int) -> dict[str, Any]:
    """What a piece that begins there says of its tokens."""
    spans, epochs = sample.spans_from(start)
    ids, logprobs = sample.token_ids[start:].tolist(), sample.logprobs[start:].tolist()
    of_tokens = {"token_ids": ids, "logprobs": logprobs, "version_spans": spans, "version_epochs": epochs}
    return {**of_tokens, **sample.more_from(start)}


def test_deltas_add_up_and_spans_merge() -> None:
    sample = Sample(request())
    assert [sample.append(d) for d in (delta([5, 6]), delta([7]), delta([8, 9], "b"))] == [2, 1, 2]
    assert sample.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert sample.logprobs.tolist() == [-5.0, -6.0, -7.0, -8.0, -9.0]
    assert sample.spans == (("a", 3, 0), ("b", 2, 0))


def test_a_label_given_twice_makes_two_spans_wherever_a_piece_or_a_truncation_cuts() -> None:
    sample = Sample(request())
    for each in (delta([1, 2]), delta([3], epoch=1), delta([4, 5], epoch=1), delta([6], "b", 1), delta([7], "a", 1)):
        sample.append(each)
    whole = fields_from(sample, 0)
    assert whole["version_spans"] == [("a", 2), ("a", 3), ("b", 1), ("a", 1)]
    assert whole["version_epochs"] == [0, 1, 1, 1]
    piece = fields_from(sample, 1)
    assert (piece["version_spans"], piece["version_epochs"]) == ([("a", 1), ("a", 3), ("b", 1), ("a", 1)], [0, 1, 1, 1])
    sample.truncate(4)
    cut = fields_from(sample, 0)
    assert (cut["version_spans"], cut["version_epochs"]) == ([("a", 2), ("a", 2)], [0, 1])


def test_spans_name_the_weights_of_each_token_however_deltas_pieces_and_truncations_cut_them() -> None:
    """Against one (version, epoch) kept for each token; labels come back, under the same epoch and under others."""
    words = random.Random(0)
    for _ in range(300):
        sample, labels, epoch = Sample(request()), list[tuple[str, int]](), 0
        for _ in range(words.randrange(1, 8)):
            epoch += words.randrange(2)
            spans = [(words.choice("ab"), words.randrange(3)) for _ in range(words.randrange(3))]
            ids = pack_ids([7] * sum(count for _, count in spans))
            logprobs = pack_floats([0.0] * (len(ids) // 4))
            sample.append(Delta(1, ids, logprobs, tuple(spans), span_epochs=(epoch,) * len(spans)))
            labels += [(version, epoch) for version, count in spans for _ in range(count)]
            start = words.randrange(len(labels) + 1)
            assert sample.spans_from(start) == runs_of(labels[start:])
        num_kept = words.randrange(len(labels) + 1)
        sample.truncate(num_kept)
        assert sample.spans_from(0) == runs_of(labels[:num_kept]) and len(sample.token_ids) == num_kept


def runs_of(labels: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[int]]:
    runs = [(version, epoch, len(list(group))) for (version, epoch), group in itertools.groupby(labels)]
    return [(version, count) for version, _, count in runs], [epoch for _, epoch, _ in runs]


def test_prompt_spans_come_with_the_prompts_scores_or_alone() -> None:
    sample = Sample(request())
    assert sample.prompt_fields() == {}
    sample.append(delta([], prompt_spans=(("a", 3),)))
    assert sample.prompt_fields() == {"prompt_version_spans": [("a", 3)]}
    sample = Sample(request(prompt_start=1))
    sample.append(delta([5], prompt_logprobs=pack_floats([-1.0, -2.0]), prompt_spans=(("a", 1), ("b", 2))))
    expected = {"prompt_logprobs": [None, -1.0, -2.0], "prompt_version_spans": [("a", 1), ("b", 2)]}
    assert sample.prompt_fields() == expected


def test_truncation_cuts_everything_alike() -> None:
    sample = Sample(request(num_top=1, max_kept=9))
    ones = pack_floats([-1.0, -1.0])
    first, second = ([2, 0], [5, 9]), ([3, 1], [6, 7, 8, 4])  # how many each token could have been, and which
    sample.append(delta([5, 6], extras=TokenExtras(pack_ids([0, 1]), ones, b"", *map(pack_ids, first))))
    sample.append(delta([7, 8], "b", extras=TokenExtras(pack_ids([2, 3]), ones, b"", *map(pack_ids, second))))
    whole = [[5, 9], [], [6, 7, 8], [4]]
    assert [fields_from(sample, cut)["kept_token_ids"] for cut in range(5)] == [whole[cut:] for cut in range(5)]
    assert sample.num_extra_values == 4 + 6
    sample.truncate(3)
    assert fields_from(sample, 1)["kept_token_ids"] == whole[1:3]
    fields = fields_from(sample, 0)
    assert fields["token_ids"] == [5, 6, 7] and fields["logprobs"] == [-5.0, -6.0, -7.0]
    assert fields["version_spans"] == [("a", 2), ("b", 1)]
    assert fields["top_logprobs"] == [{0: -1.0}, {1: -1.0}, {2: -1.0}]


def extras_of(token: int) -> TokenExtras:
    """Two most probable ids, two asked for, and as many kept ids as the token is."""
    values = (-float(token), -token - 0.5)
    kept = range(token, 2 * token)
    return TokenExtras(
        pack_ids([token, 99]), pack_floats(values), pack_floats(values[::-1]), pack_ids([token]), pack_ids(kept)
    )


def test_pieces_have_what_was_asked_of_their_own_tokens() -> None:
    sample = Sample(request(num_top=2, token_ids=(4, 7), max_kept=99, prompt_start=0))
    of_prompt = TokenExtras(pack_ids([1, 2, 1, 2]), pack_floats([-1.0] * 4), pack_floats([-1.0] * 4))
    scores = pack_floats([NAN, -1.5])
    sample.append(delta([], prompt_logprobs=scores, prompt_extras=of_prompt, prompt_spans=(("a", 2),)))
    for token in (3, 1, 2, 5):
        sample.append(delta([token], extras=extras_of(token)))
    for num_left in (4, 2):
        sample.truncate(num_left)
        tokens = [3, 1, 2, 5][:num_left]
        assert sample.num_extra_values == 10 + 4 * num_left + sum(tokens)
        for start in range(num_left + 1):
            fields = sample.more_from(start)
            assert fields["top_logprobs"] == [{t: -t, 99: -t - 0.5} for t in tokens[start:]]
            assert fields["token_ids_logprobs"] == [{4: -t - 0.5, 7: -t} for t in tokens[start:]]
            assert fields["kept_token_ids"] == [list(range(t, 2 * t)) for t in tokens[start:]]
            assert ("prompt_logprobs" in fields) == ("prompt_version_spans" in fields) == (start == 0)


def test_what_a_delta_does_not_say_stays() -> None:
    sample = Sample(request())
    sample.append(delta([1], num_cached_tokens=7, num_preemptions=1, prompt_spans=(("a", 3),), times=(1.0, 2.0, 3.0)))
    sample.append(delta([2], num_cached_tokens=4, num_preemptions=2))
    sample.append(delta([3]))
    assert (sample.num_cached_tokens, sample.num_preemptions, sample.times) == (7, 2, (1.0, 2.0, 3.0))
    assert sample.prompt_fields() == {"prompt_version_spans": [("a", 3)]}
    sample.append(delta([4], prompt_spans=(("a", 1), ("b", 2))))
    assert sample.prompt_fields() == {"prompt_version_spans": [("a", 1), ("b", 2)]}


def test_spans_of_pieces_add_up_by_label_and_epoch() -> None:
    def piece(*spans: tuple[str, int], epochs: list[int]) -> Generation:
        return Generation(request_id="r", token_ids=[], logprobs=[], version_spans=list(spans), version_epochs=epochs)

    spans, epochs = list[tuple[str, int]](), list[int]()
    first = piece(("a", 2), ("b", 1), epochs=[0, 1])
    for each in (first, piece(("b", 2), epochs=[1]), piece(epochs=[]), piece(("b", 1), ("c", 1), epochs=[2, 2])):
        extend_spans(spans, epochs, each)
    assert (spans, epochs) == ([("a", 2), ("b", 3), ("b", 1), ("c", 1)], [0, 1, 2, 2])
    assert first.version_spans == [("a", 2), ("b", 1)], "what a caller was given is his"


def test_pieces_join_to_the_whole() -> None:
    sample = Sample(request())
    sample.append(delta([1, 2, 3]))
    sample.append(delta([4, 5], "b"))
    for cut in range(6):
        late = fields_from(sample, cut)
        assert late["token_ids"] == [1, 2, 3, 4, 5][cut:]
        assert sum(count for _, count in late["version_spans"]) == len(late["logprobs"]) == 5 - cut


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, 5, [("a", 2), ("b", 3)]), (1, 3, [("a", 1), ("b", 1)]), (2, 5, [("b", 3)]), (0, 0, []), (5, 5, [])],
)
def test_slices_of_spans(start: int, stop: int, expected: list[tuple[str, int]]) -> None:
    assert slice_spans([("a", 2, 0), ("b", 3, 0)], start, stop) == tuple((*span, 0) for span in expected)


def test_prompt_scores_have_one_entry_per_prompt_token() -> None:
    sample = Sample(request(prompt_start=0, num_top=1, token_ids=(4,)))
    extras = TokenExtras(pack_ids([0, 9, 9]), pack_floats([0, -1, -1]), pack_floats([0, -2, -2]))
    sample.append(delta([], prompt_logprobs=pack_floats([NAN, -1.5, -2.5]), prompt_extras=extras))
    fields = sample.prompt_fields()
    assert fields["prompt_logprobs"] == [None, -1.5, -2.5]
    assert fields["prompt_top_logprobs"] == [None, {9: -1.0}, {9: -1.0}]
    assert fields["prompt_token_ids_logprobs"] == [None, {4: -2.0}, {4: -2.0}]


def test_prompt_scores_from_a_later_position_are_padded() -> None:
    sample = Sample(request(prompt_start=2, num_top=1, token_ids=(4,)))
    extras = TokenExtras(pack_ids([9]), pack_floats([-1.0]), pack_floats([-2.0]))
    sample.append(delta([], prompt_logprobs=pack_floats([-2.5]), prompt_extras=extras))
    assert sample.prompt_fields() == {
        "prompt_logprobs": [None, None, -2.5],
        "prompt_top_logprobs": [None, None, {9: -1.0}],
        "prompt_token_ids_logprobs": [None, None, {4: -2.0}],
    }
    assert sample.num_extra_values == 3


def test_nothing_asked_nothing_given() -> None:
    sample = Sample(request())
    sample.append(delta([1]))
    assert sample.prompt_fields() == {}
    assert not {"top_logprobs", "token_ids_logprobs"} & fields_from(sample, 0).keys()


def test_experts_count_as_values_and_none_of_them_are_an_answer() -> None:
    """What is large is written beside the loop, and held by nobody who looks back."""
    sample = Sample(request(routed_start=3))
    assert sample.routed_experts() is None and sample.num_extra_values == 0
    sample.append(delta([5], routed=RoutedPart(2, 3)))
    nothing = sample.routed_experts()
    assert nothing is not None and nothing.array().shape == (0, 2, 3)
    for _ in range(2):
        sample.append(delta([6], routed=RoutedPart(2, 3, bytes(range(12)))))
    found = sample.routed_experts()
    assert found is not None and found.experts == bytes(range(12)) * 2 and sample.num_extra_values == 12
    sample.truncate(2)
    found = sample.routed_experts()
    assert found is not None and found.experts == bytes(range(12))
