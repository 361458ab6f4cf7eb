"""Log-probabilities on the OpenAI routes: one entry per token, each where its text is."""

from __future__ import annotations

import codecs
import json
from typing import Any

import pytest

from headrace.engine import GenerateItem, Stream
from headrace.server.openai_logprobs import TextTokens, TokenWriter, completion_logprobs
from headrace.text import Tokenizer
from headrace.types.generation import Generation
from headrace.types.request import Request, pack_ids
from headrace.types.sampling_params import SamplingParams
from tests.server.conftest import Served
from tests.text import builders


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(builders.byte_level())


def by_byte(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The tokens of single bytes."""
    ids = {tokenizer.token_bytes(token): token for token in reversed(range(tokenizer.vocab_size))}
    return [ids[bytes([byte])] for byte in data]


def piece(ids: list[int], text: str, last: bool, tops: list[dict[int, float]] | None = None) -> Generation:
    spans, reason = [("a", len(ids))] if ids else [], "stop" if last else None
    return Generation(
        request_id="r",
        token_ids=ids,
        logprobs=[-1.0] * len(ids),
        text=text,
        version_spans=spans,
        version_epochs=[0] * len(spans),
        finish_reason=reason,  # type: ignore[arg-type]
        top_logprobs=tops or [],
    )


def tokens_of(tokenizer: Tokenizer | None, prompt: list[int], **params: Any) -> TextTokens:
    item = GenerateItem(input_ids=prompt, params=SamplingParams(**params))
    return TextTokens(tokenizer, Stream(item, Request(1, "r", pack_ids(prompt), 8, 0), None, lambda *_: None))


def test_of_ids_with_one_text_the_best_counts_and_the_sampled_is_there(tokenizer: Tokenizer) -> None:
    first, second, third = by_byte(tokenizer, "世".encode())
    (letter,) = by_byte(tokenizer, b"a")
    top = {first: -0.5, second: -3.0, third: -9.0}
    found = completion_logprobs(TokenWriter(tokenizer, False), piece([letter], "a", True, [top]), [0])
    assert found["top_logprobs"] == [{"\ufffd": -0.5, "a": -1.0}]
    named = completion_logprobs(TokenWriter(tokenizer, True), piece([letter], "a", True, [top]), [0])
    assert named["tokens"] == [f"token_id:{letter}"]
    assert named["top_logprobs"] == [{f"token_id:{token}": value for token, value in {**top, letter: -1.0}.items()}]


@pytest.mark.parametrize("build", [builders.byte_level, builders.byte_fallback])
def test_offsets_index_the_text(build: Any) -> None:
    tokenizer = Tokenizer(build())
    e, rest = by_byte(tokenizer, b"e"), by_byte(tokenizer, "世\n".encode())
    special = [builders.special_token_ids(tokenizer)[0]]
    ids = [*e, *rest, *special, *e]
    whole = tokens_of(tokenizer, e).push(piece(ids, "e世\ne", True))
    assert whole[1] == [0, 1, 1, 1, 2, 3, 3]
    tokens = tokens_of(tokenizer, e)
    texts = [
        tokens.push(piece([token], text, False))
        for token, text in zip(ids, ["e", "", "", "世", "\n", "", "e"], strict=True)
    ]
    given = [(part.token_ids, offsets) for part, offsets in [*texts, tokens.push(piece([], "", True))]]
    assert sum((part for part, _ in given), []) == ids
    assert sum((offsets for _, offsets in given), []) == whole[1]
    assert given[0] == (e, [0]) and given[1] == ([], []), "half a character is given out with the whole"


@pytest.mark.parametrize("skips", [True, False])
def test_offsets_index_a_text_that_comes_all_at_the_end(skips: bool) -> None:
    tokenizer = Tokenizer(builders.word_pieces())
    assert tokenizer.decoder_plan.kind == "whole"
    hidden, a, b, end = builders.special_token_ids(tokenizer)[0], 1, 2, 5
    ids = [a, hidden, a, b, hidden, a, b, end] * 40
    texts = {a: " a", b: "b", end: ".", hidden: "" if skips else " [UNK]"}
    text = "".join(texts[token] for token in ids)
    assert tokenizer.decode([a, *ids], skips) == "a" + text
    expected = [len("".join(texts[token] for token in ids[:at])) for at in range(len(ids))]
    assert tokens_of(tokenizer, [a], skip_special_tokens=skips).push(piece(ids, text, True))[1] == expected
    tokens = tokens_of(tokenizer, [a], skip_special_tokens=skips)
    parts = [tokens.push(piece([token], "", False)) for token in ids]
    assert not any(part.token_ids or part.version_spans or offsets for part, offsets in parts)
    last, offsets = tokens.push(piece([], text, True))
    assert (last.token_ids, last.version_spans, offsets) == (ids, [("a", len(ids))], expected)
    assert tokens_of(tokenizer, [a]).push(piece(ids[:4], " a", True))[1] == [0, 2, 2, 2], "a stop string was trimmed"


def test_offsets_do_not_pass_a_trimmed_stop_string(tokenizer: Tokenizer) -> None:
    ids = by_byte(tokenizer, b"abcd")
    assert tokens_of(tokenizer, ids).push(piece(ids, "a", True))[1] == [0, 1, 1, 1]
    tokens = tokens_of(tokenizer, ids)
    parts = [tokens.push(piece([token], text, False)) for token, text in zip(ids, ["a", "", "", ""], strict=True)]
    parts.append(tokens.push(piece([], "", True)))
    assert [offsets for _, offsets in parts] == [[0], [], [], [], [1, 1, 1]]
    assert [part.version_spans for part, _ in parts] == [[("a", 1)], [], [], [], [("a", 3)]]


def test_without_a_tokenizer_tokens_are_given_out_as_they_come() -> None:
    tokens = tokens_of(None, [1])
    assert tokens.push(piece([5, 6], "", False))[0].token_ids == [5, 6]
    assert tokens.push(piece([7], "", True)) == (piece([7], "", True), [0])


def events(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    reply = served.http.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


@pytest.mark.parametrize("logprobs", [0, 3])
@pytest.mark.parametrize("stop", [None, ["e", "\ufffd", "the", "1"]])
def test_completions_whole_and_streamed(served: Served, logprobs: int, stop: Any) -> None:
    for seed in range(4):
        body = {
            "prompt": "The wheel",
            "max_tokens": 40,
            "seed": seed,
            "logprobs": logprobs,
            "stop": stop,
            "temperature": 1.5,
        }
        reply = served.http.post("/v1/completions", json={**body, "return_token_ids": True}).json()["choices"][0]
        found, text = reply["logprobs"], reply["text"]
        num = len(reply["token_ids"])
        assert {len(values) for values in found.values()} == {num}
        for token, value, top, offset in zip(*found.values(), strict=True):
            assert token in top and top[token] >= value and len(top) <= logprobs + 1
            assert 0 <= offset <= len(text)
            if "\ufffd" not in token and not token.startswith("<") and offset < len(text):
                assert token.startswith(text[offset : offset + len(token)])
        assert found["text_offset"] == sorted(found["text_offset"])
        choices = events(served, "/v1/completions", {**body, "return_token_ids": True})
        for key in found:
            assert sum((choice["logprobs"][key] for choice in choices), []) == found[key]
        for choice in choices:
            assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])


def test_streamed_chat_logprobs_are_with_their_text_and_not_with_the_role(served: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    served.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})  # cached for all from now on
    for seed in range(4):
        body: dict[str, Any] = {"messages": messages, "max_tokens": 30, "seed": seed, "temperature": 1.5}
        body |= {"logprobs": True, "top_logprobs": 2, "skip_special_tokens": False, "return_token_ids": True}
        whole = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]
        choices = events(served, "/v1/chat/completions", body)
        assert choices[0]["delta"]["role"] == "assistant" and choices[0]["logprobs"] is None
        assert "token_ids" not in choices[0]
        parts = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        assert sum(parts, []) == whole["logprobs"]["content"]
        assert len(whole["logprobs"]["content"]) == len(whole["token_ids"])
        decoder, content, shown = codecs.getincrementaldecoder("utf-8")("replace"), "", ""
        for choice in choices[1:]:
            content += choice["delta"].get("content", "")
            entries = choice["logprobs"]["content"] if choice["logprobs"] else []
            shown += decoder.decode(b"".join(bytes(entry["bytes"]) for entry in entries))
            if choice["finish_reason"] is None:  # a part of a character may turn out to be no character's
                assert content in (shown, shown + "\ufffd")
        assert all(len(entry["top_logprobs"]) == 2 for entry in whole["logprobs"]["content"])
