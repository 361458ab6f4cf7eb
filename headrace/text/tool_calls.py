"""Tool calls in generated text. Owns the two written forms and what of a stream may be shown; runs nothing.

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere, any number (Qwen 2.5, Qwen 3, Hermes)
    llama    the whole answer is {"name": ..., "parameters": {...}}, or several joined by ";", maybe after
             <|python_tag|> (Llama 3.x)

What looks like a call but is malformed, or names a tool that was not offered, is ordinary text: nothing is lost.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ToolCallStyle = Literal["hermes", "llama"]

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_SPACE = " \t\r\n"


class ToolCall(msgspec.Struct, frozen=True):
    """One call; `arguments` is the JSON text of an object, as the model wrote it."""

    name: str
    arguments: str


class _WrittenCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


def tool_call_style(chat_template: str | None) -> ToolCallStyle | None:
    """The form a model was taught, told from its chat template; None when it is neither."""
    if chat_template is None:
        return None
    if _OPEN in chat_template:
        return "hermes"
    if _PYTHON_TAG in chat_template or '"parameters"' in chat_template:
        return "llama"
    return None


def parse_call(text: str, tool_names: frozenset[str]) -> ToolCall | None:
    """The call written as one JSON object, or None if it is not one of an offered tool."""
    try:
        written = msgspec.json.decode(text.encode("utf-8"), type=_WrittenCall)
        raw = bytes(written.arguments) or bytes(written.parameters) or b"{}"
        arguments = msgspec.json.decode(raw)
        if isinstance(arguments, str):
            raw = arguments.encode("utf-8")
            arguments = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return None
    if written.name not in tool_names or not isinstance(arguments, dict):
        return None
    return ToolCall(written.name, raw.decode("utf-8"))


class ToolCallParser:
    """Splits streamed text into what may be shown and complete calls; the cut into pieces makes no difference."""

    def __init__(self, style: ToolCallStyle, tool_names: frozenset[str]) -> None:
        self._form: _Hermes | _Llama = _Hermes(tool_names) if style == "hermes" else _Llama(tool_names)

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; returns the text that may be shown and the calls that became complete."""
        return self._form.push(text)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """No more text comes; returns the rest."""
        return self._form.finish()


class _Hermes:
    """`_held` is what may begin the next tag, outside a call with the white space before it, which calls swallow."""

    def __init__(self, tool_names: frozenset[str]) -> None:
        self._tool_names = tool_names
        self._held = ""
        self._gap = ""
        self._body: list[str] | None = None
        self._has_calls = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        shown: list[str] = []
        calls: list[ToolCall] = []
        rest = self._held + text
        while True:
            before, found, after = rest.partition(_OPEN if self._body is None else _CLOSE)
            if not found:
                break
            rest = after
            if self._body is None:
                self._open(before, shown)
            else:
                self._body.append(before)
                self._close(_CLOSE, shown, calls)
        self._hold(rest, shown)
        return "".join(shown), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """A call without its closing tag still counts if it is whole; generation may end there."""
        shown: list[str] = []
        calls: list[ToolCall] = []
        if self._body is not None:
            self._body.append(self._held)
            self._close("", shown, calls)
        elif self._held.strip(_SPACE) or not self._has_calls:
            shown.append(self._held)
        self._held = ""
        return "".join(shown), calls

    def _open(self, before: str, shown: list[str]) -> None:
        kept = before.rstrip(_SPACE)
        shown.append(kept)
        self._gap = before[len(kept) :]
        self._body = []

    def _close(self, tag: str, shown: list[str], calls: list[ToolCall]) -> None:
        assert self._body is not None
        body = "".join(self._body)
        self._body = None
        call = parse_call(body, self._tool_names)
        if call is None:
            shown.append(self._gap + _OPEN + body + tag)
        else:
            self._has_calls = True
            calls.append(call)

    def _hold(self, rest: str, shown: list[str]) -> None:
        inside = self._body is not None
        cut = len(rest) - _num_of_prefix(rest, _CLOSE if inside else _OPEN)
        if not inside:
            cut = len(rest[:cut].rstrip(_SPACE))
        (self._body if self._body is not None else shown).append(rest[:cut])
        self._held = rest[cut:]


class _Llama:
    """`_held` is all text since the last call, while it may still become one; once plain, text passes through."""

    def __init__(self, tool_names: frozenset[str]) -> None:
        self._tool_names = tool_names
        self._held: list[str] = []
        self._object = _ObjectScanner()
        self._lead: str | None = ""
        self._has_calls = False
        self._is_plain = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        calls: list[ToolCall] = []
        while text and not self._is_plain:
            text = self._find_start(text) if self._lead is not None else self._scan(text, calls)
        return (text if self._is_plain else ""), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        held = (self._lead or "") + "".join(self._held)
        self._lead, self._held = "", []
        is_separator = not held.strip(_SPACE + ";")
        return ("" if self._has_calls and is_separator else held), []

    def _find_start(self, text: str) -> str:
        """Skip what may stand before an object; anything else makes the rest plain."""
        assert self._lead is not None
        seen = self._lead + text
        rest = seen.lstrip(_SPACE + ";" if self._has_calls else _SPACE)
        rest = rest.removeprefix(_PYTHON_TAG).lstrip(_SPACE)
        if rest.startswith("{"):
            self._held = [seen[: len(seen) - len(rest)]]
            self._lead = None
            return rest
        if not rest or _PYTHON_TAG.startswith(rest):
            self._lead = seen
            return ""
        return self._give_up(seen)

    def _scan(self, text: str, calls: list[ToolCall]) -> str:
        end = self._object.scan(text)
        if end is None:
            self._held.append(text)
            return ""
        written = "".join([*self._held[1:], text[:end]])
        call = parse_call(written, self._tool_names)
        if call is None:
            return self._give_up(self._held[0] + written + text[end:])
        calls.append(call)
        self._has_calls = True
        self._held, self._lead = [], ""
        return text[end:]

    def _give_up(self, text: str) -> str:
        self._is_plain = True
        self._lead, self._held = None, []
        return text


class _ObjectScanner:
    """Finds the end of a JSON object in pieces of text, by counting braces outside strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int | None:
        """The offset just behind the object's closing brace, or None if it is not in `text`."""
        for offset, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if not self._depth:
                    return offset + 1
        return None


def _num_of_prefix(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
