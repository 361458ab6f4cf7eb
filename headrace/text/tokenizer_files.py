"""A tokenizer out of a model folder's files. Owns which files count, and the naming of the one at fault.

`tokenizer.json` is the tokenizer: the classes that transformers has for a model type may put another normalizer,
pre-tokenizer or decoder in its place, so they are not asked. Only without it one of them converts `tokenizer.model`,
which is then held against sentencepiece, or `vocab.json`. Special tokens, further added tokens and chat templates come
from the files beside it, as transformers reads them. No code from a folder is ever run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.config.json_bounds import VOCABULARY
from headrace.config.json_files import Fields, is_there, read_bytes, read_object, shown
from headrace.text.growth import growth_of
from headrace.text.token_files import (
    CONFIG,
    MAX_TOKEN_ID,
    MAX_TOKEN_LENGTH,
    MAX_VOCABULARY_BYTES,
    TOKEN_FILES,
    add_tokens,
    chat_template,
    read_token_files,
    template_files,
)
from headrace.types.errors import CheckpointError, ConfigError, HeadraceError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_VOCABULARIES = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
_SPACE = "\u2581"
_SAMPLES = ("Hello, world", " two  spaces ", "line\n\tline", "12345 \u00e9\u4e16\U0001f642 \ufb01", "x = [1]; y")


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """What `Tokenizer` asks of a fast tokenizer of `transformers`, by the same names, without its import of over a
    second."""

    backend_tokenizer: Any
    """Of the library `tokenizers`, with every added token."""

    special_tokens_map: dict[str, str]
    chat_template: str | dict[str, str] | None
    is_fast = True

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)


@contextlib.contextmanager
def library_faults(error: type[HeadraceError], what: str, field: str) -> Iterator[None]:
    """Whatever the tokenizer libraries raise inside, as an `error` that says `what` failed.

    They raise anything over foreign data, and a panic of their Rust code is a `BaseException`.
    """
    try:
        yield
    except (HeadraceError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as fault:
        reason = next(iter(str(fault).strip().splitlines()), "") or type(fault).__name__
        raise error(f"{what}: {_printable(reason)}", field=field) from fault


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that a tokenizer may be made of and that are there. `CheckpointError` for what cannot be read."""
    names = dict.fromkeys((TOKENIZER_FILE, *TOKEN_FILES, *_VOCABULARIES, "merges.txt"))
    return [path for path in (*(folder / name for name in names), *template_files(folder)) if is_there(path)]


def load_backend(folder: Path) -> Any:
    """A folder's tokenizer, a `FileTokenizer` or one of `transformers`. Raises `ConfigError` naming the file and what
    is wrong with it."""
    try:
        files = read_token_files(folder)
        if is_there(folder / TOKENIZER_FILE):
            _refuse_code(files[CONFIG].values)
            return _from_tokenizer_json(folder, files)
        found = [name for name in _VOCABULARIES if is_there(folder / name)]
        if not found:
            looked_for = ", ".join((TOKENIZER_FILE, *_VOCABULARIES))
            raise ConfigError(f"{folder} has no tokenizer files (looked for {looked_for})", field="tokenizer")
        return _converted(folder, found[0])
    except CheckpointError as error:
        raise ConfigError(error.message, field="tokenizer") from None


