"""Stop strings, a minimum of tokens and a cut in the middle, against a plain search through decoded text."""

from __future__ import annotations

import codecs
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from headrace.engine.text_feed import TextStart
from headrace.text import Tokenizer
from headrace.types.sampling_params import SamplingParams
from tests.text import builders

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": builders.byte_level,
    "text": builders.byte_fallback,
    "whole": lambda: builders.character_level(decoders.WordPiece(prefix="##", cleanup=False)),
}


def complete(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids without a last character that is not complete."""
    if tokenizer.decoder_plan.kind == "whole":
        return tokenizer.decode(ids)
    data = b"".join(map(tokenizer.token_bytes, ids))
    text = codecs.getincrementaldecoder("utf-8")().decode(data)
    return text.removeprefix(" ") if tokenizer.decoder_plan.strip_count else text


def oracle(
    tokenizer: Tokenizer, before: list[int], ids: list[int], params: SamplingParams
) -> tuple[int, str, str | None]:
    """How many of `ids` a sequence keeps, its text, and its stop string."""
    text, start = tokenizer.decode(before + ids), len(complete(tokenizer, before))
    passed_over = len(complete(tokenizer, before + ids[: max(0, params.min_new_tokens - 1)]))
    for end in range(passed_over + 1, len(text) + 1):
        ending = [stop for stop in params.stop if text[:end].endswith(stop)]
        if ending and len(ids) >= params.min_new_tokens:
            longest = max(ending, key=len)
            num_kept = next(n for n in range(1, len(ids) + 1) if len(complete(tokenizer, before + ids[:n])) >= end)
            return num_kept, text[start : end if params.no_stop_trim else max(start, end - len(longest))], longest
    return len(ids), text[start:], None


def run(start: TextStart, ids: list[int], is_streamed: bool) -> tuple[int, str, str | None]:
    feed, taken = start.feed(), []
    for position, token_id in enumerate(ids):
        matched = feed.push(token_id, position + 1)
        if is_streamed:
            taken.append(feed.take())
        if matched is not None:
            break
    else:
        position, matched = len(ids) - 1, feed.finish(len(ids))
    taken.append(feed.take())
    length = feed.completing_length(ids[: position + 1]) if matched is not None else len(ids)
    assert length == position + 1, "no token is read beyond the one that completes the stop string"
    assert "".join(taken) == feed.text
    return length, feed.text, matched


def encode(library: PreTrainedTokenizerFast, source: random.Random, kind: str) -> list[int]:
    """Ids whose text is whole, though many tokens end within a character."""
    alphabet = "abé🙂日 \n" if kind != "whole" else "abcde 01"
    text = "".join(source.choices(alphabet, k=source.randrange(2, 14)))
    ids: list[int] = library.encode(text, add_special_tokens=False)
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_where_a_search_through_the_text_says(kind: str) -> None:
    library = KINDS[kind]()
    tokenizer, source = Tokenizer(library), random.Random(2)
    num_matched = num_after_minimum = num_across = 0
    for _ in range(1_500):
        ids = encode(library, source, kind)
        if len(ids) < 2 or "\ufffd" in tokenizer.decode(ids):
            continue
        cut = source.choice([0, source.randrange(len(ids) - 1)])
        text = tokenizer.decode(ids)
        spots = [source.randrange(len(text) or 1) for _ in range(source.randrange(1, 4))]
        stops = [text[at : at + source.randrange(1, 5)] or "zz" for at in spots]
        params = SamplingParams(
            stop=stops, min_new_tokens=source.choice([0, 0, 1, 2, 3, 5]), no_stop_trim=source.random() < 0.3
        )
        before, new = ids[:cut], ids[cut:]
        expected = oracle(tokenizer, before, new, params)
        found = run(TextStart(tokenizer, params, before), new, source.random() < 0.5)
        assert found == expected, (before, new, params)
        if expected[2] is not None:
            num_matched += 1
            num_after_minimum += params.min_new_tokens > 1
            num_across += expected[2] not in expected[1] and cut > 0 and expected[1] == ""
    assert min(num_matched, num_after_minimum, num_across) > 30


def words_with_ends() -> PreTrainedTokenizerFast:
    """A decoder that ends each word with a space, but not the last one."""
    words = ["<unk>", *(f"{word}</w>" for word in ("a", "b", "c", "ab")), "a", "b"]
    vocab = {word: index for index, word in enumerate(words)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    library.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=library, clean_up_tokenization_spaces=False)


WHOLE = {"characters": KINDS["whole"], "word pieces": builders.word_pieces, "words": words_with_ends}


@pytest.mark.parametrize("build", WHOLE)
def test_a_stop_string_late_in_a_long_text_ends_it_at_once_where_only_whole_lists_are_decoded(build: str) -> None:
    tokenizer, source = Tokenizer(WHOLE[build]()), random.Random(4)
    assert tokenizer.decoder_plan.kind == "whole"
    for number in range(6):
        prompt = source.choices(range(1, 7), k=source.choice([0, 3, 40]))
        ids = source.choices(range(1, 7), k=900)
        shown = len(tokenizer.decode(prompt + ids[:850])) - len(tokenizer.decode(prompt))
        stop = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :][shown : shown + 40 + 100 * (number % 2)]
        params = SamplingParams(
            stop=[stop, "never"], no_stop_trim=True, min_new_tokens=source.choice([0, 5, 800]), max_new_tokens=900
        )
        length, text, matched = run(TextStart(tokenizer, params, (), np.array(prompt, np.int32)), ids, True)
        assert matched == stop and text.endswith(stop) and length > 800
        before = tokenizer.decode(prompt)
        assert stop not in tokenizer.decode(prompt + ids[: length - 1])[len(before) :]
        assert text in (whole := tokenizer.decode(prompt + ids[:length])) and whole.startswith(before)


def test_what_is_decoded_per_token_does_not_grow_with_the_text() -> None:
    tokenizer, source = Tokenizer(builders.word_pieces()), random.Random(5)
    sizes: list[int] = []
    decode = tokenizer.decode

    def counted(ids: Sequence[int], *args: bool) -> str:
        sizes.append(len(ids))
        return decode(ids, *args)

    tokenizer.decode = counted  # type: ignore[method-assign,assignment]
    feed = TextStart(tokenizer, SamplingParams(stop=["never"])).feed()
    ids = source.choices(range(1, 9), k=3000)
    assert not any(feed.push(token_id, number) for number, token_id in enumerate(ids, 1))
    assert max(sizes) <= 128 and len(sizes) < 3200
    feed.finish(len(ids))
    assert feed.text == decode(ids)


def test_a_decoder_that_reaches_far_is_searched_as_a_whole() -> None:
    """Here the number of quotation marks before a token decides about its text."""

    def decode(ids: Sequence[int], *_: bool) -> str:
        return "".join("'" if token == 3 else "xX"[list(ids[:at]).count(3) % 2] for at, token in enumerate(ids))

    tokenizer = Tokenizer(builders.word_pieces())
    tokenizer.decode = decode  # type: ignore[method-assign,assignment]
    ids = [1, 3, *[1] * 400, 3, 1, 1]
    found = run(TextStart(tokenizer, SamplingParams(stop=["'x"])), ids, True)
    assert found == (404, "x'" + "X" * 400, "'x")


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_two_parts_are_the_text_of_the_whole(kind: str) -> None:
    """But for the marks of a character cut in two, which belongs to the part that completes it."""
    library = KINDS[kind]()
    tokenizer, source = Tokenizer(library), random.Random(3)
    for _ in range(500):
        ids = encode(library, source, kind)
        if len(ids) < 2 or "\ufffd" in tokenizer.decode(ids):
            continue
        cut = source.randrange(1, len(ids))
        start = TextStart(tokenizer, SamplingParams(), ids[:cut])
        first, second = complete(tokenizer, ids[:cut]), run(start, ids[cut:], True)[1]
        assert first + second == tokenizer.decode(ids)
        assert start.whole_text(ids[cut:]) == second
