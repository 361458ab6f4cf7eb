"""Streamed text equals the whole text, for every kind of decoder."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import decoders

from headrace.text import IncrementalDetokenizer, Tokenizer
from headrace.text.tokenizer import TokenStrings
from tests.text import builders

NUM_SEQUENCES = 4_000
KINDS: dict[str, tuple[Callable[[], object], str]] = {
    "byte_level": (builders.byte_level, "bytes"),
    "byte_fallback": (builders.byte_fallback, "text"),
    "byte_fallback_without_prefix": (lambda: builders.byte_fallback(prepend=False), "text"),
    "metaspace": (builders.metaspace_unigram, "text"),
    "characters_fused": (lambda: builders.character_level(decoders.Fuse()), "text"),
    "characters_spaced": (lambda: builders.character_level(None), "text"),
    "word_pieces": (builders.word_pieces, "whole"),
}


def stream(tokenizer: Tokenizer, ids: list[int], cuts: random.Random, skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer.of(tokenizer, skip_special_tokens=skip)
    pieces = []
    position = 0
    while position < len(ids):
        step = cuts.choice((1, 1, 1, 2, 7))
        pieces.append(detokenizer.push(ids[position : position + step]))
        position += step
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole_text_on_random_ids(kind: str) -> None:
    build, plan_kind = KINDS[kind]
    tokenizer = Tokenizer(build())
    assert tokenizer.decoder_plan.kind == plan_kind
    source = random.Random(kind)
    for number in range(NUM_SEQUENCES):
        length = source.randrange(1, 24)
        ids = [source.randrange(tokenizer.vocab_size + 3) for _ in range(length)]
        skip = bool(number & 1)
        assert "".join(stream(tokenizer, ids, source, skip)) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_sequences_rich_in_bytes_and_specials() -> None:
    """Runs of bytes that are partly valid UTF-8, cut by special tokens, are where streams go wrong."""
    source = random.Random(1)
    for build in (builders.byte_level, builders.byte_fallback):
        tokenizer = Tokenizer(build())
        specials = builders.special_token_ids(tokenizer)
        alphabet = [tokenizer.encode(character, add_special_tokens=False) for character in "é世🙂Ünx "]
        for number in range(2_000):
            ids: list[int] = []
            while len(ids) < 20:
                chunk = source.choice([*alphabet, [source.choice(specials)]])
                ids.extend(chunk[source.randrange(2) :][: source.randrange(1, 5)])
            skip = bool(number & 1)
            assert "".join(stream(tokenizer, ids, source, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "characters_fused"])
def test_decode_is_what_transformers_says(kind: str) -> None:
    backend = KINDS[kind][0]()
    tokenizer = Tokenizer(backend)
    source = random.Random(2)
    for _ in range(200):
        ids = [source.randrange(tokenizer.vocab_size) for _ in range(12)]
        assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids)  # type: ignore[attr-defined]


def test_text_appears_as_soon_as_it_is_certain() -> None:
    tokenizer = Tokenizer(builders.byte_level())
    detokenizer = IncrementalDetokenizer.of(tokenizer)
    ids = [token for character in "a🙂b" for token in tokenizer.encode(character, add_special_tokens=False)]
    pieces = [detokenizer.push([token]) for token in ids]
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]
    assert detokenizer.finish() == ""


def test_an_incomplete_character_appears_at_the_end() -> None:
    tokenizer = Tokenizer(builders.byte_level())
    half = tokenizer.encode("🙂", add_special_tokens=False)[:1]
    detokenizer = IncrementalDetokenizer.of(tokenizer)
    assert detokenizer.push(half) == ""
    assert detokenizer.finish() == tokenizer.decode(half) == "\ufffd"


def test_cost_does_not_grow_with_the_text() -> None:
    """Counted, not timed: no id is looked at twice."""
    tokenizer = Tokenizer(builders.byte_fallback())
    looked_up: list[int] = []

    strings = TokenStrings(tokenizer._library, tokenizer._special_tokens)

    class Counting(dict[int, str | None]):
        def __getitem__(self, token_id: int) -> str | None:
            looked_up.append(token_id)
            return strings[token_id]

    detokenizer = IncrementalDetokenizer.of(tokenizer)
    detokenizer._pieces = Counting()  # type: ignore[attr-defined]
    ids = [300 + index % 20 for index in range(3_000)]
    for token in ids:
        detokenizer.push([token])
    assert looked_up == ids


@pytest.mark.parametrize("build", [builders.word_pieces, builders.byte_fallback_read_whole])
def test_what_a_whole_list_shows_before_a_token_is_counted_by_its_last_ids(
    build: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(build())
    assert tokenizer.decoder_plan.kind == "whole"
    character, decode, source = tokenizer.encode("世", add_special_tokens=False), tokenizer.decode, random.Random(5)
    ids: list[int] = []
    while len(ids) < 400:
        ids += source.choice((character * 5, [source.randrange(tokenizer.vocab_size - 8, tokenizer.vocab_size)]))
    num_decoded = 0

    def counted(ids: list[int], skip: bool) -> str:
        nonlocal num_decoded
        num_decoded = max(num_decoded, len(ids))
        return decode(ids, skip)

    monkeypatch.setattr(tokenizer, "decode", counted)
    for prompt in ([], ids[:40]):
        num_before = len(decode(prompt))
        detokenizer = IncrementalDetokenizer.of(tokenizer, prompt_ids=prompt)
        for at, token in enumerate(ids):
            found = detokenizer.num_before(token)
            text = decode(prompt + ids[:at])
            if not text.endswith("\ufffd"):
                assert found == len(text) - num_before, at
            detokenizer.push([token])
    assert num_decoded < 100


def after(tokenizer: Tokenizer, prompt: list[int], ids: list[int], cuts: random.Random, skip: bool = True) -> str:
    """The text of `ids` behind `prompt`, decoded in pieces."""
    detokenizer = IncrementalDetokenizer.of(tokenizer, skip_special_tokens=skip, prompt_ids=prompt)
    pieces = []
    position = 0
    while position < len(ids):
        step = cuts.choice((1, 1, 2, 5))
        pieces.append(detokenizer.push(ids[position : position + step]))
        position += step
    return "".join([*pieces, detokenizer.finish()])


@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_prompt_the_text_is_what_the_ids_add_to_it(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind][0]())
    source = random.Random(kind)
    num_compared = num_spaces = 0
    few_bytes = [*range(tokenizer.vocab_size), *[*range(tokenizer.vocab_size)][-20:] * 20]
    for number in range(3_000):
        prompt = source.choices(few_bytes, k=source.randrange(6))
        ids = source.choices(few_bytes, k=source.randrange(1, 12))
        skip = bool(number & 1)
        before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + ids, skip)
        if before.endswith("\ufffd") or not whole.startswith(before) or whole[len(before) :].startswith("\ufffd"):
            continue  # the border may part a character or a run of bytes
        text = after(tokenizer, prompt, ids, source, skip)
        assert text == whole[len(before) :], (prompt, ids)
        num_compared += 1
        num_spaces += text.startswith(" ")
    assert num_compared > 1_000
    assert num_spaces > 10 or kind == "byte_level"


def test_byte_level_text_is_that_of_its_own_ids() -> None:
    tokenizer = Tokenizer(builders.byte_level())
    source = random.Random(3)
    for _ in range(1_000):
        prompt = tokenizer.encode(source.choice(builders.CORPUS), add_special_tokens=False)
        ids = [source.randrange(tokenizer.vocab_size) for _ in range(12)]
        assert after(tokenizer, prompt, ids, source) == tokenizer.decode(ids)


@pytest.mark.parametrize("build", [builders.byte_fallback, builders.metaspace_unigram])
def test_the_first_space_is_that_of_the_text_not_of_the_completion(build: Callable[[], object]) -> None:
    tokenizer = Tokenizer(build())
    word = tokenizer.encode("ab cd e" if build is builders.metaspace_unigram else "the wheel", False)
    special = tokenizer.encode("</s>", add_special_tokens=False)
    special = [token for token in special if token in builders.special_token_ids(tokenizer)]
    whole = tokenizer.decode(word)
    cuts = random.Random(0)
    assert after(tokenizer, [], word, cuts) == whole
    assert after(tokenizer, special, word, cuts) == whole, "a prompt that shows nothing is no text"
    assert after(tokenizer, special, word, cuts, skip=False) == " " + whole
    assert after(tokenizer, word, word, cuts) == " " + whole
    assert after(tokenizer, [*word, *special], word, cuts) == " " + whole


def test_of_a_whole_list_a_prompt_that_shows_goes_before_one_that_does_not() -> None:
    tokenizer = Tokenizer(builders.word_pieces())
    hidden, a = builders.special_token_ids(tokenizer)[0], tokenizer.encode("a")[0]
    assert after(tokenizer, [a, *[hidden] * 50], [a], random.Random(0)) == " a"
    assert after(tokenizer, [hidden] * 50, [a], random.Random(0)) == "a"


@pytest.mark.parametrize("build", [builders.byte_level, builders.byte_fallback])
def test_a_character_begun_by_the_prompt_is_shown_whole_where_it_is_completed(build: Callable[[], object]) -> None:
    tokenizer = Tokenizer(build())
    by_byte = {tokenizer.token_bytes(token): token for token in reversed(range(tokenizer.vocab_size))}
    ids = [by_byte[bytes([byte])] for byte in "世".encode()]
    letter = max(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"e")
    cuts = random.Random(0)
    for cut in (1, 2):
        prompt, rest = [letter, *ids[:cut]], ids[cut:]
        assert after(tokenizer, prompt, [*rest, letter], cuts) == "世e"
        assert after(tokenizer, [*prompt, *builders.special_token_ids(tokenizer)[:1]], rest, cuts) == "世"
        assert after(tokenizer, prompt, [letter], cuts) == "e", "what the prompt did not complete is the prompt's"
        assert after(tokenizer, prompt, [], cuts) == ""
        broken = after(tokenizer, prompt, [rest[0], letter], cuts)
        assert broken == ("\ufffde" if cut == 1 else "世e")
    assert after(tokenizer, [letter, *ids], ids, cuts) == "世"
