"""Between the messages of a conversation and its tokens. Owns what is put behind a reply without touching its tokens,
and how calls are read from it. Knows no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.text import (
    CALL_FORMS,
    Tokenizer,
    ToolCall,
    ToolCallParser,
    check_template_arguments,
    new_call_id,
    normalize_messages,
    tool_call_style,
    tool_names,
)
from headrace.types.errors import ConfigError

_SAID = "what-the-assistant-said"
_MAX_CLOSING = 4
_NUM_BEFORE = 32


class ReadReply(msgspec.Struct, frozen=True):
    """A reply's text, without special tokens; the calls in it; and how many calls could not be read."""

    text: str
    calls: list[ToolCall]
    num_unread: int


class TurnText:
    """Messages to tokens and replies to calls, for one model and one set of tools.

    Raises `ConfigError` (field "tools") when there are tools, and the chat template shows no known form of calls.
    """

    def __init__(
        self, tokenizer: Tokenizer, tools: list[dict[str, Any]], template_arguments: Mapping[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._arguments = check_template_arguments(template_arguments, "template_arguments")
        self._names = tool_names(tools)
        self._style = tool_call_style(tokenizer.chat_template) if tools else None
        if tools and self._style is None:
            raise ConfigError("tools: the chat template shows no form of calls that is known", field="tools")

    async def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """`RequestError` for messages that the template refuses."""
        return self._tokenizer.encode(await self._render(messages), add_special_tokens=False)

    async def answer_ids(self, last_id: int, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """What stands between a reply that ended with the token `last_id` and the next one, when `messages` answer it.

        The template writes them behind a reply of a few words, so that no sampled token is decoded and encoded again. A
        special token at the reply's end stands for the one that the template ends replies with.
        """
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
        text = await self._render([*said, *messages])
        _, found, behind = text.partition(_SAID)
        if not found:
            raise ConfigError("the chat template does not show what an assistant said", field="tokenizer")
        ids = self._tokenizer.encode(behind, add_special_tokens=False)
        if self._is_special(last_id):
            closing = [place for place, token_id in enumerate(ids[:_MAX_CLOSING]) if self._is_special(token_id)]
            ids = ids[closing[0] + 1 :] if closing else ids
        return ids

    def tool_message(self, name: str, content: str) -> dict[str, Any]:
        call_id = new_call_id(self._style or "hermes")
        named = {"name": name} if name else {}
        return {"role": "tool", **named, "tool_call_id": call_id, "content": content}

    def read(self, ids: Sequence[int], before: Sequence[int]) -> ReadReply:
        """A reply whose tokens are `ids`, behind those `before` it."""
        text = self._tokenizer.decode(ids)
        if self._style is None:
            return ReadReply(text, [], 0)
        ended = bool(ids) and self._is_special(ids[-1])
        written = self._tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        context = self._tokenizer.decode(before[-_NUM_BEFORE:], skip_special_tokens=False)
        thought = CALL_FORMS[self._style].thought_at_end(context)
        parser = ToolCallParser(self._style, self._names, thought=thought)
        calls = parser.push(written)[1] + parser.finish()[1]
        return ReadReply(text, calls, parser.num_unread)

    def _is_special(self, token_id: int) -> bool:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.special_token_id(text) == token_id

    async def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        checked = normalize_messages(messages)
        return await asyncio.wrap_future(self._tokenizer.submit_chat(checked, self._tools or None, **self._arguments))
