"""What a scheduler may use, and which requests can never be served within it. Knows no state."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from headrace.types.errors import RequestError
from headrace.types.request import Int32Array, Request, check_prompt_length

MAX_PRIORITY = 1 << 20

FEW_ROWS = 128
"""Running sequences that may wait for a large step of prompts: more would lose more than prompts gain."""


class SchedulerLimits(msgspec.Struct, frozen=True):
    """Fixed at start. Sizes are in tokens unless the name says pages or requests; page 0 is never leased.
    While FEW_ROWS run at most, a step has `prefill_step_tokens`, if that is more.
    `max_page_moves` are copied to the host, and from it, beside one step at most. With several cohorts the rows that
    sample take turns, and none is in two steps at once: an unknown token is nobody's input. Where rows decode, the rest
    of a step costs `max_step_cost` at most (0: anything), as `StepBudget` counts by `attended_per_token`."""

    max_running_requests: int
    max_waiting_requests: int
    max_num_batched_tokens: int
    context_length: int
    page_size: int
    num_pages: int
    prefix_cache: bool
    overlap_depth: int
    vocab_size: int
    num_host_pages: int = 0
    max_page_moves: int = 1
    num_cohorts: int = 1
    prefill_step_tokens: int = 0
    max_step_cost: int = 0
    attended_per_token: int = 1

    @property
    def max_total_num_tokens(self) -> int:
        """Tokens the KV pool can hold."""
        return (self.num_pages - 1) * self.page_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that fits both context and pool; the KV of a last token is never computed."""
        return min(self.context_length, self.max_total_num_tokens + 1)

    @property
    def lends_host_room(self) -> bool:
        """Sequences may run that the pool will not hold to their ends: the host's memory keeps what waits meanwhile.
        Less than half as much as the pool would soon be full, and the rest be computed again."""
        return 2 * self.num_host_pages >= self.num_pages

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once: each needs a page."""
        return min(self.max_running_requests, self.num_pages - 1)

    @property
    def max_served(self) -> int:
        """Sequences that may run at once so that a step has a token for each: more would wait for others to end."""
        few = min(FEW_ROWS, self.num_cohorts * self.prefill_step_tokens)
        return max(self.num_cohorts * self.max_num_batched_tokens, few)

    def step_tokens(self, num_running: int) -> int:
        """The token budget of a step."""
        few = self.prefill_step_tokens if num_running <= FEW_ROWS else 0
        return max(self.max_num_batched_tokens, few)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


def max_output(request: Request, num_prompt: int, limits: SchedulerLimits) -> int:
    """Most tokens this request may generate: what it asks, cut at the context."""
    return min(request.max_new_tokens, limits.context_length - num_prompt)


def read_prompt(request: Request, limits: SchedulerLimits, like: Request | None = None) -> Int32Array:
    """The prompt's token ids, int32, after checking that the request can be served at all. Of what it shares with
    `like`, which was checked before, long lists are not looked through again.

    Raises `RequestError` naming the field of `Request` that makes it impossible.
    """
    if len(request.prompt) % 4:
        raise RequestError("prompt must be int32 token ids", field="prompt")
    prompt = np.frombuffer(request.prompt, dtype="<i4")
    check_prompt_length(len(prompt), limits.context_length, "prompt")
    is_like = like is not None and like.logprobs is request.logprobs and like.sampling is request.sampling
    for field, rule in _problems(request, prompt, limits, has_new_lists=not is_like):
        raise RequestError(f"{field} {rule}", field=field)
    return prompt


def _problems(
    request: Request, prompt: Int32Array, limits: SchedulerLimits, *, has_new_lists: bool
) -> Iterator[tuple[str, str]]:
    """(field, the rule that it breaks)."""
    num_prompt, capacity, logprobs = len(prompt), limits.max_total_num_tokens, request.logprobs
    if prompt.min() < 0 or prompt.max() >= limits.vocab_size:
        yield "prompt", f"holds token ids outside the vocabulary of {limits.vocab_size}"
    for name in ("max_new_tokens", "min_new_tokens", "deliver_every"):
        if getattr(request, name) < 0:
            yield name, "must not be negative"
    if num_prompt - 1 > capacity:
        yield "prompt", f"has {num_prompt} tokens; the KV pool holds {capacity}"
    needed = num_prompt + max_output(request, num_prompt, limits) - 1
    if needed > capacity:  # alone in the pool, a sequence must be able to reach its last token
        yield "max_new_tokens", f"and the prompt need {needed} tokens of KV; the pool holds {capacity}"
    if abs(request.priority) > MAX_PRIORITY:
        yield "priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]"
    if not 0 <= request.num_output_ids_in_prompt < num_prompt:
        yield "num_output_ids_in_prompt", f"must be in [0, {num_prompt - 1}]"
    if logprobs.prompt_start is not None and not 0 <= logprobs.prompt_start <= num_prompt:
        yield "logprobs.prompt_start", "must be a position of the prompt"
    if not 0 <= logprobs.num_top <= limits.vocab_size:
        yield "logprobs.num_top", f"must be in [0, {limits.vocab_size}]"
    if not has_new_lists:
        return
    asked, biased = logprobs.token_ids, dict(request.sampling.logit_bias)
    if min(asked, default=0) < 0 or max(asked, default=0) >= limits.vocab_size:
        yield "logprobs.token_ids", "must be in the vocabulary"
    if min(biased, default=0) < 0 or max(biased, default=0) >= limits.vocab_size:
        yield "sampling.logit_bias", "must name ids in the vocabulary"
