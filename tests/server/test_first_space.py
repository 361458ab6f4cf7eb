"""A sentencepiece-like model's first word keeps its space, on every door and however the text is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import AddedToken

from headrace import AsyncEngine, Engine
from tests.server.builders import SETTINGS, save_chain
from tests.server.conftest import Served
from tests.text import builders

WORDS = ("\u2581Hello", "\u2581world", "\u2581and", "<0xC3>", "<0xA9>", "\u2581all")
TEXT = " world and\u00e9 all"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module", params=["strip", "metaspace"])
def spaced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose model says `TEXT` after the word Hello."""
    tokenizer = builders.byte_fallback()
    if request.param == "metaspace":
        from tokenizers import decoders

        library = tokenizer.backend_tokenizer
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS if word.startswith("\u2581")])
    tokenizer.chat_template = TEMPLATE
    folder = save_chain(tmp_path_factory.mktemp("spaced"), tokenizer, WORDS)
    with Engine(folder, inprocess=True, **SETTINGS) as engine:
        shared = Served(engine)
        yield shared
        shared.close()


def hello(served: Served) -> list[int]:
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    return [tokenizer._library.token_to_id(WORDS[0])]


def test_python_text_and_ids(spaced: Served) -> None:
    for inputs in ({"input_ids": hello(spaced)}, {"prompts": WORDS[0]}):
        (whole,) = spaced.engine.generate(**inputs, sampling_params=GREEDY)
        assert (whole.text, whole.finish_reason) == (TEXT, "stop")
        assert "".join(piece.text for piece in spaced.engine.stream(**inputs, sampling_params=GREEDY)) == TEXT
        (stopped,) = spaced.engine.generate(**inputs, sampling_params={**GREEDY, "stop": " world"})
        assert (stopped.text, stopped.matched, len(stopped.token_ids)) == ("", " world", 1)
        (late,) = spaced.engine.generate(**inputs, sampling_params={**GREEDY, "stop": "d and\u00e9"})
        assert (late.text, late.matched, len(late.token_ids)) == (" worl", "d and\u00e9", 4)


def test_native(spaced: Served) -> None:
    body = {"input_ids": hello(spaced), "sampling_params": GREEDY, "return_logprob": True}
    reply = spaced.generate(**body, return_text_in_logprobs=True)
    assert reply["text"] == TEXT
    assert [entry[2] for entry in reply["meta_info"]["output_token_logprobs"]][:2] == [" world", " and"]
    assert spaced.generate(text=WORDS[0], sampling_params={**GREEDY, "stop": [" world"]})["text"] == ""
    streamed = spaced.http.post("/generate", json={**body, "stream": True}).text
    assert '"text":" world' in streamed


def test_openai(spaced: Served) -> None:
    settings: dict[str, Any] = {"model": "default", "max_tokens": 12, "temperature": 0}
    messages: Any = [{"role": "user", "content": WORDS[0]}]
    with openai.OpenAI(base_url=f"{spaced.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(prompt=hello(spaced), **settings)
        assert whole.choices[0].text == TEXT
        chunks = client.completions.create(prompt=WORDS[0], stream=True, **settings)
        assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
        chat = client.chat.completions.create(messages=messages, **settings)
        assert chat.choices[0].message.content == TEXT
        pieces = client.chat.completions.create(messages=messages, stream=True, **settings)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == TEXT


def test_at_the_start_of_all_text_there_is_no_space(spaced: Served) -> None:
    """A prompt of special tokens shows nothing: the completion begins the text."""
    engine: AsyncEngine = spaced.engine.asynchronous
    assert engine.tokenizer is not None
    (start,) = engine.tokenizer.encode("<s>", add_special_tokens=False)[-1:]
    bias = {hello(spaced)[0]: 1000.0}
    params = {"max_new_tokens": 1, "temperature": 0, "logit_bias": bias}
    (shown,) = asyncio.run(engine.generate(input_ids=[start], sampling_params=params))
    assert shown.text == "Hello"
    (unhidden,) = spaced.engine.generate(input_ids=[start], sampling_params={**params, "skip_special_tokens": False})
    assert unhidden.text == " Hello"


def test_prompts_of_one_call_have_each_their_own_beginning(spaced: Served) -> None:
    """What samples share of their text depends on the prompt, though the parameters are the same."""
    engine = spaced.engine.asynchronous
    assert engine.tokenizer is not None
    (start,) = engine.tokenizer.encode("<s>", add_special_tokens=False)[-1:]
    word = hello(spaced)
    params = {"max_new_tokens": 1, "temperature": 0, "logit_bias": {word[0]: 1000.0}}
    for stop in ((), ("never",)):
        found = spaced.engine.generate(
            input_ids=[[start], word, [start]], sampling_params={**params, "stop": stop, "n": 2}
        )
        assert [each.text for each in found] == ["Hello", "Hello", " Hello", " Hello", "Hello", "Hello"]
