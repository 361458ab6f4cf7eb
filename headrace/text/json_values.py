"""Where a JSON value ends in a stream of text. Owns the state of one value; knows nothing of what it means."""

from __future__ import annotations

import re
from typing import Literal

_IN_STRING = re.compile(r'[^"\\]*')
_BETWEEN = re.compile(r"[ \t\r\n:,0-9.+\-truefalsnNIityE]*")  # what numbers and the words of JSON are made of


class ValueScanner:
    """Finds the end of an object or list in pieces of text, by counting brackets outside strings.

    What cannot stand outside a string in JSON ends the search at once, so that a quote that was never closed hides
    little. Every character is looked at once.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str, position: int) -> int | Literal["unfinished", "broken"]:
        """The offset just behind the value, or that it is not in `text` or is none."""
        while position < len(text):
            if self._in_string:
                position = self._scan_string(text, position)
                continue
            between = _BETWEEN.match(text, position)
            position = between.end() if between else position
            character = text[position : position + 1]
            position += 1
            if character == '"':
                self._in_string = True
            elif character in ("{", "["):
                self._depth += 1
            elif character in ("}", "]"):
                self._depth -= 1
                if self._depth <= 0:
                    return position
            elif character:
                return "broken"
        return "unfinished"

    def _scan_string(self, text: str, position: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        inside = _IN_STRING.match(text, position)
        position = inside.end() if inside else position
        character = text[position : position + 1]
        self._is_escaped = character == "\\"
        self._in_string = character != '"'
        return position + 1
