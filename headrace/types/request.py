"""What the core is asked for and what it answers. Token ids only: text never reaches the core.

Arrays travel as raw little-endian bytes (`int32` token ids, `float32` log-probabilities), so that a message costs one
copy whatever its length. `pack_ids`, `unpack_ids` and `unpack_floats` convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.types.errors import ErrorInfo, RequestError
from headrace.types.sampling_params import LogprobOptions

Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
FinishType = Literal["stop", "length", "abort", "error"]
Version = str
DEFAULT_VERSION: Version = "default"


def pack_ids(token_ids: Sequence[int] | Int32Array) -> bytes:
    """Token ids as little-endian int32 bytes."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> Int32Array:
    """The int32 array (read-only view) behind `pack_ids`."""
    return np.frombuffer(data, dtype="<i4")


def unpack_floats(data: bytes) -> Float32Array:
    """Log-probabilities as a float32 array, a read-only view."""
    return np.frombuffer(data, dtype="<f4")


def check_prompt_length(num_tokens: int, context_length: int, field: str) -> None:
    """Raise `RequestError` naming the field if so many tokens are no prompt or not within the context."""
    if not 0 < num_tokens <= context_length:
        what = f"has {num_tokens} tokens, over the context of {context_length}" if num_tokens else "is empty"
        raise RequestError(f"{field} {what}", field=field)


class TokenSampling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The part of `SamplingParams` that acts on logits. `top_k` 0 is off; `temperature` below 1e-6 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def has_penalties(self) -> bool:
        """True when logits depend on the tokens already seen."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def truncates(self) -> bool:
        """True when top-k, top-p or min-p leave some tokens no probability."""
        return bool(self.top_k) or self.top_p < 1.0 or self.min_p > 0.0


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One sequence to generate. The front expands `n` and batches into single requests and derives their seeds.

    `handle` names its front (`types/handles.py`) and is unique among its live requests. `stop_token_ids` already holds
    the end-of-sequence ids unless they are ignored. `extra_key` keeps prefix-cache entries apart. `deliver_every` is
    how many new tokens make a non-terminal `Delta`; 0 delivers only the terminal one.
    The last `num_output_ids_in_prompt` ids of `prompt` are output of an earlier request, and penalties count them so.
    """

    handle: int
    request_id: str
    prompt: bytes
    max_new_tokens: int
    seed: int
    sampling: TokenSampling = TokenSampling()
    logprobs: LogprobOptions = LogprobOptions()
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    priority: int = 0
    extra_key: str = ""
    deliver_every: int = 0
    num_output_ids_in_prompt: int = 0


class Sibling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that is the one before it but for these fields; without a `prompt` it has the same."""

    handle: int
    request_id: str
    seed: int
    prompt: bytes = b""

    @classmethod
    def between(cls, last: Request, request: Request) -> Sibling | None:
        """What makes `request` of `last`; None if that takes more. Shared parts are told by their identity."""
        is_shared = all(getattr(last, name) is getattr(request, name) for name in _SHARED_PARTS)
        if not is_shared or any(getattr(last, name) != getattr(request, name) for name in _EQUAL_PARTS):
            return None
        prompt = b"" if request.prompt is last.prompt else request.prompt
        return cls(request.handle, request.request_id, request.seed, prompt)

    def after(self, last: Request) -> Request:
        """The request that differs from `last` by this; what they share stays one object."""
        prompt = self.prompt or last.prompt
        request: Request = msgspec.structs.replace(
            last, handle=self.handle, request_id=self.request_id, seed=self.seed, prompt=prompt
        )
        return request


_SHARED_PARTS = ("sampling", "logprobs", "stop_token_ids")
_EQUAL_PARTS = tuple(
    name for name in Request.__struct_fields__ if name not in (*Sibling.__struct_fields__, *_SHARED_PARTS)
)


class Finish(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why a request ended. `matched` is the stop token id that ended it; `error` is set for type "error" only."""

    type: FinishType
    matched: int | None = None
    message: str = ""
    error: ErrorInfo | None = None


class TokenExtras(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What else was asked of n positions, row by row: the top ids (int32 [n, num_top]) with their log-probabilities
    (float32), those of the asked ids (float32 [n, num_asked]), and how many ids could have been drawn (int32 [n]), with
    the ids (int32, as many as all of these). Empty where nothing was asked."""

    top_ids: bytes = b""
    top_logprobs: bytes = b""
    asked_logprobs: bytes = b""
    kept_counts: bytes = b""
    kept_ids: bytes = b""


class RoutedPart(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The experts that n tokens in a row were given to: little-endian int16 [n, layers, experts per token]."""

    num_layers: int = 0
    num_per_token: int = 0
    experts: bytes = b""

    def joined(self, later: RoutedPart) -> RoutedPart:
        """These positions and those that follow them."""
        if not (self.experts and later.experts):
            return self if self.experts else later
        return RoutedPart(self.num_layers, self.num_per_token, self.experts + later.experts)


class Delta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is new about one request since its last `Delta`.

    `token_ids` (int32) and `logprobs` (float32) have one entry per new token and `spans` ((version, count), ...) sum to
    that number; `span_epochs` has the weight epoch of each. `extras` has one row per new token, if any was asked for.
    `prompt_logprobs` (float32, once, in the first delta after the prompt is computed or in the terminal one) covers
    positions `prompt_start`.. of the prompt, NaN where a position has none; `prompt_extras` has as many rows, of no
    meaning there. `prompt_spans` ((version, count), ...) name who scored the prompt, from position 0 on; a request for
    no tokens has them whatever it asked. `times` are when the request was started and had its first token (0: not yet),
    in seconds of CLOCK_MONOTONIC, in its first delta and its last. `routed` are the experts of further positions, from
    where they were asked for on, up to the one before the last token. `finish` is set exactly once per request, on
    its last delta.
    """

    handle: int
    token_ids: bytes = b""
    logprobs: bytes = b""
    spans: tuple[tuple[Version, int], ...] = ()
    finish: Finish | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    extras: TokenExtras = TokenExtras()
    prompt_logprobs: bytes = b""
    prompt_extras: TokenExtras = TokenExtras()
    span_epochs: tuple[int, ...] = ()
    prompt_spans: tuple[tuple[Version, int], ...] = ()
    times: tuple[float, ...] = ()
    routed: RoutedPart = RoutedPart()

    @classmethod
    def failed(cls, handle: int, error: ErrorInfo) -> Delta:
        """The terminal delta of a request of which there is nothing but an error."""
        return cls(handle, finish=Finish("error", message=error.message, error=error))
