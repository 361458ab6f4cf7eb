"""The answer of `/generate`, SGLang's dialect: one object per sequence, whole or growing. Owns its spelling only."""

from __future__ import annotations

import base64
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.engine import Stream
from headrace.engine.sample import extend_spans
from headrace.server.errors import body_of
from headrace.server.wire import encode_json
from headrace.text import Tokenizer
from headrace.types.generation import Generation, Times


class ReplyStyle(msgspec.Struct, frozen=True):
    """What the replies of one call have in common. `tokenizer` writes texts beside logprobs, None writes null.

    `received_at` is in seconds of `time.perf_counter`; `live_version` labels a reply of which nothing was computed.
    `num_moves` is how often the call has gone on at another replica.
    """

    has_text: bool
    tokenizer: Tokenizer | None
    live_version: Callable[[], str]
    received_at: float
    writes_prompt_ids: bool = False
    warnings: Sequence[str] = ()
    num_moves: int = 0


class SequenceReply:
    """The reply to one sequence: `add` pieces, `body` says everything added; of an incremental one, what the last piece
    brought, beside `completion_tokens`, `weight_version` and `weight_versions`, which are of the whole."""

    def __init__(
        self, style: ReplyStyle, stream: Stream, wants_logprobs: bool, *, is_incremental: bool = False
    ) -> None:
        self._style = style
        self._stream = stream
        self._wants_logprobs = wants_logprobs
        self._is_incremental = is_incremental
        self._text: list[str] = []
        self._ids: list[int] = []
        self._lists: dict[str, list[Any]] = {}
        self._spans: list[tuple[str, int]] = []
        self._epochs: list[int] = []
        self._whole_spans: list[tuple[str, int]] = []  # of what earlier pieces brought, too
        self._whole_epochs: list[int] = []
        self._prompt_spans: list[tuple[str, int]] = []
        self._last_version: str | None = None
        self._num_tokens = 0
        self._keeps = stream.item.logprobs.max_kept > 0
        self._kept: list[list[int]] = []
        if wants_logprobs:
            self._lists = {"input_token_logprobs": [], "output_token_logprobs": []}

    def add(self, piece: Generation) -> None:
        if self._is_incremental:
            self._take(piece)
        else:
            self._extend(piece)
        self._num_tokens += len(piece.token_ids)
        spans = piece.version_spans or piece.prompt_version_spans
        if spans:
            self._last_version = spans[-1][0]
        extend_spans(self._whole_spans, self._whole_epochs, piece)
        if self._wants_logprobs:
            self._add_logprobs(piece)

    def _take(self, piece: Generation) -> None:
        """Nothing but this piece is to be said. Its lists stay its own: nothing is added to them."""
        self._text = [piece.text]
        self._ids = piece.token_ids
        self._spans, self._epochs = piece.version_spans, piece.version_epochs
        self._prompt_spans = piece.prompt_version_spans
        self._kept = piece.kept_token_ids
        for values in self._lists.values():
            values.clear()

    def _extend(self, piece: Generation) -> None:
        self._text.append(piece.text)
        self._ids += piece.token_ids
        extend_spans(self._spans, self._epochs, piece)
        self._prompt_spans = piece.prompt_version_spans or self._prompt_spans
        self._kept += piece.kept_token_ids

    def body(self, piece: Generation) -> dict[str, Any]:
        """The object to send; `piece` is the last one added."""
        meta: dict[str, Any] = {
            "id": piece.request_id,
            "finish_reason": finish_reason(piece, self._num_tokens),
            "prompt_tokens": piece.num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "cached_tokens": piece.num_cached_tokens,
            "reasoning_tokens": 0,
            "weight_version": self._last_version or self._style.live_version(),  # the latter of nothing computed
            "weight_versions": None if piece.finish_reason is None else weight_versions(self._whole_spans),
            "num_retractions": piece.num_preemptions,
            "dp_rank": 0,
            "version_spans": self._spans,
            "version_epochs": self._epochs,
            "seed": piece.seed,
            "logprob_mode": piece.logprob_mode,
            "prompt_logprob_mode": piece.prompt_logprob_mode,
        }
        if self._prompt_spans:
            meta["prompt_version_spans"] = self._prompt_spans
        if self._style.num_moves:
            meta["num_resumed"] = self._style.num_moves
        if self._style.warnings:
            meta["warnings"] = self._style.warnings
        if self._style.writes_prompt_ids:
            meta["prompt_token_ids"] = self._stream.prompt_token_ids
        if self._wants_logprobs:
            meta.update(self._lists)
            meta["output_token_logprobs_length"] = len(self._lists["output_token_logprobs"])
        if self._keeps:
            meta.update(top_p_fields(self._kept))
        if piece.routed_experts is not None:
            meta["routed_experts"] = _base64(piece.routed_experts.array().astype("<i4", copy=False))
        if piece.finish_reason is not None:
            meta["e2e_latency"] = time.perf_counter() - self._style.received_at
            meta["response_sent_to_client_ts"] = time.time()
            if piece.times is not None:
                meta.update(_times(piece.times, self._num_tokens))
        reply: dict[str, Any] = {"output_ids": self._ids, "meta_info": meta}
        return {"text": "".join(self._text), **reply} if self._style.has_text else reply

    def _add_logprobs(self, piece: Generation) -> None:
        pairs = zip(piece.logprobs, piece.token_ids, strict=True)
        if self._style.tokenizer is None:
            self._lists["output_token_logprobs"] += [(logprob, token_id, None) for logprob, token_id in pairs]
        else:
            self._lists["output_token_logprobs"] += [self._triple(logprob, token_id) for logprob, token_id in pairs]
        self._extend_list("output_top_logprobs", piece.top_logprobs)
        self._extend_list("output_token_ids_logprobs", piece.token_ids_logprobs)
        if piece.prompt_logprobs:
            start = self._stream.item.logprobs.prompt_start or 0
            scored = zip(piece.prompt_logprobs[start:], self._stream.prompt_token_ids[start:], strict=True)
            self._lists["input_token_logprobs"] += [self._triple(logprob, token_id) for logprob, token_id in scored]
            self._extend_list("input_top_logprobs", piece.prompt_top_logprobs[start:])
            self._extend_list("input_token_ids_logprobs", piece.prompt_token_ids_logprobs[start:])

    def _extend_list(self, key: str, positions: Sequence[Mapping[int, float] | None]) -> None:
        if positions:
            self._lists.setdefault(key, []).extend(map(self._written, positions))

    def _written(self, values: Mapping[int, float] | None) -> msgspec.Raw | None:
        """The triples of one position as JSON already: an eighth of what they take as objects."""
        if values is None:
            return None
        return msgspec.Raw(encode_json([self._triple(value, token_id) for token_id, value in values.items()]))

    def _triple(self, logprob: float | None, token_id: int) -> tuple[float | None, int, str | None]:
        tokenizer = self._style.tokenizer
        return logprob, token_id, None if tokenizer is None else tokenizer.token_text(token_id)


