"""A folder's tokenizer: `tokenizer.json` as it is, whatever stands beside it; every fault named by its file."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from headrace.text import Tokenizer
from headrace.text import tokenizer as tokenizer_of
from headrace.text.tokenizer_files import load_backend
from headrace.types.errors import ConfigError, RequestError
from tests.text import builders

TEXTS = (*builders.CORPUS, "12345 apples", "  two  spaces ", "a\n\n\tb", "<|im_start|>user", "<s>x</s>", "")
VALUES: tuple[Any, ...] = (
    *(None, "x", "", True, 0, -1, 1.5, float("nan"), [], [1], ["x"], {}, {"a": 1}, [[1]], "\ud800", "unseen token"),
    *({"content": 5}, {"content": "x", "special": "yes"}, {"content": "\ud800"}, {"0": {"content": "q"}}, {"5": "q"}),
    *([{"name": "a", "template": "b"}], [{"name": 1}], {"-1": {"content": "q"}}),
)
FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "tokenizer.json"),
    *("chat_template.jinja", "additional_chat_templates/x.jinja"),
)
BYTES = (b"", b"{", b"[]", b"5", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}")


def digits_in_threes() -> Library:
    """A pre-tokenizer that no class of transformers would put there."""
    library: Library = builders.byte_level().backend_tokenizer
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bos = ("<|endoftext|>", library.token_to_id("<|endoftext|>"))
    library.post_processor = processors.TemplateProcessing("<|endoftext|> $A", "<|endoftext|> $A $B", [bos])
    return library


KINDS = {
    "digits": digits_in_threes,
    "fallback": lambda: builders.byte_fallback().backend_tokenizer,
    "fallback without prefix": lambda: builders.byte_fallback(prepend=False).backend_tokenizer,
    "unigram": lambda: builders.metaspace_unigram().backend_tokenizer,
}


def write(folder: Path, library: Library, model_type: str = "qwen2", **config: Any) -> Path:
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Unheard"])
def test_what_tokenizer_json_holds_is_what_is_used(kind: str, model_type: str, name: str, tmp_path: Path) -> None:
    exact = KINDS[kind]()
    write(tmp_path, exact, model_type, tokenizer_class=name, add_bos_token=False, add_prefix_space=True)
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05other")
    loaded = Tokenizer.load(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            assert loaded.encode(text, special) == exact.encode(text, add_special_tokens=special).ids
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.randrange(loaded.vocab_size) for _ in range(12)]
        for skip in (True, False):
            assert loaded.decode(ids, skip) == exact.decode(ids, skip_special_tokens=skip)


def test_digits_stay_in_threes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, digits_in_threes(), tokenizer_class="Qwen2Tokenizer"))
    library = load_backend(tmp_path).backend_tokenizer
    assert [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str("12345 apples")] == ["123", "45", "Ġapples"]
    assert tokenizer.bos_token_id is None and tokenizer.encode("x")[0] == tokenizer.encode("<|endoftext|>", False)[0]


def test_special_tokens_are_those_of_the_files_beside(tmp_path: Path) -> None:
    config: dict[str, Any] = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>", "bos_token": None}
    write(tmp_path, digits_in_threes(), **config)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 402}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_token_id == 0 and tokenizer.eos_token_ids == (2,)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<|endoftext|>x<|im_end|>"
    assert tokenizer.encode("<pad>", False) != tokenizer.encode("<extra>", False)
    assert [len(tokenizer.encode(text, False)) for text in ("<pad>", "<extra>")] == [1, 1]
    assert tokenizer.decode(tokenizer.encode("a<pad>b<extra>", False)) == "ab<extra>"


@pytest.mark.parametrize(("splits", "further"), [(False, ["<x>"]), (True, ["<x>"]), (False, {"boi_token": "<x>"})])
def test_what_a_folder_gives_is_what_transformers_gives(splits: bool, further: Any, tmp_path: Path) -> None:
    """A model's own special tokens too, by whose names its chat template may ask for them."""
    names: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "extra_special_tokens": further}
    names |= {"image_token": "<image>", "audio_token": "<tool_call>", "hf_token": None, "add_bos_token": True}
    write(tmp_path, digits_in_threes(), **names, split_special_tokens=splits)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    ours, theirs = load_backend(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for name in ("special_tokens_map", "chat_template", "bos_token_id", "eos_token_id", "is_fast"):
        assert getattr(ours, name) == getattr(theirs, name), name
    libraries = [each.backend_tokenizer for each in (ours, theirs)]
    assert libraries[0].get_vocab() == libraries[1].get_vocab()
    added = [repr(each.get_added_tokens_decoder()) for each in libraries]
    assert added[0] == added[1]
    found, expected = (each.encode("a<|im_end|><x>b", add_special_tokens=False).ids for each in libraries)
    assert found == expected and (len(found) == 4) == (not splits)


def test_an_end_that_was_an_ordinary_added_token_is_special(tmp_path: Path) -> None:
    write(tmp_path, digits_in_threes(), eos_token="<tool_call>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a<tool_call>", False)) == "a"
    assert set(tokenizer.eos_token_ids) <= set(builders.special_token_ids(tokenizer))


