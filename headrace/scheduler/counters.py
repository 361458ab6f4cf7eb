"""Counts of what the scheduler has done since start. Owns nothing else."""

from __future__ import annotations

import msgspec


class Counters(msgspec.Struct):
    """Monotone totals, by the names that `Scheduler.metrics` reports.

    num_prefill_tokens    computed positions of prompts, and of outputs computed again
    num_decode_tokens     computed positions of outputs, one a step
    num_generated_tokens  tokens accepted as output; num_overshoot_tokens were sampled too late and dropped
    num_cached_tokens     prompt tokens found in the prefix cache on first admission, out of num_prompt_tokens
    num_resumed_tokens    tokens found there when a preempted sequence was admitted again
    num_shared_prefills   requests admitted with a prefix hit
    num_chunked_prompts   admissions whose known tokens did not fit one step
    num_failed_steps      plans that were not executed; num_isolated_failures requests were found to be the cause
    num_nonfinite         requests that ended because their logits were not finite
    num_invariant_breaches   times the scheduler found its own books wrong and made new ones
    """

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_generated_tokens: int = 0
    num_overshoot_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_resumed_tokens: int = 0
    num_shared_prefills: int = 0
    num_chunked_prompts: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_failed_steps: int = 0
    num_isolated_failures: int = 0
    num_nonfinite: int = 0
    num_invariant_breaches: int = 0