def top_p_fields(kept: Sequence[Sequence[int]]) -> dict[str, str]:
    """The tokens that each one could have been as slime reads them: base64 of int32, those of token i at
    offsets[i]..offsets[i + 1]."""
    counts = list(map(len, kept))
    ids = np.fromiter(itertools.chain.from_iterable(kept), "<i4", sum(counts))
    offsets = np.cumsum([0, *counts]).astype("<i4")
    return {"top_p_token_ids": _base64(ids), "top_p_token_offsets": _base64(offsets)}


def _base64(values: npt.NDArray[np.int32]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def weight_versions(spans: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Spans as SGLang writes them: half-open ranges of a sample's generated tokens."""
    found, start = [], 0
    for version, num_tokens in spans:
        found.append({"version": version, "start": start, "end": start + num_tokens})
        start += num_tokens
    return found


def _times(times: Times, num_tokens: int) -> dict[str, float]:
    """By the names that SGLang has for them, as far as they happened."""
    found = {"request_received_ts": times.queued, "request_finished_ts": times.ended}
    if times.started:
        found |= {"queue_time": times.started - times.queued, "forward_entry_time": times.started}
    if times.first_token:
        found["prefill_finished_time"] = times.first_token
        seconds = times.ended - times.first_token
        if num_tokens > 1 and seconds > 0:
            found["decode_throughput"] = (num_tokens - 1) / seconds
    return found


def finish_reason(piece: Generation, num_tokens: int) -> dict[str, Any] | None:
    """Why a sequence ended; None while it has not."""
    if piece.finish_reason is None:
        return None
    if piece.finish_reason == "stop":
        return {"type": "stop", "matched": piece.matched}
    if piece.finish_reason == "length":
        return {"type": "length", "length": num_tokens}
    if piece.error is not None:
        detail = body_of(piece.error.to_exception())["error"]
        reason = {"type": "abort", "message": detail["message"], "status_code": detail["code"]}
        return {**reason, "err_type": piece.error.code, "param": detail["param"], "retryable": detail["retryable"]}
    return {"type": "abort", "message": piece.finish_message or "Aborted", "status_code": None, "err_type": None}
