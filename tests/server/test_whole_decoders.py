"""Where only whole lists of ids can be decoded, a stop string ends a stream at the token that completes it, on every
door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from headrace import Engine
from tests.server.builders import SETTINGS, save_chain
from tests.server.conftest import Served

CHAIN = {
    "word pieces": ("a", "##b", "c", "##d", "e", "##f", "g", "h"),
    "words": ("a</w>", "b</w>", "c", "d</w>", "e</w>", "f</w>", "g</w>", "h</w>"),
}
STOP = "cd"
GREEDY = {"temperature": 0, "max_new_tokens": 30, "stop": [STOP]}


@pytest.fixture(scope="module", params=CHAIN)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """A server whose model says all of a chain after its first word, and the text before the stop string."""
    chain = CHAIN[request.param]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *chain])}
    if request.param == "word pieces":
        library = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
        library.decoder = decoders.WordPiece()
    else:
        library = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
        library.decoder = decoders.BPEDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = "a"
    folder = save_chain(tmp_path_factory.mktemp("whole"), tokenizer, chain)
    with Engine(folder, inprocess=True, **SETTINGS) as engine:
        assert engine.tokenizer is not None and engine.tokenizer.decoder_plan.kind == "whole"
        served = Served(engine)
        yield served, "b " if request.param == "word pieces" else " b "
        served.close()


PROMPT, KEPT = [3], [4, 5, 6]


def test_python(whole: tuple[Served, str]) -> None:
    served, text = whole
    (reply,) = served.engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    pieces = list(served.engine.stream(input_ids=PROMPT, sampling_params=GREEDY))
    assert (reply.token_ids, reply.text, reply.matched) == (KEPT, text, STOP)
    assert [token for piece in pieces for token in piece.token_ids] == KEPT
    assert [value for piece in pieces for value in piece.logprobs] == reply.logprobs
    assert "".join(piece.text for piece in pieces) == text and pieces[-1].matched == STOP
    assert sum(count for piece in pieces for _, count in piece.version_spans) == len(KEPT)


@pytest.mark.parametrize("incremental", [False, True])
def test_native(whole: tuple[Served, str], incremental: bool) -> None:
    served, text = whole
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
    reply = served.generate(**body)
    assert (reply["output_ids"], reply["text"]) == (KEPT, text)
    settings = {**body, "stream": True, "incremental_streaming_output": incremental}
    lines = served.http.post("/generate", json=settings).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    ids = [token for event in events for token in event["output_ids"]] if incremental else events[-1]["output_ids"]
    texts = "".join(event["text"] for event in events) if incremental else events[-1]["text"]
    assert (ids, texts) == (KEPT, text)
    assert all(len(event["output_ids"]) <= len(KEPT) for event in events)
    assert events[-1]["meta_info"]["completion_tokens"] == len(KEPT)
    assert events[-1]["meta_info"]["finish_reason"]["matched"] == STOP


def test_openai(whole: tuple[Served, str]) -> None:
    served, text = whole
    settings: dict[str, Any] = {"model": "default", "max_tokens": 30, "temperature": 0, "stop": STOP}
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    messages: Any = [{"role": "user", "content": "any"}]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        once = client.completions.create(prompt=PROMPT, logprobs=1, **settings)
        assert once.choices[0].text == text and once.choices[0].logprobs is not None
        chunks = list(client.completions.create(prompt=PROMPT, logprobs=1, **settings, **options))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert "".join(choice.text for choice in choices) == text
        tokens = [token for each in choices if each.logprobs for token in each.logprobs.tokens or ()]
        assert tokens == once.choices[0].logprobs.tokens and len(tokens) == len(KEPT)
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(KEPT)
        pieces = list(client.chat.completions.create(messages=messages, logprobs=True, **settings, **options))
        deltas = [choice for piece in pieces for choice in piece.choices]
        assert "".join(choice.delta.content or "" for choice in deltas) == text
        assert sum(len(each.logprobs.content or ()) for each in deltas if each.logprobs) == len(KEPT)
        assert pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == len(KEPT)
