"""Stop strings in streamed text. Owns the text held back because it may be the beginning of one.

The matcher is the automaton of Aho and Corasick (1975): its state is the longest suffix of the text that begins a stop
string, so each character costs O(1) whatever the number of strings, and the state's length is what must be held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class StopStrings:
    """Finds the first stop string to be complete in a stream of text.

    Of strings complete at the same character, the longest counts. The result does not depend on how the text is cut
    into pieces. `keep_match` leaves the matched string in the text (`no_stop_trim`).
    """

    def __init__(self, stops: Iterable[str], *, keep_match: bool = False) -> None:
        self._automaton = _Automaton([stop for stop in stops if stop])
        self._keep_match = keep_match
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Returns the text that may be shown and the stop string now complete, if one is.

        After a match nothing more is shown: what follows the stop string is dropped.
        """
        if self.matched is not None:
            return "", self.matched
        automaton = self._automaton
        if not self._state and automaton.first_characters.isdisjoint(text):
            return text, None
        state = self._state
        for position, character in enumerate(text):
            state = automaton.step(state, character)
            length = automaton.match_lengths[state]
            if length:
                return self._end(text[: position + 1], length)
        self._state = state
        pending = self._held + text
        cut = len(pending) - automaton.depths[state]
        self._held = pending[cut:]
        return pending[:cut], None

    def finish(self) -> str:
        """No more text comes; returns what was held back."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _end(self, text: str, length: int) -> tuple[str, str]:
        pending = self._held + text
        self.matched = pending[len(pending) - length :]
        self._held = ""
        return (pending if self._keep_match else pending[: len(pending) - length]), self.matched


class _Automaton:
    """States are numbers, 0 the root; `depths` and `match_lengths` (0: no match) are by state."""

    def __init__(self, words: list[str]) -> None:
        self.first_characters = frozenset(word[0] for word in words)
        self._children: list[dict[str, int]] = [{}]
        self._fallbacks = [0]
        self.depths = [0]
        self.match_lengths = [0]
        for word in words:
            self._add(word)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after `character`."""
        while True:
            child = self._children[state].get(character)
            if child is not None:
                return child
            if not state:
                return 0
            state = self._fallbacks[state]

    def _add(self, word: str) -> None:
        state = 0
        for character in word:
            child = self._children[state].get(character)
            if child is None:
                child = len(self._children)
                self._children[state][character] = child
                self._children.append({})
                self._fallbacks.append(0)
                self.depths.append(self.depths[state] + 1)
                self.match_lengths.append(0)
            state = child
        self.match_lengths[state] = len(word)

    def _link(self) -> None:
        """Breadth first: a state's fallback is the state of its longest proper suffix."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._children[state].items():
                fallback = self.step(self._fallbacks[state], character)
                self._fallbacks[child] = fallback
                self.match_lengths[child] = self.match_lengths[child] or self.match_lengths[fallback]
                queue.append(child)
