"""Tool calls of a chat reply. Owns how those that the text holds are told to whoever asked, in OpenAI's spelling."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.text.tool_calls import ToolCall, ToolCallStyle, new_call_id
from headrace.text.tool_parser import ToolCallParser


class ToolReader(msgspec.Struct, frozen=True):
    """How the replies to one conversation are read. `hidden` are tags that are special tokens which nobody
    wants to see, `thought` the tag of one that the prompt leaves open."""

    style: ToolCallStyle
    tool_names: frozenset[str]
    hidden: frozenset[str]
    thought: str
    is_parallel: bool


class ReplyText:
    """The text of one choice as it grows: what of it is shown, and the calls in it; without a reader all is shown."""

    def __init__(self, reader: ToolReader | None) -> None:
        self._reader = reader
        self._parser = None
        if reader is not None:
            self._parser = ToolCallParser(reader.style, reader.tool_names, hidden=reader.hidden, thought=reader.thought)
        self.num_calls = 0

    def push(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Add text; returns what of it is shown, and the calls now complete in OpenAI's spelling."""
        if self._parser is None:
            return text, []
        shown, calls = self._parser.push(text)
        if is_last:
            rest, more = self._parser.finish()
            shown, calls = shown + rest, calls + more
        return shown, [written for call in calls if (written := self._write(call)) is not None]

    def _write(self, call: ToolCall) -> dict[str, Any] | None:
        """None for a call after the first, where only one was wanted."""
        assert self._reader is not None
        if self.num_calls and not self._reader.is_parallel:
            return None
        self.num_calls += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": new_call_id(self._reader.style), "type": "function", "function": function}
