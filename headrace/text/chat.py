"""OpenAI-style messages and tools, checked and brought into the shape chat templates expect. Knows no template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.config.json_bounds import BODY, JsonCount
from headrace.types.errors import RequestError, RequestTooLargeError
from headrace.types.plain_values import plain_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_MESSAGES = 16384
MAX_TOOLS = 1024
MAX_TEMPLATE_ARGUMENTS = 64
_RESERVED_ARGUMENTS = frozenset(
    (
        *("self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


def normalize_messages(messages: Any, field: str = "messages") -> list[dict[str, Any]]:
    """Checked copies of `messages`, which came in `field`: text parts joined, "developer" read as "system", tool-call
    arguments parsed.

    An empty list of tool calls is as none; an assistant's message may have no content, or a refusal for it.

    Raises `RequestError` naming the message and key at fault, and for arguments that have too many parts altogether.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"{field} must be a non-empty list", field=field)
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{field} must hold at most {MAX_MESSAGES} messages", field=field)
    parts = JsonCount(BODY)
    return [_message(message, f"{field}[{index}]", parts) for index, message in enumerate(messages)]


def normalize_tools(tools: Any) -> list[dict[str, Any]]:
    """Checked `tools`: a list of {"type": "function", "function": {"name", ...}}. Raises `RequestError`."""
    if not isinstance(tools, (list, tuple)) or len(tools) > MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {MAX_TOOLS} tools", field="tools")
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools[{index}]")
    return [dict(tool) for tool in tools]


def check_template_arguments(arguments: Any, field: str = "chat_template_kwargs") -> dict[str, Any]:
    """Extra variables for the template; those that steer rendering itself are refused."""
    if not isinstance(arguments, Mapping) or len(arguments) > MAX_TEMPLATE_ARGUMENTS:
        raise RequestError(f"{field} must be an object of at most {MAX_TEMPLATE_ARGUMENTS} keys", field=field)
    for name in arguments:
        if not isinstance(name, str) or name in _RESERVED_ARGUMENTS or not name.isidentifier():
            raise RequestError(f"{field}.{name} may not be set", field=f"{field}.{name}")
    return dict(arguments)


def _message(message: Any, field: str, parts: JsonCount) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{field} must be an object", field=field)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{field}.role must be one of {', '.join(ROLES)}", field=f"{field}.role")
    checked = {key: value for key, value in message.items() if value is not None}
    checked["role"] = "system" if role == "developer" else plain_text(role)
    if "tool_calls" in checked:
        checked["tool_calls"] = _tool_calls(message["tool_calls"], f"{field}.tool_calls", parts)
        if not checked["tool_calls"]:
            del checked["tool_calls"]
    content, is_own = message.get("content"), role == "assistant"
    if is_own and content is None:
        content = checked.pop("refusal", "")
    checked["content"] = _content(content, is_own, f"{field}.content")
    return checked


def _content(content: Any, is_own: bool, field: str) -> str:
    """`is_own` says that it is the assistant's, which may hold refusals."""
    if isinstance(content, str):
        return str(plain_text(content))
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{field} must be a string or a list of text parts", field=field)
    return "".join(_text_part(part, is_own, f"{field}[{index}]") for index, part in enumerate(content))


def _text_part(part: Any, is_own: bool, field: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" and not (is_own and kind == "refusal"):
        raise RequestError(f"{field} must be a text part; this model reads text only", field=field)
    if not isinstance(part.get(kind), str):
        raise RequestError(f"{field}.{kind} must be a string", field=f"{field}.{kind}")
    return str(plain_text(part[kind]))


def _tool_calls(calls: Any, field: str, parts: JsonCount) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise RequestError(f"{field} must be a list", field=field)
    return [_tool_call(call, f"{field}[{index}]", parts) for index, call in enumerate(calls)]


def _tool_call(call: Any, field: str, parts: JsonCount) -> dict[str, Any]:
    """Templates iterate over arguments, clients send them as a JSON string; `parts` are those of all together."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{field}.function.name must be a string", field=f"{field}.function.name")
    field = f"{field}.function.arguments"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            raw = (arguments.strip() or "null").encode()
            too_much = parts.add(raw)
            if too_much is not None:
                message = f"messages has {too_much} or more in arguments; no request needs so many"
                raise RequestTooLargeError(message, field="messages")
            arguments = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
            raise RequestError(f"{field} is not JSON: {error}", field=field) from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{field} must be an object", field=field)
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _check_tool(tool: Any, field: str) -> None:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(f"{field}.type must be 'function'", field=f"{field}.type")
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{field}.function.name must be a non-empty string", field=f"{field}.function.name")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        field = f"{field}.function.parameters"
        raise RequestError(f"{field} must be a JSON schema object", field=field)


def tool_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(plain_text(tool["function"]["name"]) for tool in tools)
