from __future__ import annotations

import random

import pytest

from headrace.text import StopStrings


def run(stops: list[str], pieces: list[str], keep: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, keep_match=keep)
    shown = []
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown.append(text)
        if matched is not None:
            return "".join(shown), matched
    return "".join([*shown, matcher.finish()]), None


def oracle(stops: list[str], text: str, keep: bool) -> tuple[str, str | None]:
    """The first place where a stop string ends, the longest of those ending there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return (text[:end] if keep else text[: end - len(longest)]), longest
    return text, None


@pytest.mark.parametrize("seed", range(8))
def test_any_cut_gives_what_the_whole_text_gives(seed: int) -> None:
    source = random.Random(seed)
    num_matched = 0
    for _ in range(1_500):
        stops = ["".join(source.choices("ab\n", k=source.randrange(1, 6))) for _ in range(source.randrange(1, 5))]
        text = "".join(source.choices("ab\nc", k=source.randrange(0, 30)))
        keep = source.random() < 0.3
        pieces, rest = [], text
        while rest:
            size = source.randrange(1, 5)
            pieces.append(rest[:size])
            rest = rest[size:]
        expected = oracle(stops, text, keep)
        assert run(stops, pieces, keep) == expected
        num_matched += expected[1] is not None
    assert 200 < num_matched < 1_500


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    matcher = StopStrings(["</answer>", "\n\nUser:"])
    assert matcher.push("x < y") == ("x < y", None)
    assert matcher.push(" </ans") == (" ", None)
    assert matcher.push("werz\n") == ("</answerz", None)
    assert matcher.push("\nUs") == ("", None)
    assert matcher.finish() == "\n\nUs"


def test_after_a_match_nothing_is_shown() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("abcENDdef") == ("abc", "END")
    assert matcher.push("more") == ("", "END")
    assert matcher.finish() == ""


def test_many_long_stop_strings_cost_little() -> None:
    """Nothing is built of an adversarial set; a character is added to the state once and dropped from it once."""
    stops = ["a" * length for length in range(1000, 1024)] + ["b" * 1024 + str(i) for i in range(40)]
    matcher = StopStrings(stops)
    shown, matched = matcher.push("a" * 999 + "c" + "b" * 2000 + "7")
    assert matched == "b" * 1024 + "7"
    assert shown == "a" * 999 + "c" + "b" * 976
