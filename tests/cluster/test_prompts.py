"""What is read of a body for a policy: the same, whether a prompt is cut out before the rest is decoded or not."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from headrace.cluster.policies import Ask
from headrace.cluster.prefix_index import blocks_of
from headrace.cluster.prompts import read_ask

IDS = list(range(100, 400))
PLAIN = msgspec.json.encode(IDS)


def ask_of(prompt: bytes, num_tokens: int, **more: Any) -> Ask:
    return Ask(num_tokens, **{"num_new_tokens": 256, **more}, blocks=blocks_of(prompt))


@pytest.mark.parametrize("name", ["input_ids", "token_ids", "prompt"])
def test_a_long_list_of_ids_is_the_prompt_wherever_it_stands(name: str) -> None:
    sampling = {"max_new_tokens": 7, "n": 3, "stop_token_ids": [1, 2]}
    wanted = ask_of(PLAIN, len(IDS), num_new_tokens=7, num_samples=3)
    for body in ({name: IDS, "sampling_params": sampling}, {"x": {}, "sampling_params": sampling, name: IDS}):
        assert read_ask(msgspec.json.encode(body)) == wanted
    spaced = json.dumps({name: IDS}).encode()
    assert read_ask(spaced) == ask_of(json.dumps(IDS).encode(), len(IDS))


@pytest.mark.parametrize(
    "prompt",
    [
        f"numbers: {IDS}",
        [IDS, IDS],
        [f"a text and {IDS}"],
        ["words, " * 100],
        [[]],
        "[]",
    ],
    ids=["in a text", "several", "in a list", "a text in a list", "empty", "like one that was cut"],
)
def test_what_only_looks_like_such_a_list_is_read_as_ever(prompt: Any) -> None:
    raw = msgspec.json.encode(prompt)
    found = read_ask(msgspec.json.encode({"sampling_params": {"logit_bias": IDS}, "prompt": prompt}))
    num_tokens = 1 if prompt == [[]] else raw.count(b",") + 1 if prompt == [IDS, IDS] else -(-len(raw) // 4)
    assert (found.blocks, found.num_prompt_tokens) == (blocks_of(raw), num_tokens)
    assert read_ask(msgspec.json.encode({"prompt": prompt})) == found


def test_a_list_that_is_no_prompt_or_not_alone_does_not_stand_for_it() -> None:
    other = msgspec.json.encode({"ids": IDS, "text": "hello"})
    assert read_ask(other) == ask_of(b'"hello"', 2)
    tools = [{"name": "f"}]
    both = msgspec.json.encode({"prompt": IDS, "tools": tools})
    assert read_ask(both).blocks == blocks_of(msgspec.json.encode(tools) + PLAIN)
    twice = b'{"prompt":%b,"prompt":"hello"}' % PLAIN
    assert read_ask(twice) == ask_of(b'"hello"', 2)


@pytest.mark.parametrize("body", [b"{" + PLAIN, b'{"prompt":' + PLAIN, b'{"prompt":' + PLAIN[:-1]])
def test_a_body_that_cannot_be_read_counts_by_its_length(body: bytes) -> None:
    assert read_ask(body, "key") == Ask(len(body) // 4, 256, key="key")
