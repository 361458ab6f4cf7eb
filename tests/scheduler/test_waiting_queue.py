"""Who is next: priority, then the second of arrival, then length, prompts together."""

from __future__ import annotations

import random

from headrace.scheduler.sequence import Sequence
from headrace.scheduler.waiting_queue import WINDOW_S, WaitingQueue
from headrace.types.request import Request, pack_ids, unpack_ids
from tests.scheduler.builders import ROOMY


def sequence(
    handle: int, length: int, *, prompt: int | None = None, arrived: float = 0.5, priority: int = 0, extra_key: str = ""
) -> Sequence:
    ids = pack_ids([handle if prompt is None else prompt, 1])
    request = Request(handle, str(handle), ids, length, handle, priority=priority, extra_key=extra_key)
    return Sequence.of(request, unpack_ids(ids), ROOMY, arrived)


def order(*sequences: Sequence) -> list[int]:
    queue = WaitingQueue()
    for each in sequences:
        queue.push(each)
    return drain(queue)


def drain(queue: WaitingQueue) -> list[int]:
    found = []
    while (first := queue.first()) is not None:
        found.append(first.handle)
        queue.remove(first)
    return found


def test_of_one_second_the_longest_come_first_and_equal_ones_as_they_came() -> None:
    lengths = [5, 900, 5, 40, 900]
    assert order(*(sequence(handle, length) for handle, length in enumerate(lengths))) == [1, 4, 3, 0, 2]


def test_an_earlier_second_comes_first_whatever_the_length() -> None:
    late = 0.5 + WINDOW_S
    assert order(sequence(0, 5), sequence(1, 900, arrived=late), sequence(2, 40)) == [2, 0, 1]


def test_priority_beats_both() -> None:
    assert order(sequence(0, 900), sequence(1, 5, priority=1), sequence(2, 900, arrived=9.0, priority=1)) == [1, 2, 0]


def test_requests_of_one_prompt_stay_together_at_the_place_of_the_longest() -> None:
    batch = [
        sequence(0, 300, prompt=7),
        sequence(1, 500, prompt=8),
        sequence(2, 900, prompt=7),
        sequence(3, 1, prompt=8),
    ]
    assert order(*batch) == [2, 0, 1, 3]
    assert order(sequence(0, 300, prompt=7, extra_key="a"), sequence(1, 500, prompt=7, extra_key="b")) == [1, 0]


def test_old_ones_are_found_as_they_came() -> None:
    queue = WaitingQueue()
    for handle, arrived in enumerate((0.1, 0.2, 3.0, 3.1)):
        queue.push(sequence(handle, 10 * handle + 1, arrived=arrived))
    assert [each.handle for each in queue.arrived_before(3.05)] == [0, 1, 2]
    assert queue.arrived_before(0.1) == []


def test_random_arrivals_and_departures_keep_the_order() -> None:
    choose = random.Random(0)
    for _ in range(100):
        queue, waiting, clock = WaitingQueue(), {}, 0.0
        for handle in range(200):
            clock += choose.choice((0.0, 0.0, 0.3))
            each = sequence(handle, choose.choice((1, 50, 900)), arrived=clock, priority=choose.randrange(2))
            waiting[handle] = each
            queue.push(each)
            while waiting and choose.random() < 0.45:
                left = queue.first() if choose.random() < 0.5 else choose.choice(list(waiting.values()))
                assert left is not None
                queue.remove(left)
                del waiting[left.handle]
            assert len(queue) == len(waiting)
        expected = sorted(
            waiting.values(),
            key=lambda s: (-s.request.priority, int(s.arrived // WINDOW_S), -s.request.max_new_tokens, s.handle),
        )
        assert drain(queue) == [each.handle for each in expected]
        assert len(queue) == 0 and queue.first() is None


def test_the_first_band_is_the_line_of_those_that_came_with_the_first() -> None:
    queue = WaitingQueue()
    late = 0.5 + WINDOW_S
    batch = [sequence(0, 5), sequence(1, 900, arrived=late), sequence(2, 40), sequence(3, 7, prompt=2)]
    for each in batch:
        queue.push(each)
    assert [each.handle for each in queue.first_band()] == [2, 3, 0]
    for each in (batch[2], batch[3], batch[0]):
        queue.remove(each)
    assert [each.handle for each in queue.first_band()] == [1]
    queue.remove(batch[1])
    assert not list(queue.first_band())
