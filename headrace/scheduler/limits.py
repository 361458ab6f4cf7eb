"""What a scheduler may use, and which requests can never be served within it. Knows no state."""

from __future__ import annotations

import msgspec
import numpy as np

from headrace.types.errors import RequestError
from headrace.types.request import Int32Array, Request, check_prompt_length

MAX_PRIORITY = 1 << 20


class SchedulerLimits(msgspec.Struct, frozen=True):
    """Fixed at start. Sizes are in tokens unless the name says pages or requests; page 0 is never leased."""

    max_running_requests: int
    max_waiting_requests: int
    max_num_batched_tokens: int
    context_length: int
    page_size: int
    num_pages: int
    prefix_cache: bool
    overlap_depth: int
    vocab_size: int

    @property
    def num_usable_pages(self) -> int:
        """Pages that sequences can hold."""
        return self.num_pages - 1

    @property
    def max_total_num_tokens(self) -> int:
        """Tokens the KV pool can hold."""
        return self.num_usable_pages * self.page_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that fits both context and pool; the KV of a last token is never computed."""
        return min(self.context_length, self.max_total_num_tokens + 1)

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once: each needs a page."""
        return min(self.max_running_requests, self.num_usable_pages)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens`."""
        return -(-num_tokens // self.page_size)


def max_output(request: Request, num_prompt: int, limits: SchedulerLimits) -> int:
    """Most tokens this request may generate: what it asks, cut at the context."""
    return min(request.max_new_tokens, limits.context_length - num_prompt)


def read_prompt(request: Request, limits: SchedulerLimits, like: Request | None = None) -> Int32Array:
    """The prompt's token ids, int32, after checking that the request can be served at all. Of what it shares with
    `like`, which was checked before, long lists are not looked through again.

    Raises `RequestError` naming the field of `Request` that makes it impossible.
    """
    _require(len(request.prompt) % 4 == 0, "prompt", "must be int32 token ids")
    prompt = np.frombuffer(request.prompt, dtype="<i4")
    num_prompt = len(prompt)
    check_prompt_length(num_prompt, limits.context_length, "prompt")
    _require(
        int(prompt.min()) >= 0 and int(prompt.max()) < limits.vocab_size,
        "prompt",
        f"holds token ids outside the vocabulary of {limits.vocab_size}",
    )
    _require(request.max_new_tokens >= 0, "max_new_tokens", "must not be negative")
    _check_pool(request, num_prompt, limits)
    _check_options(request, num_prompt, limits)
    if like is None or like.logprobs is not request.logprobs or like.sampling is not request.sampling:
        _check_lists(request, limits.vocab_size)
    return prompt


def _check_pool(request: Request, num_prompt: int, limits: SchedulerLimits) -> None:
    """Alone in the pool, a sequence must be able to reach its last token."""
    capacity = limits.max_total_num_tokens
    _require(num_prompt - 1 <= capacity, "prompt", f"has {num_prompt} tokens; the KV pool holds {capacity}")
    needed = num_prompt + max_output(request, num_prompt, limits) - 1
    _require(
        needed <= capacity,
        "max_new_tokens",
        f"and the prompt need {needed} tokens of KV; the pool holds {capacity}",
    )


def _check_options(request: Request, num_prompt: int, limits: SchedulerLimits) -> None:
    logprobs = request.logprobs
    vocab_size = limits.vocab_size
    _require(abs(request.priority) <= MAX_PRIORITY, "priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    _require(request.min_new_tokens >= 0, "min_new_tokens", "must not be negative")
    _require(request.deliver_every >= 0, "deliver_every", "must not be negative")
    num_output = request.num_output_ids_in_prompt
    _require(0 <= num_output < num_prompt, "num_output_ids_in_prompt", f"must be in [0, {num_prompt - 1}]")
    start = logprobs.prompt_start
    _require(start is None or 0 <= start <= num_prompt, "logprobs.prompt_start", "must be a position of the prompt")
    _require(0 <= logprobs.num_top <= vocab_size, "logprobs.num_top", f"must be in [0, {vocab_size}]")


def _check_lists(request: Request, vocab_size: int) -> None:
    are_known = all(0 <= token < vocab_size for token in request.logprobs.token_ids)
    _require(are_known, "logprobs.token_ids", "must be in the vocabulary")
    _require(
        all(0 <= token < vocab_size for token, _ in request.sampling.logit_bias),
        "sampling.logit_bias",
        "must name ids in the vocabulary",
    )


def _require(is_met: bool, field: str, rule: str) -> None:
    if not is_met:
        raise RequestError(f"{field} {rule}", field=field)
