"""Tool calls as models write them. Owns the written forms and the reading of their JSON; runs nothing.

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere, any number (Qwen 2.5, Qwen 3, Hermes)
    llama    {"name": ..., "parameters": {...}} at the start of the answer, or after <|python_tag|> (Llama 3.x)
    mistral  [TOOL_CALLS] and a list [{"name": ..., "arguments": {...}}], or name[ARGS]{...} (Mistral, Ministral)

Wherever one JSON object may stand, a list of them may too, or several parted by white space, commas or semicolons.
What looks like a call but is malformed, or names a tool that was not offered, is ordinary text: nothing is lost.
"""

from __future__ import annotations

import json
import secrets
import string
import uuid
from typing import Any, Literal

import msgspec

ToolCallStyle = Literal["hermes", "llama", "mistral"]

_MISTRAL_ID_LENGTH = 9  # their templates refuse a history with any other
_FAULTS = (msgspec.DecodeError, RecursionError, UnicodeError, ValueError)


class ToolCall(msgspec.Struct, frozen=True):
    """One call; `arguments` is the JSON text of an object: as the model wrote it, if that is JSON as it stands."""

    name: str
    arguments: str


class CallForm(msgspec.Struct, frozen=True):
    """The tags of a style. `thoughts` maps what opens a thought to what closes it."""

    opening: str
    closing: str = ""
    markers: tuple[str, ...] = ()
    starts_bare: bool = False
    is_named: bool = False
    thoughts: dict[str, str] = msgspec.field(default_factory=lambda: {"<think>": "</think>"})

    @property
    def tags(self) -> tuple[str, ...]:
        every = (self.opening, self.closing, *self.markers, *self.thoughts, *self.thoughts.values())
        return tuple(tag for tag in every if tag)

    def thought_at_end(self, prompt: str) -> str:
        """The tag of a thought that a prompt leaves open: the one it ends with, if it does; white space aside."""
        end = prompt.rstrip()
        return next((tag for tag in self.thoughts if end.endswith(tag)), "")


CALL_FORMS: dict[ToolCallStyle, CallForm] = {
    "hermes": CallForm("<tool_call>", "</tool_call>"),
    "llama": CallForm("<|python_tag|>", starts_bare=True),
    "mistral": CallForm(
        "[TOOL_CALLS]",
        markers=("[CALL_ID]", "[ARGS]"),
        is_named=True,
        thoughts={"<think>": "</think>", "[THINK]": "[/THINK]"},
    ),
}


class _WrittenCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


def tool_call_style(chat_template: str | None) -> ToolCallStyle | None:
    """The form a model was taught, told from its chat template; None when it is none of these."""
    if chat_template is None:
        return None
    for style, form in CALL_FORMS.items():
        if form.opening in chat_template:
            return style
    return "llama" if '"parameters"' in chat_template else None


def new_call_id(style: ToolCallStyle) -> str:
    """A name for a call that the model gave none."""
    if style == "mistral":
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_MISTRAL_ID_LENGTH))
    return f"call_{uuid.uuid4().hex[:24]}"


def read_calls(text: str, tool_names: frozenset[str]) -> list[ToolCall] | None:
    """The calls written as a JSON object or a list of them; None unless all are calls of offered tools."""
    try:
        written = _decode_loosely(text, list[_WrittenCall] if text.startswith("[") else _WrittenCall)
    except _FAULTS:
        return None
    calls = []
    for each in written if isinstance(written, list) else [written]:
        arguments = _first_given(bytes(each.arguments), bytes(each.parameters))
        call = read_named_call(each.name, arguments.decode("utf-8"), tool_names)
        if call is None:
            return None
        calls.append(call)
    return calls or None


def read_named_call(name: str, arguments: str, tool_names: frozenset[str]) -> ToolCall | None:
    """The call of a tool with arguments written as JSON: an object, a string that holds one, or nothing at all."""
    if name not in tool_names:
        return None
    try:
        value, text = _value_and_text(arguments)
        if isinstance(value, str):
            value, text = _value_and_text(value.strip() or "null")
    except _FAULTS:
        return None
    if value is None:
        return ToolCall(name, "{}")
    return ToolCall(name, text) if isinstance(value, dict) else None


def _first_given(*values: bytes) -> bytes:
    return next((value for value in values if value not in (b"", b"null")), b"null")


def _value_and_text(text: str) -> tuple[Any, str]:
    """A JSON value and its text, which is strict JSON even if what was written was not quite."""
    try:
        return msgspec.json.decode(text.encode("utf-8")), text
    except _FAULTS:
        strict = _strict_json(text)
        return msgspec.json.decode(strict), strict.decode("utf-8")


def _decode_loosely(text: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text.encode("utf-8"), type=kind)
    except _FAULTS:
        return msgspec.json.decode(_strict_json(text), type=kind)


def _strict_json(text: str) -> bytes:
    """JSON with its strings' raw line breaks and control characters escaped; raises one of `_FAULTS` for no JSON."""
    value = json.loads(text, strict=False)
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
