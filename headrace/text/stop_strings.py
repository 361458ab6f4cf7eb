"""Stop strings in streamed text. Owns the text held back because it may be the beginning of one.

The state of a search is the longest end of the text that begins a stop string. A character is added to it, and
characters are dropped from its front until it begins one again: each is added once and dropped at most once, so a
character costs O(1) steps whatever the text. A step is a binary search among the sorted stop strings, so nothing is
built beforehand and what is kept beside the strings themselves does not grow with their length.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable


class StopSet:
    """The stop strings of a request, ready to be searched for; all its samples share one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(sorted({stop for stop in stops if stop}))
        self.first_characters = frozenset(stop[0] for stop in self._stops)
        self.max_length = max(map(len, self._stops), default=0)

    def advance(self, state: str, character: str) -> str:
        """The longest end of the text that begins a stop string, after `character`."""
        state += character
        while state and not self._is_begun(state):
            state = state[1:]
        return state

    def match_length(self, state: str) -> int:
        """The length of the longest stop string that the text now ends with, 0 if there is none."""
        if not state.endswith(self._stops):
            return 0
        return max(len(stop) for stop in self._stops if state.endswith(stop))

    def _is_begun(self, text: str) -> bool:
        """Strings that begin with `text` follow it immediately in sorted order."""
        index = bisect_left(self._stops, text)
        return index < len(self._stops) and self._stops[index].startswith(text)


class StopStrings:
    """Finds the first stop string to be complete in a stream of text.

    Of strings complete at the same character, the longest counts. The result does not depend on how the text is cut
    into pieces. `keep_match` leaves the matched string in the text (`no_stop_trim`). A string that ends within the
    first `min_end` characters is passed over as if it were none.
    """

    def __init__(self, stops: StopSet | Iterable[str], *, keep_match: bool = False) -> None:
        self._stops = stops if isinstance(stops, StopSet) else StopSet(stops)
        self._keep_match = keep_match
        self._held = ""
        self.min_end = 0
        self.num_characters = 0
        self.matched: str | None = None

    @property
    def num_held(self) -> int:
        return len(self._held)

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Returns the text that may be shown and the stop string now complete, if one is.

        After a match nothing more is shown: what follows the stop string is dropped, and `num_characters` is where the
        stop string ends.
        """
        if self.matched is not None:
            return "", self.matched
        stops, start, state = self._stops, self.num_characters, self._held
        if not state and stops.first_characters.isdisjoint(text):
            self.num_characters = start + len(text)
            return text, None
        for end, character in enumerate(text, 1):
            if not state and character not in stops.first_characters:
                continue
            state = stops.advance(state, character)
            length = stops.match_length(state) if start + end > self.min_end else 0
            if length:
                self.num_characters = start + end
                return self._end(text[:end], length)
        self.num_characters = start + len(text)
        pending = self._held + text
        cut = len(pending) - len(state)
        self._held = state
        return pending[:cut], None

    def finish(self) -> str:
        """No more text comes; returns what was held back."""
        held, self._held = self._held, ""
        return held

    def fork(self) -> StopStrings:
        return copy.copy(self)

    def _end(self, text: str, length: int) -> tuple[str, str]:
        pending = self._held + text
        self.matched = pending[len(pending) - length :]
        self._held = ""
        return (pending if self._keep_match else pending[: len(pending) - length]), self.matched
