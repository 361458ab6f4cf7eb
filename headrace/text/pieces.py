"""What each token contributes to the text. Owns the reading of a tokenizer's decoder; knows nothing of requests.

A decoder of the `tokenizers` library maps a whole list of tokens to text. The kinds in use by the supported models are
streams in disguise, and are read here as one:

    bytes   byte-level BPE: every token is some bytes, the text is their UTF-8, invalid parts replaced
    text    sentencepiece-like: token strings are rewritten one by one, runs of byte tokens <0xNN> are joined, spaces at
            the very start are stripped
    whole   anything else: only the whole list can be decoded

The semantics are those of the `tokenizers` decoders (huggingface/tokenizers, `src/decoders`); `Tokenizer` checks the
reading against the library before it is used.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

REPLACEMENT = "\ufffd"
MAX_CHARACTER_BYTES = 4
Rewrite = Callable[[str, bool], str]


class DecoderPlan(msgspec.Struct, frozen=True):
    """How tokens become text. `before` and `after` are the rewrites on either side of joining byte tokens."""

    kind: Literal["bytes", "text", "whole"]
    before: tuple[Rewrite, ...] = ()
    after: tuple[Rewrite, ...] = ()
    joins_byte_tokens: bool = False
    strip_content: str = ""
    strip_count: int = 0


WHOLE = DecoderPlan("whole")


def read_decoder(spec: Mapping[str, Any] | None) -> DecoderPlan:
    """The plan of a decoder given as the JSON object of `tokenizer.json` (None: tokens are joined by spaces)."""
    if spec is None:
        return DecoderPlan("text", after=(_space_between,))
    steps = _flatten(spec)
    kinds = [step["type"] for step in steps]
    if kinds[:1] == ["ByteLevel"]:
        return DecoderPlan("bytes") if set(kinds[1:]) <= {"Fuse"} else WHOLE
    return _read_text_steps(steps)


def token_bytes(token: str) -> bytes:
    """The bytes of one token of a byte-level vocabulary; a token with a character outside its alphabet is itself."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def byte_token(token: str) -> int | None:
    """The byte that a token like <0x0A> stands for."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    digits = token[3:5]
    return int(digits, 16) if all(digit in "0123456789abcdefABCDEF" for digit in digits) else None


def begun_character(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a character and do not complete it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-MAX_CHARACTER_BYTES:])
    return decoder.getstate()[0]


class ByteStream:
    """UTF-8 over pieces of bytes: incomplete characters are held back, invalid parts become U+FFFD.

    `begun` are bytes before the stream that begin a character: it is shown whole if the stream completes it, and they
    show nothing otherwise.
    """

    def __init__(self, begun: bytes = b"") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(begun)
        self._own: bytes | None = b"" if begun else None  # what came while it is open whether `begun` is completed

    def push(self, pieces: Iterable[bytes]) -> str:
        data = b"".join(pieces)
        text = self._decoder.decode(data)
        return text if self._own is None else self._settle(data, text)

    def finish(self) -> str:
        """The rest: one U+FFFD if a character is incomplete."""
        if self._own is not None:
            self._decoder.reset()
            self._decoder.decode(self._own)
        return self._decoder.decode(b"", True)

    def num_before(self, data: bytes) -> int:
        """How many characters what is held back shows before `data`, were that to come next."""
        held = self._decoder.getstate()[0] if self._own is None else self._own
        continues = not data or 0x80 <= data[0] < 0xC0
        return 1 if held and not continues else 0

    def fork(self) -> ByteStream:
        twin = ByteStream()
        twin._decoder.setstate(self._decoder.getstate())
        twin._own = self._own
        return twin

    def complete_rest(self) -> str:
        """What is held back, as far as its characters are complete: none is."""
        return ""

    def _settle(self, data: bytes, text: str) -> str:
        assert self._own is not None
        own = self._own + data
        if text[:1] != REPLACEMENT:
            self._own = None if text else own
            return text
        self._own = None
        self._decoder.reset()
        return self._decoder.decode(own)


class PieceStream:
    """The "text" kind: rewrites token by token, holding back only a run of byte tokens.

    `is_first` is false when other tokens stand before the stream, so that its spaces are not those of the very start;
    `begun` is as in `ByteStream`.
    """

    def __init__(self, plan: DecoderPlan, *, is_first: bool = True, begun: bytes = b"") -> None:
        self._plan = plan
        self._num_to_strip = plan.strip_count if is_first else 0
        self._byte_run = bytearray()
        self._begun = begun
        self._is_first_token = is_first
        self._is_first_piece = is_first

    def push(self, tokens: Iterable[str | None]) -> str:
        """Text that is now certain. None shows nothing and parts no run."""
        pieces: list[str] = []
        for token in tokens:
            if token is None:
                continue
            token = _rewrite(self._plan.before, token, self._is_first_token)
            self._is_first_token = False
            byte = byte_token(token) if self._plan.joins_byte_tokens else None
            if byte is not None:
                self._byte_run.append(byte)
                continue
            self._end_run(pieces)
            self._add(pieces, token)
        return self._strip("".join(pieces))

    def finish(self) -> str:
        pieces: list[str] = []
        self._end_run(pieces)
        return self._strip("".join(pieces))

    def num_before(self, token: str | None) -> int:
        """How many characters the run held back shows before `token`, were that to come next."""
        if not self._byte_run:
            return 0
        if token is None or byte_token(_rewrite(self._plan.before, token, False)) is not None:
            return len((self._begun + self._byte_run).decode("utf-8", "ignore"))
        return len("".join(self._run_pieces()))

    def fork(self) -> PieceStream:
        twin = copy.copy(self)
        twin._byte_run = self._byte_run[:]
        return twin

    def complete_rest(self) -> str:
        """What is held back, as far as its characters are complete."""
        if not self._byte_run:
            return ""
        twin = self.fork()
        joined = _complete_length(self._begun + self._byte_run)
        del twin._byte_run[joined - len(self._begun) if joined else _complete_length(self._byte_run) :]
        return twin.finish()

    def _add(self, pieces: list[str], piece: str) -> None:
        pieces.append(_rewrite(self._plan.after, piece, self._is_first_piece))
        self._is_first_piece = False

    def _end_run(self, pieces: list[str]) -> None:
        for piece in self._run_pieces():
            self._add(pieces, piece)
        self._byte_run.clear()
        self._begun = b""

    def _run_pieces(self) -> Iterable[str]:
        """A run of byte tokens is valid UTF-8 as a whole, or one replacement character per byte."""
        if not self._byte_run:
            return ()
        for data in (self._begun + self._byte_run, self._byte_run):
            try:
                return (data.decode("utf-8"),)
            except UnicodeDecodeError:
                continue
        return (REPLACEMENT,) * len(self._byte_run)

    def _strip(self, text: str) -> str:
        while self._num_to_strip and text:
            if text[0] != self._plan.strip_content:
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text


def _complete_length(data: bytes | bytearray) -> int:
    """The length without a last character that is incomplete; 0 for what is not the beginning of UTF-8."""
    try:
        return len(codecs.getincrementaldecoder("utf-8")("strict").decode(data).encode())
    except UnicodeDecodeError:
        return 0


def _flatten(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [step for inner in spec["decoders"] for step in _flatten(inner)]


def _read_text_steps(steps: Sequence[Mapping[str, Any]]) -> DecoderPlan:
    before: list[Rewrite] = []
    after: list[Rewrite] = []
    joins_byte_tokens = is_fused = False
    strip: tuple[str, int] = ("", 0)
    for step in steps:
        if step["type"] == "ByteFallback" and not (joins_byte_tokens or is_fused):
            joins_byte_tokens = True
        elif step["type"] == "Fuse":
            is_fused = True
        elif is_fused:
            if step["type"] != "Strip" or step["stop"] or strip[1]:
                return WHOLE
            strip = (step["content"], step["start"])
        else:
            rewrite = _read_rewrite(step)
            if rewrite is None:
                return WHOLE
            (after if joins_byte_tokens else before).append(rewrite)
    return DecoderPlan("text", tuple(before), tuple(after), joins_byte_tokens, *strip)


def _read_rewrite(step: Mapping[str, Any]) -> Rewrite | None:
    if step["type"] == "Replace" and step["pattern"].get("String"):
        return _replace(step["pattern"]["String"], step["content"])
    if step["type"] == "Strip" and not step["stop"]:
        return _strip_start(step["content"], step["start"])
    if step["type"] == "Metaspace":
        return _metaspace(step["replacement"], step.get("prepend_scheme", "always") != "never")
    return None


def _replace(pattern: str, content: str) -> Rewrite:
    return lambda token, is_first: token.replace(pattern, content)


def _strip_start(content: str, count: int) -> Rewrite:
    def rewrite(token: str, is_first: bool) -> str:
        kept = token.lstrip(content)
        return token[min(count, len(token) - len(kept)) :]

    return rewrite


def _metaspace(replacement: str, drops_first: bool) -> Rewrite:
    return lambda token, is_first: token.replace(replacement, "" if is_first and drops_first else " ")


def _space_between(token: str, is_first: bool) -> str:
    return token if is_first else f" {token}"


def _rewrite(rewrites: tuple[Rewrite, ...], token: str, is_first: bool) -> str:
    for rewrite in rewrites:
        token = rewrite(token, is_first)
    return token


def _byte_alphabet() -> dict[str, int]:
    """The published GPT-2 alphabet: printable Latin-1 stands for itself, other bytes for characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + offset): byte for offset, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
