"""A generation of `/generate` that goes on at another replica when its own dies: what has come of it, what is asked of
the next one, and how the two become one answer. Owns that spelling; knows no connection.

The next request is the prompt and the tokens that came, `num_output_ids_in_prompt`, with the seed that the reply named
and what is left of the limits: with `numerics="invariant"` the ids are those of a generation that was never cut.
"""

from __future__ import annotations

import array
import base64
import itertools
from typing import Any, Literal, get_args

import msgspec

from headrace.cluster.http_parts import MAX_CHUNK_BYTES
from headrace.ipc.codec import DECODE_ERRORS

ResumeMode = Literal["off", "streams", "all"]
RESUME_MODES: tuple[str, ...] = get_args(ResumeMode)
PATH = "/generate"
RETRYABLE_MARK = b'"retryable":true'
"""In an event that says that its replica's engine has died. No string of JSON holds these bytes."""
_DEFAULT_MAX_NEW_TOKENS = 128
_EVENT = b"data: {"
_ERROR = b'"error":'
_NUM_LAST = 2  # an error is the last event, but for the end
_OF_SAMPLE = b'"meta_info":'
_GAP = b"\n\n"
END_OF_STREAM = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = MAX_CHUNK_BYTES
_OK, _LEAST_ERROR, _LAST_ERROR = 200, 400, 599
_LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
_KEPT, _KEPT_OFFSETS = "top_p_token_ids", "top_p_token_offsets"
_GROWING = (*_LISTS, _KEPT, _KEPT_OFFSETS, "output_token_logprobs_length", "version_spans", "version_epochs")
_OF_PROMPT = (
    *("id", "prompt_tokens", "cached_tokens", "prompt_token_ids", "prompt_version_spans"),
    "prompt_logprob_mode",
)
_ASKED_ONCE = ("return_prompt_token_ids", "logprob_start_len")


class UnreadableAnswerError(Exception):
    """What a replica answers is no stream of `/generate`."""


class _Meta(msgspec.Struct):
    """What is counted on in an event, and how it has to look."""

    completion_tokens: int
    id: str
    finish_reason: dict[str, Any] | None = None
    seed: int | None = None
    output_token_logprobs: list[Any] = []
    output_top_logprobs: list[Any] = []
    output_token_ids_logprobs: list[Any] = []
    version_spans: list[tuple[str | None, int]] = []
    version_epochs: list[int] = []
    weight_versions: list[_Range] | None = None
    top_p_token_ids: bytes = b""
    top_p_token_offsets: bytes = b""


class _Range(msgspec.Struct):
    version: str | None
    start: int
    end: int


class _Event(msgspec.Struct):
    output_ids: list[int]
    meta_info: _Meta
    text: str = ""


