"""Requests that came together: the longest first, samples of one prompt as neighbours."""

from __future__ import annotations

import random

from headrace.scheduler.batch_order import longest_first
from headrace.types.request import Request, pack_ids


def request(handle: int, prompt: int, max_new_tokens: int, namespace: str = "") -> Request:
    return Request(handle, str(handle), pack_ids([prompt, 1, 2]), max_new_tokens, handle, namespace=namespace)


def handles(requests: list[Request]) -> list[int]:
    return [each.handle for each in requests]


def test_longer_requests_come_first_and_equal_ones_keep_their_order() -> None:
    lengths = [5, 900, 5, 40, 900]
    found = longest_first([request(handle, handle, length) for handle, length in enumerate(lengths)])
    assert handles(found) == [1, 4, 3, 0, 2]


def test_samples_of_one_prompt_stay_together_at_the_place_of_their_longest() -> None:
    batch = [request(0, 7, 10), request(1, 7, 800), request(2, 8, 500), request(3, 8, 20), request(4, 9, 600)]
    assert handles(longest_first(batch)) == [0, 1, 4, 2, 3]


def test_the_same_tokens_in_another_namespace_are_another_prompt() -> None:
    batch = [request(0, 7, 10, "a"), request(1, 7, 800, "b"), request(2, 8, 500)]
    assert handles(longest_first(batch)) == [1, 2, 0]


def test_a_batch_with_one_bound_is_left_as_it_is() -> None:
    batch = [request(handle, handle % 3, 128) for handle in range(20)]
    assert longest_first(batch) == batch


def test_nothing_is_lost() -> None:
    choose = random.Random(0)
    for _ in range(200):
        batch = [request(n, choose.randrange(5), choose.choice((1, 8, 300))) for n in range(choose.randrange(30))]
        assert sorted(handles(longest_first(batch))) == list(range(len(batch)))
