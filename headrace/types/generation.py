"""What a caller of the Python API gets back. Values only."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.types.errors import ErrorInfo, RequestError
from headrace.types.sampling_params import LogprobMode

FinishReason = Literal["stop", "length", "abort", "error"]


class Times(msgspec.Struct, frozen=True, eq=False, gc=False):
    """When things happened to a sample, in seconds since the epoch, as `time.time()` counts; 0.0: it did not happen.

    queued         the engine took the request
    started        its computing began: it left the queue
    first_token    its first token was there, in the engine
    ended          its last was, and the caller could have it

    Differences are those of a clock that nobody sets. All are equal to each other: when a sample came is no part of
    what it is, and samples are compared.
    """

    queued: float
    started: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Times)

    def __hash__(self) -> int:
        return hash(Times)


def times_of(queued: float, between: tuple[float, ...], ended: float) -> Times:
    """Of moments of `time.monotonic`, which all processes of a machine share; `between` as in `Delta.times`."""
    offset = time.time() - time.monotonic()
    return Times(*(moment + offset if moment else 0.0 for moment in (queued, *(between or (0.0, 0.0)), ended)))


class RoutedExperts(msgspec.Struct, frozen=True):
    """The experts that tokens were given to, in every layer: of each token from position `start` on but the last, which
    was not computed. `experts` are little-endian int16 [tokens, num_layers, num_per_token]."""

    start: int
    num_layers: int
    num_per_token: int
    experts: bytes

    def array(self) -> npt.NDArray[np.int32]:
        """int32 [tokens, num_layers, num_per_token], the most probable first; 0 in layers that have no experts."""
        found = np.frombuffer(self.experts, "<i2").reshape(-1, self.num_layers, self.num_per_token)
        return found.astype(np.int32)


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One finished sample, or (from `stream`) what is new about one since the last piece.

    token_ids, logprobs   generated ids, the stop token included, and one log-probability each (natural log)
    version_spans         ((version, num_tokens), ...), in order, summing to len(token_ids)
    version_epochs        the weight epoch of each span: it grows with every update, also if a label is given again
    prompt_version_spans  ((version, num_tokens), ...) of the prompt's positions, from the first on, by the weights that
                          scored them; only with prompt_logprobs or for no new tokens. They sum to num_prompt_tokens
                          unless the request was aborted before all were scored
    routed_experts        with `return_routed_experts` the experts of the prompt's and the generated tokens, once it has
                          ended; None if not asked, or if it ended before its prompt was computed
    prompt_logprobs       one per prompt token, None where there is none (always the first); [] if not asked
    top_logprobs          per generated token {id: logprob} of the most probable ids; [] if not asked
    token_ids_logprobs    per generated token {id: logprob} of the asked ids; [] if not asked
    kept_token_ids        per generated token the ids that it could have been, in ascending order: those that bias,
                          masks, top-k, top-p and min-p left (greedy: itself); [] if not asked
    prompt_top_logprobs, prompt_token_ids_logprobs   the same per prompt token (None where there is none)
    finish_reason         "stop" | "length" | "abort" | "error" (with `return_errors` only); None on a stream piece that
                          is not the last
    error                 what ended it with finish reason "error": its `to_exception()` is what would have been raised
    matched               the stop token id or stop string that ended it
    times                 when it was queued, started, had its first token and ended; None on a stream piece that is not
                          the last
    seed                  the seed this sample was drawn with; the same request with it draws the same noise, and
                          under numerics="invariant" gives the same sample, whatever runs beside it; None where the
                          request was refused, so that nothing was to be drawn
    """

    request_id: str
    index: int = 0
    prompt_index: int = 0
    token_ids: list[int]
    text: str = ""
    logprobs: list[float]
    logprob_mode: LogprobMode = "temperature"
    prompt_logprob_mode: LogprobMode = "raw"
    top_logprobs: list[dict[int, float]] = []
    token_ids_logprobs: list[dict[int, float]] = []
    kept_token_ids: list[list[int]] = []
    routed_experts: RoutedExperts | None = None
    prompt_logprobs: list[float | None] = []
    prompt_top_logprobs: list[dict[int, float] | None] = []
    prompt_token_ids_logprobs: list[dict[int, float] | None] = []
    finish_reason: FinishReason | None = None
    matched: int | str | None = None
    finish_message: str = ""
    error: ErrorInfo | None = None
    version_spans: list[tuple[str, int]] = []
    version_epochs: list[int] = []
    prompt_version_spans: list[tuple[str, int]] = []
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    times: Times | None = None
    seed: int | None = None

    def to_json(self) -> bytes:
        """One line of JSON, from which `from_json` makes an equal value: names are those here, keys of objects strings.
        JSON has no infinite number: such a log-probability is "-inf"."""
        return msgspec.json.encode(_finite(msgspec.to_builtins(self, str_keys=True)))

    @classmethod
    def from_json(cls, data: bytes | str) -> Generation:
        """What `to_json` wrote. Names that it does not know are left out. Raises `RequestError` naming the field."""
        try:
            return msgspec.json.decode(data, type=cls, strict=False)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise RequestError(f"json is no generation: {error}", field="json") from None


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """One reply to a conversation.

    message           {"role": "assistant", "content": text or None, "tool_calls": [...] where it has some}, in OpenAI's
                      form: append it to the conversation. Where a final message was continued, what is new only
    finish_reason     that of `sample`, or "tool_calls" where it stopped with calls
    sample            the tokens and log-probabilities; `prompt_index` says of which conversation
    prompt_token_ids  what the chat template made of the conversation; [] where it failed
    """

    message: dict[str, Any]
    finish_reason: str
    sample: Generation
    prompt_token_ids: list[int]


def _finite(value: Any) -> Any:
    """The same JSON-like value with numbers that are not finite as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
