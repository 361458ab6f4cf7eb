"""Conversations: `chat` of `AsyncEngine`, and what the doors of a server share with it.

Owns the way from messages to the ids of a prompt, and from a sample to the message that it is. What a template makes of
messages, and how calls are written in a text, is `headrace.text`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from headrace.engine.fields import Sampling, conversations
from headrace.engine.requests import CallArguments, GenerateItem, GenerateOptions
from headrace.text import (
    CALL_FORMS,
    ReplyText,
    Tokenizer,
    ToolCallStyle,
    ToolReader,
    check_template_arguments,
    encode_bounded,
    normalize_messages,
    normalize_tools,
    run_sized,
    tool_call_style,
    tool_names,
)
from headrace.types.errors import RequestError
from headrace.types.generation import ChatReply, Generation
from headrace.types.http import ChatAsk
from headrace.types.plain_values import as_flag
from headrace.types.request import check_prompt_length, unpack_ids

if TYPE_CHECKING:
    from headrace.engine.async_engine import AsyncEngine

Conversations = Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]]
CALLS_NOT_READ = "tools: calls are not read, the chat template shows no form of them that is known"
_MAX_RENDERINGS = 4
"""At once, of one call: others want theirs too."""
logger = logging.getLogger(__name__)


class ChatTerms(msgspec.Struct, frozen=True):
    """What conversations are put to the template with, checked. `style` is how calls are read back; None: they are
    not."""

    tools: list[dict[str, Any]]
    style: ToolCallStyle | None
    template_arguments: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    parallel_tool_calls: bool = True


class ChatPrompt(msgspec.Struct, frozen=True):
    """A conversation as the model gets it: the template's text, and its ids."""

    text: str
    ids: list[int]


class ExpandedChat(msgspec.Struct, frozen=True):
    """What a call of `chat` asks for: one item per sample, prompt-major, and how calls are read from each."""

    items: list[GenerateItem]
    readers: list[ToolReader | None]

    def replies(self, samples: Sequence[Generation]) -> list[ChatReply]:
        """What the finished samples say."""
        return [_reply(*each) for each in zip(self.items, self.readers, samples, strict=True)]


async def chat(
    self: AsyncEngine,
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
    """Reply to a conversation, or to each of many: lists of messages as OpenAI's API has them. `generate` of what the
    chat template makes of them, by the code of `/v1/chat/completions`; one `ChatReply` per sample, prompt-major.

    `tools` are OpenAI's too; calls in a reply are parsed into its message, of which `parallel_tool_calls=False` keeps
    the first. `chat_template_kwargs` are further variables of the template. `continue_final_message` leaves the last
    message open, and the reply goes on with it; `add_generation_prompt` (None: unless that is so) has the template
    begin an assistant's message. With `return_errors` a conversation that the template refuses fails alone.

    Raises `RequestError` naming the field, as in `messages[0].role` or, of many, `messages[2][0].role`.
    """
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
    expanded = await expand_chat(self, ask)
    streams = await self.submit_all(expanded.items)
    return expanded.replies(await self.finish_all(streams, progress=options.get("progress", True)))


async def expand_chat(engine: AsyncEngine, ask: ChatAsk) -> ExpandedChat:
    """The items of a call, checked. To be called on the engine's loop. Raises `RequestError` naming the field."""
    tokenizer, options = tokenizer_of(engine), dict(ask.options)
    terms = read_terms(tokenizer, ask)
    if terms.tools and terms.style is None:
        logger.warning(CALLS_NOT_READ)
    is_added = as_flag(options.pop("add_special_tokens", False), "add_special_tokens")
    returns_errors, refusals = as_flag(options.get("return_errors", False), "return_errors"), dict[int, RequestError]()
    given = conversations(ask.messages)
    fields = ["messages"] if len(given) == 1 else [f"messages[{i}]" for i in range(len(given))]
    permits = asyncio.Semaphore(_MAX_RENDERINGS)

    async def prompt(position: int) -> ChatPrompt:
        async with permits:
            try:
                checked = normalize_messages(given[position], fields[position])
                text = await render(tokenizer, checked, terms)
                ids = await _encode(engine, tokenizer, text, fields[position], is_added)
                return ChatPrompt(text, ids)
            except RequestError as error:
                if not returns_errors:
                    raise
                refusals[position] = error
                return ChatPrompt("", [])

    prompts = await asyncio.gather(*map(prompt, range(len(given))))
    arguments: Any = None, [each.ids for each in prompts], ask.sampling_params, options
    items = await engine.expand(CallArguments(*arguments))
    found = [_with_reader(tokenizer, terms, prompts[item.prompt_index], item, refusals) for item in items]
    return ExpandedChat([item for item, _ in found], [reader for _, reader in found])


def tokenizer_of(engine: AsyncEngine, field: str = "messages") -> Tokenizer:
    """The engine's tokenizer. Raises `RequestError` when it was started without one."""
    if engine.tokenizer is None:
        raise RequestError(f"{field} needs a tokenizer, and this engine has none; send token ids", field=field)
    return engine.tokenizer


def read_terms(tokenizer: Tokenizer, ask: ChatAsk) -> ChatTerms:
    """The checked terms of an ask. Raises `RequestError` naming the field."""
    tools = normalize_tools(ask.tools) if ask.tools else []
    arguments = check_template_arguments(ask.chat_template_kwargs) if ask.chat_template_kwargs else {}
    continues = as_flag(ask.continue_final_message, "continue_final_message")
    begins = not continues
    if ask.add_generation_prompt is not None:
        begins = as_flag(ask.add_generation_prompt, "add_generation_prompt")
    if begins and continues:
        message = "continue_final_message leaves the last message open: add_generation_prompt cannot begin another"
        raise RequestError(message, field="continue_final_message")
    style = tool_call_style(tokenizer.chat_template) if tools else None
    is_parallel = as_flag(ask.parallel_tool_calls, "parallel_tool_calls")
    return ChatTerms(tools, style, arguments, begins, continues, is_parallel)


async def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], terms: ChatTerms) -> str:
    """The chat template's text of checked messages. The loop goes on meanwhile, however long the template takes."""
    rendering = tokenizer.submit_chat(
        messages,
        terms.tools,
        terms.add_generation_prompt,
        continue_final_message=terms.continue_final_message,
        **terms.template_arguments,
    )
    return await asyncio.wrap_future(rendering)


