"""What came of a step, as a number that ranks compare. Owns what is told apart: every token and bit of a
log-probability."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import numpy as np

from headrace.types.plan import StepResult


def digest_of(result: StepResult) -> int:
    """32 bits over all of a result. Some microseconds."""
    found = crc32(result.logprobs.tobytes(), crc32(result.token_ids.tobytes(), crc32(result.num_tokens.tobytes())))
    if result.extras or result.prompt_logprobs:
        for array in _further(result):
            found = crc32(np.ascontiguousarray(array).tobytes(), found)
    return found


def _further(result: StepResult) -> Iterator[np.ndarray]:
    for _, extra in sorted(result.extras.items()):
        yield from (extra.top_ids, extra.top_logprobs, extra.asked_logprobs)
    for _, prompt in sorted(result.prompt_logprobs.items()):
        yield prompt.logprobs
