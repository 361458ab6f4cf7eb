"""What a tokenizer makes of a text is bounded: by its parts before it is used, and by what is encoded at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from headrace.text import Tokenizer, encode_bounded
from headrace.text.growth import MAX_GROWTH, MAX_WORD_CHARACTERS, growth_of
from headrace.types.errors import ConfigError, RequestError
from tests.text import builders


def write(folder: Path, **parts: Any) -> Path:
    file = folder / "tokenizer.json"
    builders.byte_level().backend_tokenizer.save(str(file))
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return folder


def dot(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": "."}, "content": content}


def sequence(of: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", of: list(steps)}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
X = {"SpecialToken": {"id": "x", "type_id": 0}}


def template(*single: Any, num_ids: int = 1) -> dict[str, Any]:
    special = {"x": {"id": "x", "ids": [1] * num_ids, "tokens": ["a"] * num_ids}}
    return {"type": "TemplateProcessing", "single": single, "pair": [A, B], "special_tokens": special}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", dot("a" * 1000)),
        ("normalizer", sequence("normalizers", *[dot("a" * 1000)] * 6)),
        ("normalizer", sequence("normalizers", sequence("normalizers", dot("a" * 30), dot("b" * 30)))),
        ("normalizer", sequence("normalizers", *[dot("aa")] * 7)),
        ("normalizer", {"pattern": {"String": "a"}, "content": "a" * 600}),
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 600}),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 50_000_000}),
        ("normalizer", sequence("normalizers", *[dot("\ufdfa"), {"type": "NFKC"}] * 2)),
        ("normalizer", sequence("normalizers", *[{"type": "ByteLevel"}] * 10)),
        ("pre_tokenizer", sequence("pretokenizers", *[BYTES] * 10)),
        ("post_processor", template(*[A] * 1000)),
        ("post_processor", sequence("processors", template(*[A] * 40), template(*[A] * 40))),
        ("post_processor", template(*[X] * 1000, A, num_ids=1000)),
        ("decoder", sequence("decoders", {"type": "ByteLevel", **BYTES}, dot("a" * 30), dot("a" * 30))),
        ("model", "affix"),
    ],
    ids=range(15),
)
def test_a_part_that_lengthens_texts_too_far_is_named(part: str, value: Any, tmp_path: Path) -> None:
    if part == "model":
        value = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "#" * 600, "vocab": {"a": 0}}
        value["max_input_chars_per_word"] = 100
        write(tmp_path, model=value, added_tokens=[], post_processor=None)
    else:
        write(tmp_path, **{part: value})
    with pytest.raises(ConfigError, match=part) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.field == "tokenizer" and len(caught.value.message) < 400


def test_tokens_that_crash_the_library_are_refused_before_it_sees_them(tmp_path: Path) -> None:
    """In a process of its own: without the bound it ends with a signal."""
    token = {"id": 500, "content": "Q" * 1_000_000, "normalized": True, "special": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    unigram = {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": [["u", 0.0], ["a" * 1_000_000, -1.0]]}
    program = "import sys; from headrace.text import Tokenizer; Tokenizer.load(sys.argv[1])"
    cases: tuple[dict[str, Any], ...] = (
        {"added_tokens": [token]},
        {"model": unigram, "added_tokens": [], "post_processor": None},
    )
    for parts in cases:
        write(tmp_path, **parts)
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 1 and "1000000 characters" in done.stderr.splitlines()[-1], done.stderr[-500:]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (None, pre_tokenizers.ByteLevel()),
        (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None),
        (normalizers.Replace(" ", "\u2581"), pre_tokenizers.Metaspace()),
        (normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()]), None),
        (
            normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
            None,
        ),
        (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    ],
    ids=["gpt", "qwen", "llama 2", "gemma", "unicode", "clip", "bert"],
)
def test_what_tokenizers_in_use_do_is_well_within(normalizer: Any, pre_tokenizer: Any) -> None:
    library = Library(models.BPE())
    library.normalizer, library.pre_tokenizer = normalizer, pre_tokenizer
    assert 1 < growth_of(library) <= MAX_GROWTH / 16


NO_ENTRIES = (1024).to_bytes(4, "little") + bytes(1024)


@pytest.mark.parametrize("pattern", [r" {2,}", r"\s+", r"\s{2,}", r" +"])
def test_a_map_of_characters_behind_a_unicode_form_is_within(pattern: str) -> None:
    """As in ALBERT and XLNet, whose map writes 33 bytes for one character of three."""
    quotes = (normalizers.Replace("``", '"'), normalizers.Replace("''", '"'))
    unicode = (normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase())
    library = Library(models.BPE())
    own = (normalizers.Precompiled(NO_ENTRIES + b"x" * 33 + b"\0"), normalizers.Replace(Regex(pattern), " "))
    library.normalizer = normalizers.Sequence([*quotes, *unicode, *own])
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    assert growth_of(library) == 11 * 11 * 4


@pytest.mark.parametrize("pattern", ["x*", " *", r"\s{0,}", r" +| ?", r"( {2,})?", r"[ ]{2,}", r" {2,}\b|"])
def test_any_other_regular_expression_may_match_nothing(pattern: str) -> None:
    library = Library(models.BPE())
    library.normalizer = normalizers.Replace(Regex(pattern), "a" * 600)
    with pytest.raises(ConfigError, match="normalizer"):
        growth_of(library)


@pytest.mark.parametrize(("size", "is_refused"), [(33, False), (3000, True)])
def test_a_map_of_characters_counts_by_the_longest_text_that_it_writes(size: int, is_refused: bool) -> None:
    library = Library(models.BPE())
    library.normalizer = normalizers.Precompiled(NO_ENTRIES + b"x" * size + b"\0")
    if is_refused:
        with pytest.raises(ConfigError, match="normalizer"):
            growth_of(library)
    else:
        assert growth_of(library) == 11


def test_a_text_is_never_longer_than_said() -> None:
    texts = ("a", " ", "\ufdfa", "\u0130", "\u4e16", "a b", "\u0344" * 3, "  \u00e9\U0001f642")
    steps = (
        *(normalizers.NFKC(), normalizers.NFD(), normalizers.Lowercase(), normalizers.BertNormalizer()),
        *(normalizers.ByteLevel(), normalizers.Prepend("xyz"), normalizers.Replace(" ", "\u2581")),
        *(normalizers.Replace("a", "bcd"), normalizers.Replace(Regex("."), "  ")),
        *(normalizers.Replace(Regex(" {2,}"), "abc"), normalizers.Replace(Regex(r"\s+"), "abc")),
    )
    for first in steps:
        for second in steps:
            library = Library(models.BPE())
            library.normalizer = normalizers.Sequence([first, second])
            try:
                growth = growth_of(library)
            except ConfigError:
                continue
            for text in texts:
                assert len(library.normalizer.normalize_str(text).encode()) <= growth * len(text.encode())


def test_the_more_a_text_grows_the_less_of_it_is_encoded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, normalizer=dot("ab" * 30)))
    assert tokenizer.growth > 60
    lengths: list[int] = []
    encode = Tokenizer.encode

    def recorded(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", recorded)
    with pytest.raises(RequestError, match="over 100 tokens"):
        encode_bounded(tokenizer, "\n" * 200 + "x" * 1200, 100, "text")
    assert max(lengths) * tokenizer.growth < 64 * 100 + tokenizer.growth
    with pytest.raises(RequestError, match="characters"):
        encode_bounded(tokenizer, "x" * 1601, 100, "text")
    assert encode_bounded(tokenizer, "x", 100, "text") == encode(tokenizer, "x")


def test_the_words_of_word_pieces_are_bounded() -> None:
    library = builders.word_pieces().backend_tokenizer
    library.model.max_input_chars_per_word = MAX_WORD_CHARACTERS + 1
    with pytest.raises(ConfigError, match="max_input_chars_per_word"):
        growth_of(library)


def test_ids_of_which_no_text_can_be_made_are_refused() -> None:
    """The library panics where its regular expression gives up."""
    replace = decoders.Replace(Regex("(?:a|a|aa)+[bc]"), "x")
    tokenizer = Tokenizer(builders.character_level(decoders.Sequence([decoders.Fuse(), replace])))
    ids = tokenizer.encode("a" * 40)
    with pytest.raises(RequestError, match="cannot decode") as failure:
        tokenizer.decode(ids)
    assert failure.value.field == "ids"
