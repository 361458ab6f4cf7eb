"""The files beside a vocabulary: names of special tokens, further added tokens, chat templates.

Owns what each may hold, and the order in which they count, which is that of transformers; every fault is named by file
and field. Must not know how a vocabulary is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from headrace.config.json_bounds import VOCABULARY
from headrace.config.json_files import MAX_CONFIG_BYTES, Fields, is_text, is_there, read_object, read_text, shown
from headrace.types.errors import CheckpointError

CONFIG = "tokenizer_config.json"
MAX_VOCABULARY_BYTES = 1 << 28
"""The largest vocabularies in use take 40 MB."""

MAX_TOKEN_LENGTH = 4096
"""Characters; the longest in use have a few hundred."""

MAX_TOKEN_ID = (1 << 22) - 1
MAX_TEMPLATES = 64
_SPECIAL_MAP = "special_tokens_map.json"
_ADDED, _VOCABULARY = "added_tokens.json", "vocab.json"
TOKEN_FILES = (CONFIG, _SPECIAL_MAP, _ADDED, _VOCABULARY)
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FURTHER = ("extra_special_tokens", "additional_special_tokens")
_TOKEN = {"__type": "AddedToken"}
"""What the object of a token has beside its content and flags."""

_BY_ID = "added_tokens_decoder"
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def template_files(folder: Path) -> list[Path]:
    """The files of chat templates. `CheckpointError` for more than there may be."""
    files = _template_files(folder / _TEMPLATES)
    if len(files) > MAX_TEMPLATES:
        raise CheckpointError(f"{folder / _TEMPLATES} has over {MAX_TEMPLATES} files", field=_TEMPLATES)
    return [folder / _TEMPLATE, *sorted(files)]


def read_token_files(folder: Path) -> dict[str, Fields]:
    """The JSON files beside `tokenizer.json`, each checked; one that is not there has no fields. `CheckpointError`."""
    files = {}
    for name in TOKEN_FILES:
        path = folder / name
        files[name] = Fields(read_object(path, MAX_VOCABULARY_BYTES, VOCABULARY) if is_there(path) else {}, name)
    for name in (CONFIG, _SPECIAL_MAP):
        _check_special_tokens(files[name])
    for name in (_ADDED, _VOCABULARY):
        _check_ids(files[name])
    _check_config(files[CONFIG])
    return files


def add_tokens(library: Any, files: Mapping[str, Fields]) -> dict[str, str]:
    """Add to a `tokenizers` tokenizer what the files name beyond its own tokens; returns the named special tokens."""
    from tokenizers import AddedToken

    config, is_legacy = files[CONFIG].values, _BY_ID not in files[CONFIG].values
    special = {**config, **_all_special(files[_SPECIAL_MAP].values)} if is_legacy else config
    named = _named(special)
    specials = {_content(token): token for token in [*named.values(), *_further(special)]}
    own = library.get_added_tokens_decoder()
    if is_legacy:
        further = {
            token_id: AddedToken(token, normalized=token not in specials, special=token in specials)
            for token, token_id in files[_ADDED].values.items()
            if token_id not in own
        }
    else:
        further = {int(token_id): AddedToken(**_flags(token)) for token_id, token in config[_BY_ID].items()}
    as_written = set(map(repr, own.values()))
    library.add_tokens([token for _, token in sorted(further.items()) if repr(token) not in as_written])
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    new = {name: AddedToken(**_flags(token)) for name, token in specials.items() if name not in known}
    for name in map(_content, named.values()):  # one that ends or begins a sequence is special, whatever it was
        token = new.get(name) or known[name]
        if not token.special:
            token.special = True
            new[name] = token
    library.add_tokens(list(new.values()))
    return {name: _content(token) for name, token in named.items()}


def chat_template(folder: Path, config: Fields) -> str | dict[str, str] | None:
    """The template, or several by name: those in files of their own, or else what the configuration holds."""
    default, *files = template_files(folder)
    found: dict[str, str] = {}
    num_left = MAX_CONFIG_BYTES  # of all of them together
    for path in files:
        found[path.stem] = read_text(path, num_left)
        num_left -= len(found[path.stem].encode())
    if is_there(default):
        found["default"] = read_text(default)
    if found:
        return found["default"] if found.keys() == {"default"} else found
    template: Any = config.values.get("chat_template")
    return {each["name"]: each["template"] for each in template} if isinstance(template, list) else template


def _template_files(folder: Path) -> list[Path]:
    """Those of a folder, if there is one: at most one more than there may be."""
    try:
        with os.scandir(folder) as entries:
            names = (entry.name for entry in entries if entry.name.endswith(".jinja"))
            return [folder / name for name in islice(names, MAX_TEMPLATES + 1)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", field=folder.name) from None


def _check_special_tokens(fields: Fields) -> None:
    for name in _NAMES:
        if fields.has(name) and not _is_token(fields.values[name]):
            raise fields.wrong(name, "a token (a string, or an object with its content) or null")
    special = _all_special(fields.values) if fields.file == _SPECIAL_MAP else fields.values
    for name, token in special.items():
        if _is_of_model(name, token) and not _is_token(token):
            raise fields.wrong(name, "a token")
    for name in _FURTHER:
        tokens = fields.values.get(name)
        if isinstance(tokens, Mapping):
            tokens = list(tokens.values())
        if tokens is not None and not (isinstance(tokens, list) and all(map(_is_token, tokens))):
            raise fields.wrong(name, "a list of tokens")


def _check_ids(fields: Fields) -> None:
    for token, token_id in fields.values.items():
        if not _is_content(token) or type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            message = f"{fields.file}: {shown(token)} must have a token id, got {shown(token_id)}"
            raise CheckpointError(message, field=fields.file)


def _check_config(fields: Fields) -> None:
    fields.text("tokenizer_class", "", null=True)
    if fields.has("split_special_tokens"):
        fields.flag("split_special_tokens")
    if not _is_template(fields.values.get("chat_template")):
        raise fields.wrong("chat_template", "a string or a list of objects with name and template")
    added = fields.values.get(_BY_ID, {})
    if not isinstance(added, Mapping):
        raise fields.wrong(_BY_ID, "an object of tokens by their ids")
    for token_id, token in added.items():
        if not (token_id.isascii() and token_id.isdigit() and isinstance(token, Mapping) and _is_token(token)):
            raise Fields(added, fields.file, _BY_ID).wrong(token_id, "a token with its id")


def _is_template(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(is_text, value.values()))
    if isinstance(value, list):
        names = ("name", "template")
        return all(isinstance(each, Mapping) and all(is_text(each.get(name)) for name in names) for each in value)
    return value is None or is_text(value)


def _is_token(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_content(value.get("content")) and all(isinstance(value.get(flag, True), bool) for flag in _FLAGS)
    return _is_content(value)


def _is_content(value: Any) -> bool:
    return is_text(value) and len(value) <= MAX_TOKEN_LENGTH


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _flags(token: Any) -> dict[str, Any]:
    """What makes a token, as the library takes it."""
    if not isinstance(token, Mapping):
        return {"content": token, "special": True}
    return {name: token[name] for name in ("content", *_FLAGS) if name in token}


def _all_special(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """`special_tokens_map.json`, in which no token says that it is special, for all are; nor that it is a token."""
    return {
        name: {**token, **_TOKEN, "special": True} if isinstance(token, Mapping) and name not in _FURTHER else token
        for name, token in tokens.items()
        if token
    }


def _named(special: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name: those that every tokenizer may have, and a model's own, which its chat template may ask
    for (`image_token`)."""
    named = {name: special[name] for name in _NAMES if special.get(name)}
    named |= {name: token for name, token in special.items() if token and _is_of_model(name, token)}
    for name in _FURTHER:
        if isinstance(special.get(name), Mapping):
            named |= special[name]
    return named


def _is_of_model(name: str, value: Any) -> bool:
    """Whether transformers takes a setting for a special token by this name."""
    is_token = isinstance(value, str) or (isinstance(value, Mapping) and _TOKEN.items() <= value.items())
    return name.endswith("_token") and name not in _NAMES and is_token


def _further(special: Mapping[str, Any]) -> list[Any]:
    """Special tokens without names."""
    lists = (special.get(name) for name in _FURTHER)
    return next((tokens for tokens in lists if tokens and isinstance(tokens, list)), [])
