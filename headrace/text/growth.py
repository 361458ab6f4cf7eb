"""How much longer than its text what a tokenizer makes of it can be, told from its parts before anything is encoded.

Owns these bounds. A folder's author chooses what is put in the place of a character, and steps multiply: two that write
a thousand letters for each make 60 MB of 60 characters. Unicode's own forms are counted as far as they can reach.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from headrace.config.json_files import shown
from headrace.types.errors import ConfigError

MAX_GROWTH = 512
"""Bytes for a byte of text, at worst; of common tokenizers 2 to 20, of those with a map of characters up to 484."""

MAX_ADDED_IDS = 1024
"""Ids that a post-processor puts around a text."""

MAX_WORD_CHARACTERS = 1024
"""Of a word that WordPiece takes apart, which takes the cube of them; usual are 100."""

_UNICODE_FORMS = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 1.5, "StripAccents": 1, "BertNormalizer": 9}
"""Most bytes for a byte. One behind another of them finds next to nothing left to lengthen."""

_SPACES = re.compile(r"(?: |\\s)(?:\+|\{([1-9][0-9]{0,3}),\})")
_REPLACEMENT_BYTES = 3
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")


def growth_of(library: Any) -> int:
    """Most bytes that come of a byte, through all steps of a `tokenizers` tokenizer. `ConfigError` naming the part for
    one over `MAX_GROWTH`, or with too many ids around a text."""
    normalized = _normalizer_growth(_steps(library.normalizer))
    _require(normalized, "normalizer")
    split = math.prod(map(_split_growth, _steps(library.pre_tokenizer)))
    _require(normalized * split, "pre_tokenizer")
    model = library.model
    longest = getattr(model, "max_input_chars_per_word", 0)
    if longest > MAX_WORD_CHARACTERS:
        message = f"the tokenizer's max_input_chars_per_word is {shown(longest)}; at most {MAX_WORD_CHARACTERS} may be"
        raise ConfigError(message, field="tokenizer")
    affixes = (getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    marked = normalized * split * math.prod(1 + _size(affix) for affix in affixes if affix)
    _require(marked, "model")
    repeats, num_added = 1, 0
    for step in _steps(library.post_processor):
        times, more = _template(step) if step["type"] == "TemplateProcessing" else (1, 4)
        repeats, num_added = repeats * times, num_added * times + more
        if num_added > MAX_ADDED_IDS:
            message = f"the tokenizer's post_processor adds {num_added} ids to a text; at most {MAX_ADDED_IDS} may be"
            raise ConfigError(message, field="tokenizer")
        _require(marked * repeats, "post_processor")
    _require(math.prod(map(_decoder_growth, _steps(library.decoder))), "decoder")
    return math.ceil(marked * repeats)


def _require(growth: float, part: str) -> None:
    if growth > MAX_GROWTH:
        message = f"the tokenizer's {part} can make a text {shown(math.ceil(growth))} times as long"
        raise ConfigError(f"{message}; at most {MAX_GROWTH} times may be", field="tokenizer")


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a part in their order, sequences taken apart."""
    pending = [] if part is None else [json.loads(part.__getstate__())]
    while pending:
        step = pending.pop()
        if step["type"] != "Sequence":
            yield step
            continue
        for name in _LISTS:
            pending += reversed(step.get(name, ()))


def _normalizer_growth(steps: Iterator[Mapping[str, Any]]) -> float:
    growth: float = 1
    reached: float = 1  # by the Unicode forms since the last step that writes what the folder says
    for step in steps:
        kind = step["type"]
        if kind in _UNICODE_FORMS:
            more = max(reached, _UNICODE_FORMS[kind])
            growth, reached = growth / reached * more, more
            continue
        factor: float = 1
        if kind == "Replace":
            factor = _replaced(step)
        elif kind == "Prepend":  # to every piece between added tokens
            factor = 1 + _size(step["prepend"])
        elif kind == "ByteLevel":
            factor = 2
        elif kind == "Precompiled":
            factor = _mapped(step["precompiled_charsmap"])
        if factor > 1:
            growth, reached = growth * factor, 1
        if growth > MAX_GROWTH:
            break
    return growth


def _split_growth(step: Mapping[str, Any]) -> int:
    if step["type"] == "ByteLevel":
        return 4 if step["add_prefix_space"] else 2
    return 1 + _size(step["replacement"]) if step["type"] == "Metaspace" else 1


def _decoder_growth(step: Mapping[str, Any]) -> float:
    if step["type"] == "Replace":
        return _replaced(step)
    if step["type"] == "ByteLevel":
        return _REPLACEMENT_BYTES
    return 2 if step["type"] in ("WordPiece", "BPEDecoder", "CTC") else 1  # a space for each token


def _replaced(step: Mapping[str, Any]) -> float:
    """What matches a regular expression may be one byte, or none between any two, but for runs of spaces."""
    found, written = step["pattern"].get("String"), _size(step["content"])
    spaces = _SPACES.fullmatch(step["pattern"].get("Regex", ""))
    num_found = int(spaces[1] or 1) if spaces else _size(found or "")
    return max(1, written / num_found) if num_found else 1 + written


def _mapped(charsmap: Any) -> float:
    """Of sentencepiece's map: what it writes for one byte and for two, and the longest text, which is for three."""
    from tokenizers import normalizers

    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else bytes(charsmap)
    normalizer = normalizers.Precompiled(data)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    short = [*map(chr, range(0x800)), "\r\n"]  # of further characters the map is asked one by one
    return max(
        1,
        max(_size(normalizer.normalize_str(text)) / _size(text) for text in short),
        max(map(len, texts.split(b"\0"))) / 3,
    )


def _template(step: Mapping[str, Any]) -> tuple[int, int]:
    """How often the text stands in a template, and how many ids beside it."""
    names = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
    num_ids = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
    return len(step["single"]) - len(names), sum(num_ids.get(name, 0) for name in names)


def _size(text: str) -> int:
    return len(text.encode())
