"""A tokenizer out of a model folder's files. Owns which files count, and the naming of the one at fault.

`tokenizer.json` is the tokenizer: the classes that transformers has for a model type may put another normalizer,
pre-tokenizer or decoder in its place, so they are not asked. Only without it one of them converts `tokenizer.model` or
`vocab.json`. Special tokens, further added tokens and chat templates come from the files beside it, as transformers
reads them. No code from a folder is ever run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.config.json_files import Fields, is_text, read_bytes, read_object, read_text, shown
from headrace.types.errors import CheckpointError, ConfigError, HeadraceError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_MAX_VOCABULARY_BYTES = 1 << 30
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_VOCABULARIES = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json")
_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
_PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")


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


def load_backend(folder: Path) -> Any:
    """The `transformers` tokenizer of a folder. Raises `ConfigError` naming the file and what is wrong with it."""
    try:
        config = _check_files(folder)
        if (folder / TOKENIZER_FILE).exists():
            _refuse_code(config)
            return _from_tokenizer_json(folder)
        found = [name for name in _VOCABULARIES if (folder / name).exists()]
        if not found:
            looked_for = ", ".join((TOKENIZER_FILE, *_VOCABULARIES))
            raise ConfigError(f"{folder} has no tokenizer files (looked for {looked_for})", field="tokenizer")
        return _converted(folder, found[0])
    except CheckpointError as error:
        raise ConfigError(error.message, field="tokenizer") from None


def _from_tokenizer_json(folder: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = folder / TOKENIZER_FILE
    text = read_text(file, _MAX_VOCABULARY_BYTES)
    with library_faults(ConfigError, f"{file} is not a tokenizer", "tokenizer"):
        exact = Tokenizer.from_str(text)
    if not exact.get_vocab_size(with_added_tokens=True):
        raise ConfigError(f"{file} has an empty vocabulary", field="tokenizer")
    with library_faults(ConfigError, f"the tokenizer files in {folder} cannot be loaded", "tokenizer"):
        backend = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        library = backend.backend_tokenizer
        for part in _PARTS:
            setattr(library, part, getattr(exact, part))
    return backend


def _converted(folder: Path, name: str) -> Any:
    """The tokenizer that transformers makes of other files than `tokenizer.json`."""
    from transformers import AutoTokenizer

    missing = _missing_packages(folder / name)
    if missing:
        message = f"{folder / name} cannot be read without {' and '.join(missing)}"
        advice = f"install {'them' if len(missing) > 1 else 'it'} (Headrace's extra `sentencepiece` has all)"
        raise ConfigError(f"{message}; {advice}, or save the tokenizer as {TOKENIZER_FILE}", field="tokenizer")
    with library_faults(ConfigError, f"{folder / name} cannot be made a tokenizer", "tokenizer"):
        backend = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        is_empty = not len(backend.get_vocab()) > len(backend.all_special_tokens)
    if is_empty:
        raise ConfigError(f"{folder / name} gives a tokenizer without a vocabulary", field="tokenizer")
    return backend


def _missing_packages(vocabulary: Path) -> list[str]:
    """What reading a `.model` file takes and is not installed: it is text for tiktoken, or else of sentencepiece."""
    if vocabulary.suffix != ".model":
        return []
    is_tiktoken = _TIKTOKEN_LINE.match(read_bytes(vocabulary, _MAX_VOCABULARY_BYTES)) is not None
    modules = {"tiktoken": "tiktoken"} if is_tiktoken else {"sentencepiece": "sentencepiece", "protobuf": "google"}
    return [package for package, module in modules.items() if importlib.util.find_spec(module) is None]


def _check_files(folder: Path) -> Mapping[str, Any]:
    """Read all that transformers would, so that a fault is named by file and field; returns `tokenizer_config.json`."""
    found = {name: read_object(folder / name, _MAX_VOCABULARY_BYTES) for name in _OBJECTS if (folder / name).exists()}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _check_special_tokens(Fields(found.get(name, {}), name))
    _check_config(Fields(found.get("tokenizer_config.json", {}), "tokenizer_config.json"))
    for name in ("added_tokens.json", "vocab.json"):
        fields = Fields(found.get(name, {}), name)
        for token, token_id in fields.values.items():
            if not is_text(token) or isinstance(token_id, bool) or not isinstance(token_id, int):
                raise CheckpointError(f"{name}: {shown(token)} must have a token id, got {shown(token_id)}", field=name)
    for template in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        if template.exists():
            read_text(template)
    return found.get("tokenizer_config.json", {})


def _check_special_tokens(fields: Fields) -> None:
    for name in _SPECIAL_TOKENS:
        if fields.has(name) and not _is_token(fields.values[name]):
            raise fields.wrong(name, "a token (a string, or an object with its content) or null")
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = fields.values.get(name) or []
        if not isinstance(tokens, (list, Mapping)) or not all(map(_is_token, _values(tokens))):
            raise fields.wrong(name, "a list of tokens")


def _check_config(fields: Fields) -> None:
    fields.text("tokenizer_class", "", null=True)
    if fields.has("split_special_tokens"):
        fields.flag("split_special_tokens")
    template = fields.values.get("chat_template")
    named = template if isinstance(template, list) else []
    is_right = template is None or is_text(template) or isinstance(template, (list, Mapping))
    if not is_right or not all(isinstance(each, Mapping) and {"name", "template"} <= each.keys() for each in named):
        raise fields.wrong("chat_template", "a string or a list of objects with name and template")
    added = fields.values.get("added_tokens_decoder", {})
    if not isinstance(added, Mapping):
        raise fields.wrong("added_tokens_decoder", "an object of tokens by their ids")
    for token_id, token in added.items():
        if not (token_id.isascii() and token_id.isdigit() and isinstance(token, Mapping) and _is_token(token)):
            raise Fields(added, "tokenizer_config.json", "added_tokens_decoder").wrong(token_id, "a token with its id")


def _is_token(value: Any) -> bool:
    if isinstance(value, Mapping):
        return is_text(value.get("content")) and all(isinstance(value.get(flag, True), bool) for flag in _TOKEN_FLAGS)
    return is_text(value)


def _values(tokens: list[Any] | Mapping[str, Any]) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, Mapping) else tokens


def _refuse_code(config: Mapping[str, Any]) -> None:
    """A class of the folder's own is refused; one that transformers has too only adds to what the files say."""
    import transformers

    code, name = config.get("auto_map"), config.get("tokenizer_class")
    if isinstance(code, Mapping):
        code = code.get("AutoTokenizer")
    if not code:
        return
    if not isinstance(name, str) or getattr(transformers, name, None) is None:
        message = f"tokenizer_config.json: auto_map asks for code ({shown(code)}), and no code from a folder is run"
        raise ConfigError(message, field="tokenizer")
    logger.warning("tokenizer_config.json names code in auto_map, which is not run; %s is used alone", TOKENIZER_FILE)


def _printable(text: str) -> str:
    """A library's words, bounded, and without what cannot be encoded."""
    return text[:300].encode("utf-8", "backslashreplace").decode("utf-8")
