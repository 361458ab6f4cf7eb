"""Two fronts on one core: each loop end has its own link, and both work on one replica."""

from __future__ import annotations

import pytest

from headrace.core.loop import CoreLoop
from headrace.types.handles import front_of, handle_of, own_handles
from headrace.types.messages import Abort, Command, Finished, Submit
from tests.core.harness import Core, ScriptLink, request, tiny_config

OTHER = 5


def test_a_handle_names_its_front_and_counts_its_requests() -> None:
    for front in (0, 1, OTHER, (1 << 15) - 1):
        for count in (1, 2, (1 << 48) - 1):
            handle = handle_of(front, count)
            assert 0 <= handle < 1 << 63, "it travels as an int64"
            assert front_of(handle) == front and handle_of(0, handle) == count
    assert handle_of(0, 7) == 7 and handle_of(3, 7) + 1 == handle_of(3, 8)
    assert own_handles([1, handle_of(2, 1), handle_of(2, 9), -1], 2) == [handle_of(2, 1), handle_of(2, 9)]


class TwoFronts:
    """Front 0 is that of the core; the other's commands come by a link of its own."""

    def __init__(self) -> None:
        self.core = Core()
        self.link = ScriptLink()
        self.loop = CoreLoop(tiny_config(), self.core.executor, self.link, front=OTHER, clock=self.core.clock)
        self.loop.replica = self.core.loop.replica

    def send_as_other(self, *commands: Command) -> None:
        """The other front's commands are applied in the next turn, which is its loop's."""
        self.link.commands += commands
        self.loop.turn(0.0)


@pytest.fixture
def fronts() -> TwoFronts:
    """Both have a request number 1 and a request number 2, and all four run."""
    fronts = TwoFronts()
    fronts.core.submit(request(1, max_new_tokens=50), request(2, max_new_tokens=50))
    theirs = tuple(request(handle_of(OTHER, count), max_new_tokens=50) for count in (1, 2))
    fronts.send_as_other(Submit(theirs))
    fronts.core.turn(3)
    assert fronts.core.loop.replica.scheduler.num_running == 4
    return fronts


def ends(fronts: TwoFronts) -> list[str | None]:
    """How the four requests ended."""
    fronts.core.settle()
    return fronts.core.finish_types(1, 2, handle_of(OTHER, 1), handle_of(OTHER, 2))


def test_equal_counts_of_two_fronts_are_different_requests(fronts: TwoFronts) -> None:
    assert ends(fronts) == ["length"] * 4
    assert fronts.core.tokens(1) == fronts.core.tokens(handle_of(OTHER, 1))


@pytest.mark.parametrize("command", [Abort((1, 2)), Finished((1, 2))])
def test_no_front_ends_the_requests_of_another(fronts: TwoFronts, command: Command) -> None:
    fronts.send_as_other(command)
    assert ends(fronts) == ["length"] * 4


def test_a_front_ends_its_own_requests_only(fronts: TwoFronts) -> None:
    fronts.send_as_other(Abort((1, handle_of(OTHER, 1), 2)))
    fronts.send_as_other(Finished((1, handle_of(OTHER, 2), 2)))
    fronts.core.send(Abort((handle_of(OTHER, 2), 2)))
    assert ends(fronts) == ["length", "abort", "abort", None]
    assert fronts.core.status().num_used_tokens == 0


def test_a_request_under_a_foreign_handle_is_not_taken(fronts: TwoFronts) -> None:
    fronts.send_as_other(Submit((request(1), request(3), request(handle_of(OTHER, 3)))))
    assert fronts.core.finish(3) is None
    assert ends(fronts) == ["length"] * 4
    assert fronts.core.finish_types(3, handle_of(OTHER, 3)) == [None, "length"]