def _from_tokenizer_json(folder: Path, files: Mapping[str, Fields]) -> Any:
    """What `tokenizer.json` says, with the further tokens and the names of special ones that the other files give."""
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILE
    parts = read_object(file, MAX_VOCABULARY_BYTES, VOCABULARY)
    _refuse_what_aborts(Fields(parts, TOKENIZER_FILE))
    without_cuts = {**parts, "padding": None, "truncation": None}  # neither is done, and either may ask for a billion
    with library_faults(ConfigError, f"{file} is not a tokenizer", "tokenizer"):
        steps = {**without_cuts, "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        growth_of(Tokenizer.from_str(json.dumps(steps)))  # ahead of the added tokens, which loading sends through them
        library = Tokenizer.from_str(json.dumps(without_cuts))  # what was checked, whatever the file spells twice
    if not library.get_vocab_size(with_added_tokens=False):
        raise ConfigError(f"{file} has an empty vocabulary", field="tokenizer")
    with library_faults(ConfigError, f"the tokenizer files in {folder} cannot be loaded", "tokenizer"):
        names = add_tokens(library, files)
        template = chat_template(folder, files[CONFIG])
    library.encode_special_tokens = files[CONFIG].values.get("split_special_tokens") is True
    return FileTokenizer(library, names, template)


def _refuse_what_aborts(fields: Fields) -> None:
    """Over merges that their prefix does not fit, and over tokens of a million characters, the library does not raise:
    it ends the process. Over ids with a billion between them it counts them all."""
    model = fields.values.get("model")
    if not isinstance(model, Mapping):
        raise fields.wrong("model", "an object")
    vocabulary, added = model.get("vocab"), fields.values.get("added_tokens")
    tokens = list(vocabulary) if isinstance(vocabulary, (Mapping, list)) else []
    tokens = [each[0] if isinstance(each, list) and each else each for each in tokens]  # a list holds scores too
    tokens += [each.get("content") for each in added if isinstance(each, Mapping)] if isinstance(added, list) else []
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    if longest > MAX_TOKEN_LENGTH:
        message = f"{fields.file}: a token has {longest} characters, at most {MAX_TOKEN_LENGTH} may be"
        raise CheckpointError(message, field="vocab")
    ids = vocabulary.values() if isinstance(vocabulary, Mapping) else ()
    highest = max((token_id for token_id in ids if isinstance(token_id, int)), default=0)
    if highest > MAX_TOKEN_ID:
        message = f"{fields.file}: a token has the id {shown(highest)}, at most {MAX_TOKEN_ID} may be"
        raise CheckpointError(message, field="vocab")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not prefix or not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(parts, list) and not all(isinstance(part, str) and part.startswith(prefix) for part in parts[1:]):
            raise Fields(model, fields.file, "model").wrong("continuing_subword_prefix", "that of every merge")


def _converted(folder: Path, name: str) -> Any:
    """The tokenizer that transformers makes of other files than `tokenizer.json`."""
    from transformers import AutoTokenizer, LlamaTokenizer

    if name == "vocab.json" and not is_there(folder / "merges.txt"):
        raise ConfigError(f"{folder / name} cannot be read without merges.txt beside it", field="tokenizer")
    is_pieces = name == "tokenizer.model" and not _TIKTOKEN_LINE.match(read_bytes(folder / name, MAX_VOCABULARY_BYTES))
    missing = _missing_packages(folder / name, is_pieces)
    if missing:
        message = f"{folder / name} cannot be read without {' and '.join(missing)}"
        advice = f"install {'them' if len(missing) > 1 else 'it'} (Headrace's extra `sentencepiece` has all)"
        raise ConfigError(f"{message}; {advice}, or save the tokenizer as {TOKENIZER_FILE}", field="tokenizer")
    maker = LlamaTokenizer if is_pieces else AutoTokenizer
    with library_faults(ConfigError, f"{folder / name} cannot be made a tokenizer", "tokenizer"):
        backend = maker.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        is_empty = not len(backend.get_vocab()) > len(backend.all_special_tokens)
        if is_pieces:
            _follow_sentencepiece(backend.backend_tokenizer, folder / name)
    if is_empty:
        raise ConfigError(f"{folder / name} gives a tokenizer without a vocabulary", field="tokenizer")
    return backend


def _follow_sentencepiece(library: Any, file: Path) -> None:
    """Spaces as sentencepiece has them, which some versions of transformers lose on the way; proved on samples."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers

    pieces = SentencePieceProcessor(model_proto=read_bytes(file, MAX_VOCABULARY_BYTES))
    has_prefix = pieces.encode("a", out_type=str)[0].startswith(_SPACE)
    steps = [normalizers.Prepend(_SPACE)] if has_prefix else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    library.pre_tokenizer = None
    for text in _SAMPLES:
        ids = pieces.encode(text)
        found = library.encode(text, add_special_tokens=False).ids
        if found != ids or library.decode(ids) != pieces.decode(ids):
            message = f"{file} is of a kind that cannot be converted ({text!r} differs); save it as {TOKENIZER_FILE}"
            raise ConfigError(message, field="tokenizer")


def _missing_packages(vocabulary: Path, is_pieces: bool) -> list[str]:
    """What reading a `.model` file takes and is not installed."""
    if vocabulary.suffix != ".model":
        return []
    return [name for name in (("sentencepiece", "protobuf") if is_pieces else ("tiktoken",)) if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _refuse_code(config: Mapping[str, Any]) -> None:
    """A class of the folder's own is refused; one that transformers has too only adds to what the files say."""
    code, name = config.get("auto_map"), config.get("tokenizer_class")
    if isinstance(code, Mapping):
        code = code.get("AutoTokenizer")
    if not code:
        return
    import transformers

    if not name or getattr(transformers, name, None) is None:
        message = f"{CONFIG}: auto_map asks for code ({shown(code)}), and no code from a folder is run"
        raise ConfigError(message, field="tokenizer")
    logger.warning("%s names code in auto_map, which is not run; %s is used alone", CONFIG, TOKENIZER_FILE)


def _printable(text: str) -> str:
    """A library's words, bounded, and without what cannot be encoded."""
    return text[:300].encode("utf-8", "backslashreplace").decode("utf-8")