def reader_of(tokenizer: Tokenizer, terms: ChatTerms, prompt: str, *, skips_special_tokens: bool) -> ToolReader | None:
    """How calls are read from the replies to a prompt; None: they are not."""
    if terms.style is None:
        return None
    form = CALL_FORMS[terms.style]
    hidden = tokenizer.special_among(form.tags) if skips_special_tokens else frozenset[str]()
    thought = form.thought_at_end(prompt)
    return ToolReader(terms.style, tool_names(terms.tools), hidden, thought, terms.parallel_tool_calls)


def reply_message(reader: ToolReader | None, text: str) -> dict[str, Any]:
    """The assistant's message that a whole text is, in OpenAI's form."""
    shown, calls = ReplyText(reader).push(text, is_last=True)
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not shown else shown}
    return {**message, "tool_calls": calls} if calls else message


def chat_finish(reason: str, *, has_calls: bool) -> str:
    """The finish reason of a reply."""
    return "tool_calls" if reason == "stop" and has_calls else reason


async def _encode(engine: AsyncEngine, tokenizer: Tokenizer, text: str, field: str, is_added: bool) -> list[int]:
    limit = engine.resolved.context_length
    ids = await run_sized(len(text), lambda: encode_bounded(tokenizer, text, limit, field, add_special_tokens=is_added))
    check_prompt_length(len(ids), limit, field)
    return ids


def _with_reader(
    tokenizer: Tokenizer,
    terms: ChatTerms,
    prompt: ChatPrompt,
    item: GenerateItem,
    refusals: Mapping[int, RequestError],
) -> tuple[GenerateItem, ToolReader | None]:
    """`item`, with the tags of calls in its text, and how they are read from it; or why it is refused."""
    refusal = refusals.get(item.prompt_index)
    if refusal is not None:
        return msgspec.structs.replace(item, refusal=refusal.info()), None
    reader = reader_of(tokenizer, terms, prompt.text, skips_special_tokens=item.params.skip_special_tokens)
    return item if reader is None else msgspec.structs.replace(item, shown_tokens=reader.hidden), reader


def _reply(item: GenerateItem, reader: ToolReader | None, sample: Generation) -> ChatReply:
    message = reply_message(reader, sample.text)
    return ChatReply(
        message=message,
        finish_reason=chat_finish(sample.finish_reason or "", has_calls="tool_calls" in message),
        sample=sample,
        prompt_token_ids=unpack_ids(item.packed or b"").tolist(),
    )
