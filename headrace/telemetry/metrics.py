"""The engine's counters and gauges by name, with their meaning: the one list that code, `/metrics` and docs share."""

from __future__ import annotations

from typing import Literal

import msgspec


class MetricSpec(msgspec.Struct, frozen=True):
    """One number of `Engine.metrics()`. A counter never falls while the core lives; a gauge is a present amount."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("num_steps", "counter", "forward steps run"),
    MetricSpec("num_scheduled_tokens", "counter", "tokens computed in all steps"),
    MetricSpec("num_prefill_tokens", "counter", "prompt and recomputed tokens computed"),
    MetricSpec("num_decode_tokens", "counter", "tokens computed one at a time after a sampled token"),
    MetricSpec("num_generated_tokens", "counter", "tokens sampled and kept"),
    MetricSpec("num_overshoot_tokens", "counter", "tokens sampled too late and dropped"),
    MetricSpec("num_prompt_tokens", "counter", "prompt tokens of admitted requests"),
    MetricSpec("num_cached_tokens", "counter", "prompt tokens taken from the prefix cache"),
    MetricSpec("num_resumed_tokens", "counter", "tokens taken from the prefix cache when a request was admitted again"),
    MetricSpec("num_shared_prefills", "counter", "requests admitted with a prefix hit"),
    MetricSpec("num_finished", "counter", "requests that ended with stop or length"),
    MetricSpec("num_aborted", "counter", "requests that ended with abort"),
    MetricSpec("num_failed", "counter", "requests that ended with error"),
    MetricSpec("num_failed_steps", "counter", "steps that were not executed"),
    MetricSpec("num_isolated_failures", "counter", "requests found to make steps fail"),
    MetricSpec("num_nonfinite", "counter", "requests ended because their logits were not finite"),
    MetricSpec("num_invariant_breaches", "counter", "times the scheduler rebuilt its books after a bug of its own"),
    MetricSpec("num_preemptions", "counter", "running requests put back to the queue for want of pages"),
    MetricSpec("num_evicted_pages", "counter", "cached pages freed to make room"),
    MetricSpec("num_chunked_prompts", "counter", "prompts computed in more than one step"),
    MetricSpec("num_updates", "counter", "weight updates that became live"),
    MetricSpec("staged_steps", "counter", "steps completed between the first staged byte and the end of an update"),
    MetricSpec("executing_s", "counter", "seconds in which the core issued steps and waited for them"),
    MetricSpec("deciding_s", "counter", "seconds in which the core decided on steps and took their results"),
    MetricSpec("idle_s", "counter", "seconds in which the core had nothing to do"),
    MetricSpec("num_gemm_calls", "counter", "linear layers run"),
    MetricSpec("num_graph_replays", "counter", "captured launches replayed"),
    MetricSpec("num_compiled_after_ready", "counter", "kernels built after the engine was ready"),
    MetricSpec("gpu_busy_s", "counter", "seconds the device spent in steps"),
    MetricSpec("gpu_idle_s", "counter", "seconds between steps that were both enqueued"),
    MetricSpec("num_pages_saved", "counter", "KV pages copied to host memory"),
    MetricSpec("num_pages_loaded", "counter", "KV pages copied from host memory"),
    MetricSpec("page_save_s", "counter", "seconds that copies of KV pages to host memory took"),
    MetricSpec("page_load_s", "counter", "seconds that copies of KV pages from host memory took"),
    MetricSpec("num_running", "gauge", "requests that hold a slot"),
    MetricSpec("num_waiting", "gauge", "requests queued"),
    MetricSpec("num_free_pages", "gauge", "KV pages nobody references"),
    MetricSpec("num_cached_pages", "gauge", "KV pages held by the prefix cache alone"),
    MetricSpec("num_published_pages", "gauge", "KV pages that can be found as prefixes, also by those in use"),
    MetricSpec("num_prefix_nodes", "gauge", "nodes of the tree of these prefixes"),
    MetricSpec("num_used_tokens", "gauge", "tokens of KV held by running requests"),
    MetricSpec("num_host_pages", "gauge", "KV pages that can be found in host memory"),
    MetricSpec("max_total_num_tokens", "gauge", "tokens the KV pool can hold"),
    MetricSpec("last_update_pause_ms", "gauge", "milliseconds for which the last commit held requests"),
    MetricSpec("uptime_s", "gauge", "seconds since the core started"),
)
