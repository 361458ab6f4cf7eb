"""Tool calls through OpenAI's own client: special tags, thoughts, one call at a time, Mistral's form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from headrace import Engine
from tests.server.builders import SETTINGS, save_chain
from tests.server.conftest import Served
from tests.text import builders

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": name}} for name in ("add", "weather")]
ADD, WEATHER = '{"name": "add", "arguments": {"a": 1}}', '{"name": "weather", "arguments": {}}'
MISTRAL_TEMPLATE = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "{% for call in message.tool_calls or [] %}{% if call.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "[TOOL_CALLS]{{ call.function.name }}{% endfor %}{{ message.content }}{% endfor %}{{ '\\n' }}"
)

Ask = Callable[..., tuple[str, list[Any], str, str]]


def chain_of(folder: Path, template: str, special: list[str], *texts: str) -> Path:
    """A model that answers a prompt ending in a new line with `texts`, one token each; `special` ones are hidden."""
    tokenizer: PreTrainedTokenizerFast = builders.byte_level(template)
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in special], special_tokens=True)
    new = [text for text in texts if text not in special]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in new])
    return save_chain(folder, tokenizer, ["\u010a", *texts])


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Callable[..., Ask]]:
    """Start a server on a chain model; what it gives asks it, whole and streamed, which must agree."""
    opened: list[Any] = []

    def start(template: str, special: list[str], *texts: str) -> Ask:
        engine = Engine(chain_of(tmp_path, template, special, *texts), inprocess=True, **SETTINGS)
        served = Served(engine)
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        opened.extend([client.close, served.close, engine.shutdown])

        def answer(**more: Any) -> tuple[str, list[Any], str, str]:
            settings: dict[str, Any] = {"model": "default", "messages": MESSAGES, "temperature": 0, "tools": TOOLS}
            settings |= more
            choice = client.chat.completions.create(**settings).choices[0]
            calls = [
                (each.function.name, json.loads(each.function.arguments)) for each in choice.message.tool_calls or []
            ]
            chunks = list(client.chat.completions.create(**settings, stream=True))
            deltas = [chunk.choices[0].delta for chunk in chunks]
            streamed = [call for delta in deltas for call in delta.tool_calls or []]
            assert [(each.function.name, json.loads(each.function.arguments)) for each in streamed] == calls
            assert [each.index for each in streamed] == list(range(len(calls)))
            content = "".join(delta.content or "" for delta in deltas)
            assert content == (choice.message.content or "")
            assert chunks[-1].choices[0].finish_reason == choice.finish_reason
            ids = [each.id for each in choice.message.tool_calls or []]
            return content, calls, choice.finish_reason, ids[0] if ids else ""

        return answer

    yield start
    for close in opened:
        close()


def test_tags_that_are_special_tokens_are_read_and_not_shown(ask: Callable[..., Ask]) -> None:
    special = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    answer = ask(
        builders.HERMES_TEMPLATE,
        special,
        "<think>",
        "hm",
        "</think>",
        " so ",
        "<tool_call>",
        ADD,
        "</tool_call>",
        " done",
    )
    content, calls, reason, name = answer()
    assert (content, calls, reason) == ("hm so done", [("add", {"a": 1})], "tool_calls")
    assert name.startswith("call_")
    assert answer(tool_choice="none")[:2] == (f"hm so {ADD} done", [])
    shown = answer(extra_body={"skip_special_tokens": False})
    assert shown[:2] == ("<think>hm</think> so done", [("add", {"a": 1})])


def test_a_thought_that_the_template_opens(ask: Callable[..., Ask]) -> None:
    template = builders.HERMES_TEMPLATE.replace("<think>{% endif %}", "<think>{{ '\\n' }}{% endif %}")
    answer = ask(template, [], f"<tool_call>{ADD}</tool_call>", "</think>", f"<tool_call>{WEATHER}</tool_call>")
    thinking = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    content, calls, *_ = answer(**thinking)
    assert (content, calls) == (f"<tool_call>{ADD}</tool_call></think>", [("weather", {})])
    assert answer()[1] == [("add", {"a": 1}), ("weather", {})], "without a thought both are calls"


def test_one_call_at_a_time(ask: Callable[..., Ask]) -> None:
    answer = ask(builders.HERMES_TEMPLATE, [], f"<tool_call>{ADD},", f"{WEATHER}</tool_call>")
    assert answer()[1] == [("add", {"a": 1}), ("weather", {})]
    for one in (answer(parallel_tool_calls=False), answer(parallel_tool_calls=False, logprobs=True)):
        assert one[:3] == ("", [("add", {"a": 1})], "tool_calls")


def test_mistral(ask: Callable[..., Ask]) -> None:
    special = ["[TOOL_CALLS]", "[ARGS]"]
    answer = ask(MISTRAL_TEMPLATE, special, "[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1}')
    content, calls, reason, name = answer()
    assert (content, calls, reason) == ("", [("add", {"a": 1})], "tool_calls")
    call = {"id": name, "type": "function", "function": {"name": "add", "arguments": "{}"}}
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert answer(messages=history)[1] == calls, "the template takes the ids of our calls"
