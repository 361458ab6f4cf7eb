"""What came of a step, as ranks tell each other: as a number that they compare, and, from the last stage to rank 0, as
bytes. Owns what is told apart, every token and bit of a log-probability, and the form of the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import msgspec
import numpy as np

from headrace.types.plan import PositionLogprobs, PromptLogprobs, StepResult
from headrace.types.request import Float32Array, Int32Array


def digest_of(result: StepResult) -> int:
    """32 bits over all of a result. Some microseconds."""
    found = crc32(result.logprobs.tobytes(), crc32(result.token_ids.tobytes(), crc32(result.num_tokens.tobytes())))
    if result.extras or result.prompt_logprobs or result.routed:
        for array in _further(result):
            found = crc32(np.ascontiguousarray(array).tobytes(), found)
    return found


def _further(result: StepResult) -> Iterator[np.ndarray]:
    for _, extra in sorted(result.extras.items()):
        yield from (extra.top_ids, extra.top_logprobs, extra.asked_logprobs, extra.kept_counts, extra.kept_ids)
    for _, prompt in sorted(result.prompt_logprobs.items()):
        yield prompt.logprobs
    for _, routed in sorted(result.routed.items()):
        yield routed.experts


class _Extra(msgspec.Struct, frozen=True, array_like=True):
    """A `PositionLogprobs` of so many positions."""

    num_positions: int
    top_ids: bytes
    top_logprobs: bytes
    asked_logprobs: bytes
    kept_ids: bytes
    kept_counts: bytes

    @classmethod
    def of(cls, extra: PositionLogprobs) -> _Extra:
        arrays = extra.top_ids, extra.top_logprobs, extra.asked_logprobs, extra.kept_ids, extra.kept_counts
        return cls(len(extra.top_ids), *(each.tobytes() for each in arrays))

    def taken(self) -> PositionLogprobs:
        top_ids = np.frombuffer(self.top_ids, np.int32).reshape(self.num_positions, -1)
        floats = (np.frombuffer(each, np.float32) for each in (self.top_logprobs, self.asked_logprobs))
        top_logprobs, asked_logprobs = (each.reshape(self.num_positions, -1) for each in floats)
        kept_ids, kept_counts = (np.frombuffer(each, np.int32) for each in (self.kept_ids, self.kept_counts))
        return PositionLogprobs(top_ids, top_logprobs, asked_logprobs, kept_ids, kept_counts)


class _Prompt(msgspec.Struct, frozen=True, array_like=True):
    """A `PromptLogprobs`."""

    first: int
    logprobs: bytes
    extra: _Extra | None

    @classmethod
    def of(cls, prompt: PromptLogprobs) -> _Prompt:
        extra = None if prompt.extras is None else _Extra.of(prompt.extras)
        return cls(prompt.first, prompt.logprobs.tobytes(), extra)

    def taken(self) -> PromptLogprobs:
        extra = None if self.extra is None else self.extra.taken()
        return PromptLogprobs(self.first, np.frombuffer(self.logprobs, np.float32), extra)


class ResultOn(msgspec.Struct, frozen=True, array_like=True):
    """What came of plan `number` of those sent, where it was sampled. A step that failed there has no `step_id`."""

    number: int
    step_id: int | None = None
    token_ids: bytes = b""
    logprobs: bytes = b""
    num_tokens: bytes = b""
    extras: dict[int, _Extra] = {}
    prompts: dict[int, _Prompt] = {}

    @classmethod
    def of(cls, number: int, result: StepResult) -> ResultOn:
        return cls(
            number=number,
            step_id=result.step_id,
            token_ids=result.token_ids.tobytes(),
            logprobs=result.logprobs.tobytes(),
            num_tokens=result.num_tokens.tobytes(),
            extras={row: _Extra.of(extra) for row, extra in result.extras.items()},
            prompts={row: _Prompt.of(each) for row, each in result.prompt_logprobs.items()},
        )

    def taken(self) -> StepResult | None:
        """The result; None of a step that failed."""
        if self.step_id is None:
            return None
        num_tokens: Int32Array = np.frombuffer(self.num_tokens, np.int32)
        shape = len(num_tokens), -1 if len(num_tokens) else 1
        token_ids: Int32Array = np.frombuffer(self.token_ids, np.int32).reshape(shape)
        logprobs: Float32Array = np.frombuffer(self.logprobs, np.float32).reshape(shape)
        prompts = {row: prompt.taken() for row, prompt in self.prompts.items()}
        extras = {row: extra.taken() for row, extra in self.extras.items()}
        return StepResult(self.step_id, token_ids, logprobs, num_tokens, extras, prompts)


encode_result = msgspec.msgpack.Encoder().encode
result_decoder = msgspec.msgpack.Decoder(ResultOn)
