"""Conversations, as a client asks for them: a method of `AsyncClient`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from headrace.client.answers import read
from headrace.client.asks import chat_body
from headrace.engine.chat import Conversations
from headrace.engine.fields import Sampling
from headrace.engine.requests import GenerateOptions
from headrace.types.generation import ChatReply
from headrace.types.http import PREFIX, ChatAsk

if TYPE_CHECKING:
    from headrace.client.async_client import AsyncClient


async def chat(
    self: AsyncClient,
    messages: Conversations,
    sampling_params: Sampling = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    parallel_tool_calls: bool = True,
    **options: Unpack[GenerateOptions],
) -> list[ChatReply]:
    """See `AsyncEngine.chat`."""
    ask = ChatAsk(
        messages=messages,
        sampling_params=sampling_params,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        parallel_tool_calls=parallel_tool_calls,
        options={**options},
    )
    call = self._calls.to("chat", f"{PREFIX}/chat", chat_body(ask), "application/json")
    return read((await self._transport.send(call)).body, list[ChatReply])