def mutations(library: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(file, field, contents) of faulty files."""
    names = ("eos_token", "image_token", "additional_special_tokens", "added_tokens_decoder", "chat_template")
    for name in (*names, "tokenizer_class", "split_special_tokens", "padding_side", "init_inputs", "tokenizer_file"):
        for value in VALUES:
            yield "tokenizer_config.json", name, {name: value}
            yield "special_tokens_map.json", name, {name: value}
    for name in library:
        yield "tokenizer.json", name, {key: value for key, value in library.items() if key != name}
        yield from (("tokenizer.json", name, {**library, name: value}) for value in VALUES)
    for name in library["model"]:
        yield from (
            ("tokenizer.json", name, {**library, "model": {**library["model"], name: value}}) for value in VALUES
        )
    for name in library["added_tokens"][0]:
        for value in VALUES:
            faulty = copy.deepcopy(library)
            faulty["added_tokens"][0][name] = value
            yield "tokenizer.json", name, faulty


def test_a_fault_is_named_by_its_file_and_never_a_raw_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_of, "_NUM_CHECKS", 2)  # of how ids are decoded, which no fault here is about
    kept = json.loads(write(tmp_path, builders.byte_level().backend_tokenizer).joinpath("tokenizer.json").read_text())
    write(tmp_path, builders_library(kept))
    intact = {file: file.read_bytes() for file in tmp_path.iterdir()}
    num_refused = 0
    for name, field, contents in mutations(kept):
        for file in tmp_path.iterdir():
            if file not in intact:
                file.unlink()
            elif file.stat().st_size != len(intact[file]) or file.read_bytes() != intact[file]:
                file.write_bytes(intact[file])
        (tmp_path / name).write_text(json.dumps(contents))
        try:
            tokenizer = Tokenizer.load(tmp_path)
        except ConfigError as error:
            num_refused += 1
            assert error.field == "tokenizer" and name in error.message and error.message.encode(), (name, field)
            assert name == "tokenizer.json" or field in error.message, (field, error.message)
            continue
        try:
            assert isinstance(tokenizer.encode("12345 apples"), list)
        except RequestError as error:
            assert "cannot encode" in error.message
    assert num_refused > 250


def builders_library(contents: dict[str, Any]) -> Library:
    return Library.from_str(json.dumps(contents))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    is_text = file.suffix == ".jinja"
    for content in BYTES[4:5] if is_text else BYTES:
        write(tmp_path, builders.byte_level().backend_tokenizer)
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=file.name):
            Tokenizer.load(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=file.name):
        Tokenizer.load(tmp_path)


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"model_type": "qwen2", "tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ConfigError, match=r"no tokenizer files.*tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "packages"),
    [(b"\x0a\x0e\x0a\x05<unk>", ("sentencepiece", "protobuf")), (b"IQ== 0\nIg== 1\n", ("tiktoken",))],
)
def test_what_a_vocabulary_alone_takes_is_named(
    content: bytes, packages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.model cannot be read without " + " and ".join(packages) in caught.value.message
    assert "sentencepiece" in caught.value.message


def test_a_vocabulary_of_pairs_is_converted_and_an_empty_one_refused(tmp_path: Path) -> None:
    vocabulary = builders.byte_level().backend_tokenizer.get_vocab()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ConfigError, match=r"merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"vocab\.json"):
        Tokenizer.load(tmp_path)


def test_code_is_not_run_and_not_needed_beside_tokenizer_json(tmp_path: Path) -> None:
    code: dict[str, Any] = {"auto_map": {"AutoTokenizer": [None, "evil.T"]}}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    write(tmp_path, digits_in_threes(), tokenizer_class="Qwen2Tokenizer", **code)
    assert len(Tokenizer.load(tmp_path).encode("12345", False)) > 0
    write(tmp_path, digits_in_threes(), tokenizer_class="Evil", **code)
    with pytest.raises(ConfigError, match="auto_map"):
        Tokenizer.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "cut",
    [
        {
            "padding": {
                "strategy": {"Fixed": 1_000_000_000},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
            }
            | {"pad_type_id": 0, "pad_token": "<pad>"}
        },
        {
            "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 1 << 40, "pad_id": 0}
            | {"pad_type_id": 0, "pad_token": "<pad>"}
        },
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}},
        {"truncation": {"direction": "Right", "max_length": 1 << 62, "strategy": "LongestFirst", "stride": 1 << 61}},
    ],
    ids=["fixed", "multiple", "stride", "length"],
)
def test_padding_and_truncation_never_reach_the_library(cut: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, digits_in_threes())
    expected = Tokenizer.load(tmp_path).encode("12345 apples")
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **cut}))
    assert Tokenizer.load(tmp_path).encode("12345 apples") == expected


def test_a_tokenizer_file_of_too_many_parts_is_refused(tmp_path: Path) -> None:
    write(tmp_path, digits_in_threes())
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": [' + b"[]," * (1 << 22) + b"0]}")
    with pytest.raises(ConfigError, match="lists and objects"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token_id", [1 << 22, 10**9, (1 << 32) - 1, 10**30])
def test_an_id_far_from_all_others_is_refused(token_id: int, tmp_path: Path) -> None:
    """The library counts from 0 to the highest whenever it is copied: minutes, and gigabytes of warnings."""
    write(tmp_path, digits_in_threes())
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    parts["model"]["vocab"]["far"] = token_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(ConfigError, match="a token has the id"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("num_files", "size"), [(65, 1), (3, 6 << 20)], ids=["files", "bytes"])
def test_templates_are_bounded_together(num_files: int, size: int, tmp_path: Path) -> None:
    write(tmp_path, digits_in_threes())
    (tmp_path / "additional_chat_templates").mkdir()
    for number in range(num_files):
        (tmp_path / f"additional_chat_templates/{number}.jinja").write_text("x" * size)
    with pytest.raises(ConfigError, match="additional_chat_templates"):
        Tokenizer.load(tmp_path)
