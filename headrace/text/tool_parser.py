"""Tool calls in streamed text. Owns what of a stream may be shown and what is held back because it may be a call.

The result does not depend on how the text is cut, and the work grows with its length only. A call inside a thought is
not a call: between `<think>` and `</think>`, after a `<think>` that is never closed, and from the start where the
prompt itself ends with `<think>`, everything is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from headrace.text.json_values import ValueScanner
from headrace.text.tool_calls import CALL_FORMS, ToolCall, ToolCallStyle, read_calls, read_named_call

MAX_CALLS = 1024
_MAX_LEAD = 256
_SPACE = " \t\r\n"
_SEPARATORS = _SPACE + ",;"
_BLANK = re.compile(f"[{_SPACE}]*")
_PARTED = re.compile(f"[{_SEPARATORS}]*")
_LEAD = re.compile(r"([\w.\-/:]+)\s*(?:\[CALL_ID\][\w\-\s]*)?(?:\[ARGS\]\s*)?")


class ToolCallParser:
    """Splits streamed text into what may be shown and complete calls.

    White space around calls, and what parts them, is not shown. `hidden` are tags that are special tokens which the
    caller does not want to see: they are read, and never shown. `thought` is the tag of a thought that the prompt left
    open. After `MAX_CALLS` the rest is text. `num_unread` counts the opening tags that were shown because no call
    followed, but for those inside thoughts.
    """

    def __init__(
        self,
        style: ToolCallStyle,
        tool_names: frozenset[str],
        *,
        hidden: frozenset[str] = frozenset(),
        thought: str = "",
    ) -> None:
        self._form = CALL_FORMS[style]
        self._tool_names = tool_names
        self._hidden = hidden
        self._any_tag = re.compile("|".join(map(re.escape, self._form.tags)))
        self._max_tag = max(map(len, self._form.tags))
        self._first_characters = frozenset(tag[0] for tag in self._form.tags)
        self._text = ""  # what is being read, and of it what may begin a tag and waits for more
        self._is_last = False
        self._shown: list[str] = []
        self._calls: list[ToolCall] = []
        self._num_calls = 0
        self.num_unread = 0
        self._held: list[str] = []  # white space, separators and opening tags: a call swallows them, text shows them
        self._is_after_call = False  # nothing but separators since
        self._is_unclosed = False  # the closing tag of a call is still to come
        self._takes_value = self._form.starts_bare
        self._takes_name = False
        self._scanner = ValueScanner()
        self._parts: list[str] = []  # of a value or its lead, from texts before this one
        self._start = 0  # where it begins, or goes on, in this text
        self._lead = ""
        self._name = ""
        self._thought_end = self._form.thoughts.get(thought, "")
        self._step: Callable[[int], int | None] = self._in_thought if self._thought_end else self._in_text

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; returns the text that may be shown and the calls that became complete."""
        self._text += text
        position: int | None = 0
        while position is not None:
            position = self._step(position)
        shown, calls = "".join(self._shown), self._calls
        self._shown, self._calls = [], []
        return shown, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """No more text comes; returns the rest."""
        self._is_last = True
        shown, calls = self.push("")
        if self._is_after_call:
            return shown, calls
        self._show_held()
        return shown + "".join(self._shown), calls

    # Each step reads on from a position in `_text`; it returns the next one, or None once all is read that can be.

    def _in_text(self, position: int) -> int | None:
        if self._takes_value:
            gap = (_PARTED if self._is_after_call else _BLANK).match(self._text, position)
            start = gap.end() if gap else position
            self._hold(self._text[position:start])
            position = start
            if start == len(self._text) or self._is_partial(start):
                return self._wait(start)
            if not self._any_tag.match(self._text, start):
                self._takes_value = False
                if self._text[start] in "{[" or self._takes_name:
                    return self._begin(start)
        tag = self._any_tag.search(self._text, position)
        end = tag.start() if tag else self._end_before_partial(position)
        self._show(self._text[position:end])
        if tag is None:
            return self._wait(end)
        self._read_tag(tag.group())
        return tag.end()

    def _in_thought(self, position: int) -> int | None:
        tag = self._any_tag.search(self._text, position)
        end = tag.start() if tag else self._end_before_partial(position)
        self._shown.append(self._text[position:end])
        if tag is None:
            return self._wait(end)
        self._shown.append(self._visible(tag.group()))
        if tag.group() == self._thought_end:
            self._takes_value = self._form.starts_bare
            self._step = self._in_text
        return tag.end()

    def _in_name(self, position: int) -> int | None:
        """What stands before the arguments of a call that is not all JSON."""
        stop = position + _MAX_LEAD + 1
        brace = self._text.find("{", position, stop)
        lead = "".join(self._parts) + self._text[self._start : brace if brace >= 0 else stop]
        if brace < 0 and len(lead) <= _MAX_LEAD and not self._is_last:
            return self._wait_inside()
        found = _LEAD.fullmatch(lead) if brace >= 0 and len(lead) <= _MAX_LEAD else None
        if found is None or found.group(1) not in self._tool_names:
            return self._give_up()
        self._lead, self._name = lead, found.group(1)
        self._step = self._in_value
        return brace

    def _in_value(self, position: int) -> int | None:
        end = self._scanner.scan(self._text, position)
        if end == "unfinished" and not self._is_last:
            return self._wait_inside()
        calls = None if isinstance(end, str) else self._read_value(end)
        if isinstance(end, str) or calls is None or self._num_calls + len(calls) > MAX_CALLS:
            return self._give_up()
        self._calls += calls
        self._num_calls += len(calls)
        self._held.clear()
        self._is_after_call = True
        self._is_unclosed = bool(self._form.closing)
        self._takes_value = not self._name
        self._step = self._in_text
        return end

    def _begin(self, start: int) -> int:
        self._scanner, self._parts, self._start, self._lead, self._name = ValueScanner(), [], start, "", ""
        self._step = self._in_value if self._text[start] in "{[" else self._in_name
        return start

    def _read_value(self, end: int) -> list[ToolCall] | None:
        written = "".join(self._parts) + self._text[self._start : end]
        if not self._name:
            return read_calls(written, self._tool_names)
        call = read_named_call(self._name, written[len(self._lead) :], self._tool_names)
        return None if call is None else [call]

    def _give_up(self) -> int:
        """What was read as a call is text, in which there may be tags."""
        if self._parts:
            self._text = "".join(self._parts) + self._text[self._start :]
            self._parts, self._start = [], 0
        self._takes_name = False
        self._step = self._in_text
        return self._start

    def _read_tag(self, tag: str) -> None:
        if tag == self._form.closing and self._is_unclosed:
            self._is_unclosed = self._takes_value = False
            return
        self._takes_value = self._takes_name = self._is_after_call = False
        if tag == self._form.opening:
            self._takes_value, self._takes_name = True, self._form.is_named
            self._hold(self._visible(tag))
            return
        self._show_held()
        self._shown.append(self._visible(tag))
        if tag in self._form.thoughts:
            self._thought_end = self._form.thoughts[tag]
            self._step = self._in_thought

    def _show(self, text: str) -> None:
        """Text outside calls; its white space at the end waits, as a call may follow."""
        if not text.strip(_SEPARATORS if self._is_after_call else _SPACE):
            self._hold(text)
            return
        kept = text.rstrip(_SPACE)
        self._show_held()
        self._shown.append(kept)
        self._hold(text[len(kept) :])
        self._is_after_call = False

    def _show_held(self) -> None:
        self.num_unread += self._held.count(self._form.opening)
        self._shown += self._held
        self._held.clear()

    def _hold(self, text: str) -> None:
        if text:
            self._held.append(text)

    def _visible(self, tag: str) -> str:
        return "" if tag in self._hidden else tag

    def _wait(self, end: int) -> int | None:
        self._text = self._text[end:]
        return None

    def _wait_inside(self) -> int | None:
        self._parts.append(self._text[self._start :])
        self._text, self._start = "", 0
        return None

    def _end_before_partial(self, position: int) -> int:
        """Where what may be the beginning of a tag starts; the end of the text if nothing there may."""
        length = len(self._text)
        first = max(position, length - self._max_tag + 1)
        if self._first_characters.isdisjoint(self._text[first:]):
            return length
        return next((start for start in range(first, length) if self._is_partial(start)), length)

    def _is_partial(self, start: int) -> bool:
        """True when all that is there from `start` on begins a tag, and more may come."""
        if self._is_last or len(self._text) - start >= self._max_tag:
            return False
        rest = self._text[start:]
        return any(len(rest) < len(tag) and tag.startswith(rest) for tag in self._form.tags)
