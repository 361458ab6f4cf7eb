"""The same workload with Hugging Face transformers, both ways it can run it, each at the best of several settings.

`generate()` runs static batches in submission order, left-padded, each as long as its longest member; continuous
batching starts a request as another ends. Same weights, threads, dtype, prompts, lengths, temperature as the engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.bench.workloads import Workload

if TYPE_CHECKING:
    from headrace.bench.engine_setup import Prepared
    from headrace.bench.offline import OfflineOptions

_BATCH_SIZES = (8, 16, 32, 64, 128, 256)
_CONCURRENCIES = (8, 16, 32, 64)
_PAGE_SIZE = 32
_MUCH_SLOWER = 1.25


class _MissingApiError(Exception):
    """These transformers have no continuous batching, or not the one used here."""


def time_transformers(
    options: OfflineOptions, prepared: Prepared, workload: Workload, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time both ways; returns for each the best setting's figures and those of every setting tried.

    A sweep runs each setting once, from the smallest until one is much slower than the best so far, then the best one
    `options.runs` times in all; the median counts. Continuous batching is a young interface: of transformers whose own
    differs, `continuous_batching` only says why it is `unavailable`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(prepared.resolved.num_threads)
    dtype = getattr(torch, prepared.resolved.dtype)
    model = AutoModelForCausalLM.from_pretrained(prepared.folder, dtype=dtype).to(prepared.resolved.device).eval()
    num_requests = len(workload.prompts)
    sizes = options.batch_sizes or _up_to(_BATCH_SIZES, num_requests)
    _generate_batch(model, workload.prompts[:1], 4)

    report = {"generate": _sweep(sizes, partial(_run_generate, model, workload, on_progress), workload, options.runs)}
    if workload.name == "C":
        report["generate"]["milliseconds_per_token"] = _milliseconds_per_token(model, workload, options.runs)
    run_continuous = partial(_run_continuous, model, workload, on_progress)
    concurrencies = options.concurrencies or _up_to(_CONCURRENCIES, num_requests)
    try:
        report["continuous_batching"] = _sweep(concurrencies, run_continuous, workload, options.runs)
    except _MissingApiError as error:
        report["continuous_batching"] = {"unavailable": str(error)}
    return report


def _up_to(sizes: Sequence[int], limit: int) -> list[int]:
    return [size for size in sizes if size <= limit] or [limit]


def _sweep(sizes: Sequence[int], run: Callable[[int], float], workload: Workload, runs: int) -> dict[str, Any]:
    """Time `run` at each size; the best is run again until it has `runs` timings."""
    tried: dict[int, float] = {}
    for size in sorted(sizes):
        tried[size] = run(size)
        if tried[size] > _MUCH_SLOWER * min(tried.values()):
            break
    best = min(tried, key=lambda size: tried[size])
    seconds = statistics.median([tried[best], *(run(best) for _ in range(runs - 1))])
    return {
        "batch_size": best,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(workload.num_output_tokens / seconds, 1),
        "tokens_per_second_by_batch_size": {
            str(size): round(workload.num_output_tokens / value, 1) for size, value in tried.items()
        },
    }


def _run_generate(model: Any, workload: Workload, on_progress: Callable[[str], None], batch_size: int) -> float:
    on_progress(f"transformers generate(), batch size {batch_size}")
    start = time.perf_counter()
    for first in range(0, len(workload.prompts), batch_size):
        last = first + batch_size
        _generate_batch(model, workload.prompts[first:last], max(workload.output_lengths[first:last]))
    return time.perf_counter() - start


def _generate_batch(model: Any, prompts: list[list[int]], num_tokens: int) -> None:
    import torch

    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=_generation_config(num_tokens),
        )
    if output.shape[1] != longest + num_tokens:
        raise RuntimeError("transformers stopped early; the comparison would be wrong")


def _generation_config(num_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0
    )


def _run_continuous(model: Any, workload: Workload, on_progress: Callable[[str], None], concurrency: int) -> float:
    """One run of transformers' continuous batching with at most `concurrency` requests per step."""
    on_progress(f"transformers continuous batching, {concurrency} requests at once")
    with _continuous_manager(model, workload, concurrency) as manager:
        start = time.perf_counter()
        lengths: dict[str, int] = {}
        for prompt, length in zip(workload.prompts, workload.output_lengths, strict=True):
            lengths[manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)] = length
        for _ in range(len(lengths)):
            output = _next_finished(manager)
            if len(output.generated_tokens) != lengths.pop(output.request_id):
                raise RuntimeError("transformers stopped early; the comparison would be wrong")
        return time.perf_counter() - start


def _continuous_manager(model: Any, workload: Workload, concurrency: int) -> Any:
    """The context manager around a run. Only its making can find that the interface is another one."""
    pages = sum(-(-(len(p) + n) // _PAGE_SIZE) for p, n in zip(workload.prompts, workload.output_lengths, strict=True))
    generation_config = _generation_config(max(workload.output_lengths))
    try:
        from transformers import ContinuousBatchingConfig

        settings = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=pages + concurrency,
            max_batch_tokens=max(512, concurrency),
            max_requests_per_batch=concurrency,
            auto_switch_to_flash=False,
        )
        return model.continuous_batching_context_manager(
            generation_config=generation_config, continuous_batching_config=settings, block=True, timeout=5
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise _MissingApiError(f"{type(error).__name__}: {error}") from error


def _next_finished(manager: Any) -> Any:
    while True:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            return output
        if output is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching ended before its requests did")


def _milliseconds_per_token(model: Any, workload: Workload, runs: int) -> float:
    """Of one request, after the first token: a whole run less a run of one token."""

    def seconds(num_tokens: int) -> float:
        start = time.perf_counter()
        _generate_batch(model, workload.prompts, num_tokens)
        return time.perf_counter() - start

    num_tokens = workload.output_lengths[0]
    return round(1e3 * statistics.median([seconds(num_tokens) - seconds(1) for _ in range(runs)]) / (num_tokens - 1), 3)