class Resumption:
    """One generation. `is_whole`: its client waits for one answer, which is asked for as a stream."""

    def __init__(self, asked: dict[str, Any], *, is_whole: bool, is_incremental: bool) -> None:
        self.is_whole = is_whole
        self.num_resumed = 0
        self._asked = asked
        self._is_incremental = is_incremental
        self._before: dict[str, Any] = {}
        """What earlier replicas have made, as one answer; {}: nothing."""
        self._parts: list[bytes] = []
        self._rest: list[bytes] = []
        """The beginning of an event of which the end has not come, as it came: a large one comes in many pieces."""
        self._num_rest_bytes = 0

    @property
    def has_begun(self) -> bool:
        """True when some of an answer came."""
        return bool(self._parts or self._before)

    def first_body(self) -> bytes:
        """The request, of which the answer is a stream."""
        return msgspec.json.encode(self._streamed(self._asked))

    def take(self, data: bytes) -> bytes | None:
        """Bytes of the answer, cut anywhere. Returns what the client is to have of it by now; None: the replica's
        engine has died. Raises `UnreadableAnswerError`."""
        part = self._up_to_gap(data)
        if RETRYABLE_MARK in part:
            return None
        if self._num_rest_bytes > MAX_EVENT_BYTES:
            raise UnreadableAnswerError(f"an event has over {MAX_EVENT_BYTES} bytes")
        told = b"".join(map(self._as_one, _pieces(part))) if self._before and not self.is_whole else part
        if not self._is_incremental and _OF_SAMPLE in part:
            self._parts.clear()  # it repeats those before it
        self._parts.append(part)
        return told

    def _up_to_gap(self, data: bytes) -> bytes:
        """The events that are whole with these bytes; what follows them is the rest."""
        last = self._rest[-1][-1:] if self._rest else b""
        found = (last + data).rfind(_GAP)
        end = 0 if found < 0 else found + len(_GAP) - len(last)
        part = b""
        if end:
            part = b"".join((*self._rest, data[:end]))
            self._forget_rest()
        if rest := data[end:]:
            self._rest.append(rest)
            self._num_rest_bytes += len(rest)
        return part

    def _forget_rest(self) -> None:
        self._rest, self._num_rest_bytes = [], 0

    def next_body(self) -> bytes | None:
        """What to ask of another replica; None where the answer does not say what that needs."""
        found = self._joined_or_nothing()
        meta = found.get("meta_info", {})
        seed = meta.get("seed")
        self._parts = []
        self._forget_rest()
        if seed is None:
            return None
        self._before = found
        self.num_resumed += 1
        ids, params = found["output_ids"], dict(self._asked.get("sampling_params") or {})
        params.pop("seed", None)
        params["sampling_seed"] = seed
        params["max_new_tokens"] = max(0, params.get("max_new_tokens", _DEFAULT_MAX_NEW_TOKENS) - len(ids))
        params["min_new_tokens"] = max(0, params.get("min_new_tokens", 0) - len(ids))
        asked = {key: value for key, value in self._asked.items() if key not in _ASKED_ONCE}
        num_before = asked.get("num_output_ids_in_prompt", 0) + len(ids)
        asked |= {"input_ids": [*self._asked["input_ids"], *ids], "num_output_ids_in_prompt": num_before}
        return msgspec.json.encode(self._streamed({**asked, "sampling_params": params, "rid": meta["id"]}))

    @property
    def is_finished(self) -> bool:
        """True when only the end of the stream did not come."""
        if self._error is not None:
            return True
        return self._joined_or_nothing().get("meta_info", {}).get("finish_reason") is not None

    def rest(self) -> bytes:
        """What came behind the last event, of a stream that has ended."""
        return b"".join(self._rest)

    def whole(self) -> tuple[int, bytes]:
        """Status and body of the answer, once its stream has ended: that of an error, if the stream ended with one.
        Raises `UnreadableAnswerError` where it has no end."""
        if (error := self._error) is not None:
            return error["code"], msgspec.json.encode({"object": "error", **error, "error": error})
        if not self.is_finished:
            raise UnreadableAnswerError("its stream ended before the generation did")
        return _OK, msgspec.json.encode(self._joined())

    @property
    def _error(self) -> dict[str, Any] | None:
        """The error that the replica has ended its stream with, if it has."""
        if _ERROR not in b"".join(self._parts[-_NUM_LAST:]):
            return None
        found = (_error_in(piece) for part in self._parts[-_NUM_LAST:] for piece in _pieces(part))
        return next((error for error in found if error is not None), None)

    def _streamed(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "stream": True, "incremental_streaming_output": True} if self.is_whole else asked

    def _joined_or_nothing(self) -> dict[str, Any]:
        """As `_joined`; {} where it cannot be read."""
        try:
            return self._joined()
        except UnreadableAnswerError:
            return {}

    def _joined(self) -> dict[str, Any]:
        """All that came, as one answer. Raises `UnreadableAnswerError`."""
        found = (_event_of(piece) for part in self._parts for piece in _pieces(part))
        events = [event for event in found if event is not None]
        if not self._is_incremental:
            events = events[-1:]  # which repeats those before it
        return self._behind(events) if events else self._before

    def _behind(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        """What this replica's events add to what came before it, as one answer."""
        if not self._before:
            return _join(events, 0, 0)
        return _join([self._before, *events], _num_tokens(self._before), self.num_resumed)

    def _as_one(self, piece: bytes) -> bytes:
        """An event of a later replica, as if there had been one; what says nothing of a sample is passed on."""
        event = _event_of(piece)
        if event is None:
            return piece + _GAP
        told = self._behind([event])
        if self._is_incremental:
            own = {key: event["meta_info"][key] for key in _GROWING if key in event["meta_info"]}
            told |= {key: event[key] for key in ("text", "output_ids") if key in event}
            told["meta_info"] |= own
        return b"data: " + msgspec.json.encode(told) + _GAP


def resumption_of(path: str, body: bytes, mode: ResumeMode, *, streams_new: bool = False) -> Resumption | None:
    """How this request could go on elsewhere: one sample of one prompt of token ids. None for all else."""
    if path != PATH or mode == "off" or mode == "streams" and not _wants_stream(body):
        return None
    try:
        asked = msgspec.json.decode(body, type=dict[str, Any])
    except DECODE_ERRORS:
        return None
    ids, params, is_stream = asked.get("input_ids"), asked.get("sampling_params") or {}, asked.get("stream") is True
    is_one = isinstance(ids, list) and set(map(type, ids)) == {int}
    if (
        not is_one
        or not isinstance(params, dict)
        or params.get("n", 1) not in (None, 1)
        or not _are_counts(asked, params)
    ):
        return None
    if not is_stream and asked.get("stream"):
        return None
    said = asked.get("incremental_streaming_output")
    return Resumption(
        asked, is_whole=not is_stream, is_incremental=not is_stream or (streams_new if said is None else said is True)
    )


class _Wanted(msgspec.Struct):
    stream: Any = None


_decode_wanted = msgspec.json.Decoder(_Wanted).decode


def _wants_stream(body: bytes) -> bool:
    """Whether the answer is a stream; all else in `body` is passed over, which is far less work than to read it."""
    try:
        return _decode_wanted(body).stream is True
    except DECODE_ERRORS:
        return False


def _are_counts(asked: dict[str, Any], params: dict[str, Any]) -> bool:
    """Whether what is counted down is a number; what is not the replica refuses."""
    numbers = (
        asked.get("num_output_ids_in_prompt", 0),
        *(params.get(f"{name}_new_tokens", 0) for name in ("max", "min")),
    )
    return all(type(each) is int for each in numbers)


def _pieces(part: bytes) -> list[bytes]:
    """The whole events of a part."""
    return part.split(_GAP)[:-1]


def _event_of(piece: bytes) -> dict[str, Any] | None:
    """An event that says something of a sample; None for another. Raises `UnreadableAnswerError`."""
    if not piece.startswith(_EVENT) or RETRYABLE_MARK in piece:
        return None
    try:
        event = msgspec.json.decode(piece[len(b"data: ") :], type=dict[str, Any])
        if "meta_info" not in event:
            return None
        msgspec.convert(event, _Event)
    except DECODE_ERRORS as error:
        raise UnreadableAnswerError(f"an event cannot be read: {error}") from None
    return event


class _Error(msgspec.Struct):
    message: str
    code: int


def _error_in(piece: bytes) -> dict[str, Any] | None:
    """The error that an event tells of; None: it does not."""
    if not piece.startswith(_EVENT):
        return None
    try:
        event = msgspec.json.decode(piece[len(b"data: ") :], type=dict[str, Any])
        msgspec.convert(event.get("error"), _Error)
    except DECODE_ERRORS:
        return None
    error: dict[str, Any] = event["error"]
    return error if _LEAST_ERROR <= error["code"] <= _LAST_ERROR else None


def _num_tokens(answer: dict[str, Any]) -> int:
    return len(answer.get("output_ids", ()))


def _join(answers: list[dict[str, Any]], num_before: int, num_resumed: int) -> dict[str, Any]:
    """Answers that follow each other as one; the last one counts `num_before` tokens less than there are."""
    first, last = answers[0], answers[-1]
    metas = [each["meta_info"] for each in answers]
    of_prompt = {key: value for key, value in metas[0].items() if key in _OF_PROMPT or key.startswith("input_")}
    meta = {**metas[-1], **of_prompt, **_join_spans(metas)}
    if num_before and meta.get("weight_versions") is not None:
        meta["weight_versions"] = _ranges_behind(metas[0].get("version_spans", ()), num_before, metas[-1])
    meta["completion_tokens"] = num_before + metas[-1]["completion_tokens"]
    for key in _LISTS:
        if any(key in each for each in metas):
            meta[key] = [value for each in metas for value in each.get(key, ())]
    if any(_KEPT in each for each in metas):
        meta |= _join_kept(metas)
    if "output_token_logprobs" in meta:
        meta["output_token_logprobs_length"] = len(meta["output_token_logprobs"])
    reason = meta.get("finish_reason")
    if reason is not None and reason.get("type") == "length":
        meta["finish_reason"] = {**reason, "length": meta["completion_tokens"]}
    if num_resumed:
        meta["num_resumed"] = num_resumed
    told = {**last, "output_ids": [token for each in answers for token in each["output_ids"]], "meta_info": meta}
    return {**told, "text": "".join(each.get("text", "") for each in answers)} if "text" in first else told


def _join_kept(metas: list[dict[str, Any]]) -> dict[str, str]:
    """The tokens that each one could have been: int32 in base64, and from where to where those of each token are."""
    ids, offsets = b"", array.array("i", [0])
    for meta in metas:
        ids += base64.b64decode(meta.get(_KEPT, ""))
        before, own = offsets[-1], array.array("i", base64.b64decode(meta.get(_KEPT_OFFSETS, "")))
        offsets.extend(before + end for end in own[1:])
    return {_KEPT: base64.b64encode(ids).decode(), _KEPT_OFFSETS: base64.b64encode(offsets.tobytes()).decode()}


def _ranges_behind(spans: Any, num_before: int, last: dict[str, Any]) -> list[dict[str, Any]]:
    """Half-open ranges of tokens by their weights, as the last event has them: of the tokens before it, too."""
    ends = list(itertools.accumulate(num for _, num in spans))
    before = [
        {"version": version, "start": end - num, "end": end} for (version, num), end in zip(spans, ends, strict=True)
    ]
    behind = [
        {**each, "start": each["start"] + num_before, "end": each["end"] + num_before}
        for each in last["weight_versions"]
    ]
    if before and behind and before[-1]["version"] == behind[0]["version"]:
        behind[0]["start"] = before.pop()["start"]
    return before + behind


def _join_spans(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens in a row by the same weights are one span."""
    spans: list[list[Any]] = []
    epochs: list[int] = []
    for meta in metas:
        for (version, num), epoch in zip(meta.get("version_spans", ()), meta.get("version_epochs", ()), strict=False):
            if spans and (spans[-1][0], epochs[-1]) == (version, epoch):
                spans[-1] = [version, spans[-1][1] + num]
            else:
                spans.append([version, num])
                epochs.append(epoch)
    return {"version_spans": spans, "version_epochs": epochs}
