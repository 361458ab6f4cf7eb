"""A model's tokenizer. Owns the loaded vocabulary and template; no code from a model folder is ever run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, overload

from headrace.text.chat import check_template_arguments
from headrace.text.growth import growth_of
from headrace.text.pieces import WHOLE, ByteStream, DecoderPlan, PieceStream, byte_token, read_decoder, token_bytes
from headrace.text.templates import TemplateRenderer
from headrace.text.tokenizer_files import library_faults, load_backend
from headrace.types.errors import ConfigError, RequestError
from headrace.types.plain_values import plain_text

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
"""As OpenAI's API has them."""

_NUM_CHECKS = 32
_CHECK_LENGTH = 24


class Tokenizer:
    """Text to ids and back, over what a folder's files give or a fast tokenizer of `transformers`.

    `decode` never tidies spaces up, so that ids decode the same whatever stands around them. Like in every fast
    tokenizer, `spaces_between_special_tokens` is accepted and has no effect.
    """

    def __init__(self, backend: Any) -> None:
        """Wrap a `FileTokenizer` or a loaded tokenizer of `transformers`; it must be a fast one."""
        if not getattr(backend, "is_fast", False):
            raise ConfigError(f"tokenizer {type(backend).__name__} is not a fast tokenizer", field="tokenizer")
        self._backend = backend
        self._library = backend.backend_tokenizer
        self._library.no_truncation()
        self._library.no_padding()
        self.growth = growth_of(self._library)
        """Most bytes that come of a byte of text on its way to ids."""
        self._renderer = TemplateRenderer()
        added = self._library.get_added_tokens_decoder()
        self._special_tokens = frozenset(token.content for token in added.values() if token.special)
        self.vocab_size: int = self._library.get_vocab_size(with_added_tokens=True)
        self._token_strings = TokenStrings(self._library, frozenset())
        self.decoder_plan = self._checked_plan()
        self._tables: dict[frozenset[str], TokenStrings | BytePieces] = {}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load from a folder. Raises `ConfigError` when there is none that works without running its code."""
        backend = load_backend(Path(plain_text(folder)))
        with library_faults(ConfigError, f"the tokenizer in {folder} does not work", "tokenizer"):
            tokenizer = cls(backend)
            tokenizer._library.encode("")  # a post-processor that names a token there is not fails here
        return tokenizer

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end-of-sequence id, if it has one."""
        eos = self._backend.eos_token_id
        return () if eos is None else (int(eos),)

    def special_token_id(self, text: str) -> int | None:
        """The id of the token that `skip_special_tokens` hides and whose string is `text`, if there is one."""
        return self._library.token_to_id(text) if text in self._special_tokens else None

    @property
    def bos_token_id(self) -> int | None:
        return None if self._backend.bos_token_id is None else int(self._backend.bos_token_id)

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, if there is one."""
        template = self._backend.chat_template
        if isinstance(template, Mapping):
            template = template.get("tool_use") or template.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Raises `RequestError` for what is no text, and text that is not Unicode (lone surrogates)."""
        if not isinstance(text, str):
            raise RequestError(f"text must be a string, not {type(text).__name__}", field="text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"text is not valid Unicode: {error.reason} at {error.start}", field="text") from None
        with library_faults(RequestError, "the tokenizer cannot encode this text", "text"):
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of `ids`; ids outside the vocabulary are nothing. Raises `RequestError` for what is no list of ids, and
        for ids of which the tokenizer can make no text."""
        with library_faults(RequestError, "the tokenizer cannot decode these ids", "ids"):
            try:
                text: str = self._library.decode(list(ids), skip_special_tokens=bool(skip_special_tokens))
            except (TypeError, OverflowError):  # no list, or what no id can be in it
                raise RequestError("ids must be a list of token ids", field="ids") from None
        return text

    def length_of(self, ids: Iterable[int]) -> int:
        """Characters of these tokens as the vocabulary writes them: what there is to decode. Ids are in its range."""
        return sum(len(self._token_strings[token_id] or "") for token_id in ids)

    def token_text(self, token_id: int) -> str:
        """The text of one token as it reads inside a sentence (a leading space is kept)."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; UTF-8, but not always whole characters."""
        token = self._token_strings[token_id]
        if token is None:
            return b""
        if self.decoder_plan.kind == "bytes":
            return token_bytes(token)
        byte = byte_token(token) if self.decoder_plan.joins_byte_tokens else None
        if byte is not None:
            return bytes([byte])
        stream = PieceStream(self.decoder_plan)
        anchor = stream.push(("a",))
        return (anchor + stream.push((token,)) + stream.finish())[len(anchor) :].encode("utf-8", "replace")

    def render_chat(
        self,
        messages: Messages,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> str:
        """The chat template's text, rendered in a process of its own with a bound on time and memory. With
        `continue_final_message` it ends where the last message's content does, so that a reply goes on with it.

        Raises `RequestError` when there is no template or it refuses the messages.
        """
        rendering = self._rendering(messages, tools, add_generation_prompt, template_arguments)
        return self._renderer.render(*rendering, continue_final_message=continue_final_message)

    def submit_chat(
        self,
        messages: Messages,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> Future[str]:
        """As `render_chat`, for a caller that must not wait: the text comes later, and so may its `RequestError`."""
        rendering = self._rendering(messages, tools, add_generation_prompt, template_arguments)
        return self._renderer.submit(*rendering, continue_final_message=continue_final_message)

    def interrupt_chats(self) -> None:
        """Refuse the conversations that are being rendered now."""
        self._renderer.interrupt()

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        *,
        tokenize: Literal[True] = True,
        **template_arguments: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        *,
        tokenize: Literal[False],
        **template_arguments: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Messages,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        *,
        tokenize: bool = True,
        **template_arguments: Any,
    ) -> list[int] | str:
        """Ids of a conversation, or its text with `tokenize=False`; raises as `render_chat` does."""
        text = self.render_chat(messages, tools, add_generation_prompt, **template_arguments)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def pieces(self, skip_special_tokens: bool, shown: frozenset[str]) -> TokenStrings | BytePieces:
        """The token strings, or for a byte-level vocabulary the bytes, of every id. Special tokens in `shown` show
        although others are skipped."""
        hidden = self._special_tokens - shown if skip_special_tokens else frozenset()
        if hidden not in self._tables:
            strings = TokenStrings(self._library, hidden)
            self._tables[hidden] = BytePieces(strings) if self.decoder_plan.kind == "bytes" else strings
        return self._tables[hidden]

    def special_among(self, tokens: Iterable[str]) -> frozenset[str]:
        """Those of `tokens` that `skip_special_tokens` hides."""
        return self._special_tokens.intersection(tokens)

    def _rendering(
        self, messages: Messages, tools: Tools, add_generation_prompt: bool, arguments: Mapping[str, Any]
    ) -> tuple[str, Messages, dict[str, Any]]:
        """The template, the messages and the variables, as transformers chooses them."""
        templates = self._backend.chat_template
        if isinstance(templates, Mapping):
            templates = templates.get("tool_use" if tools and "tool_use" in templates else "default")
        if not isinstance(templates, str):
            raise RequestError("the tokenizer has no chat template; send token ids or a plain prompt", field="messages")
        given = {"tools": list(tools) if tools else None, "add_generation_prompt": add_generation_prompt}
        arguments = check_template_arguments(arguments, "template_arguments")
        return templates, messages, {"documents": None, **self._backend.special_tokens_map, **arguments, **given}

    def _checked_plan(self) -> DecoderPlan:
        """The streaming plan, if it decodes random ids exactly as the library does; else the whole-list plan."""
        decoder = self._library.decoder
        plan = read_decoder(None if decoder is None else json.loads(decoder.__getstate__()))
        if plan.kind == "whole":
            return plan
        source = random.Random(0)
        for _ in range(_NUM_CHECKS):
            ids = [source.randrange(self.vocab_size) for _ in range(_CHECK_LENGTH)]
            tokens = [token for token_id in ids if (token := self._token_strings[token_id]) is not None]
            if _decode_by(plan, tokens) != self.decode(ids, skip_special_tokens=False):
                return WHOLE
        return plan


class TokenStrings(dict[int, str | None]):
    """Token strings by id, looked up on first use; None for ids that are nothing or `hidden`."""

    def __init__(self, library: Any, hidden: frozenset[str]) -> None:
        super().__init__()
        self._library = library
        self._hidden = hidden

    def __missing__(self, token_id: int) -> str | None:
        token: str | None = self._library.id_to_token(token_id)
        piece = None if token in self._hidden else token
        self[token_id] = piece
        return piece


class BytePieces(dict[int, bytes]):
    """Bytes by id, looked up on first use; b"" for ids that do not show."""

    def __init__(self, strings: TokenStrings) -> None:
        super().__init__()
        self._strings = strings

    def __missing__(self, token_id: int) -> bytes:
        token = self._strings[token_id]
        piece = b"" if token is None else token_bytes(token)
        self[token_id] = piece
        return piece


def _decode_by(plan: DecoderPlan, tokens: Iterable[str]) -> str:
    if plan.kind == "bytes":
        stream = ByteStream()
        return stream.push(map(token_bytes, tokens)) + stream.finish()
    pieces = PieceStream(plan)
    return pieces.push(tokens) + pieces.finish()
