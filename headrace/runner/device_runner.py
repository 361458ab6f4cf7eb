"""Builds what executes plans on a CUDA device: weights, model, tables, pool, graphs. Owns the order of a start.

A start takes the weights, runs one step of the greatest size over a pool of two pages, sizes the real pool by what
that took, and captures every launch; from then on nothing compiles. The same parts run on a CPU through Triton's
interpreter, without graphs, for tests. Must not know requests.
"""

from __future__ import annotations

import gc
import logging
import time
from functools import partial
from itertools import pairwise
from statistics import mean

import msgspec
import torch

from headrace import models
from headrace.attention import AttentionShape, build_device_backend
from headrace.attention.base import DeviceAttention
from headrace.attention.groups import GroupedAttention
from headrace.config import ModelSpec, ResolvedConfig, share_of, stages_of
from headrace.config.resolve import Explanation
from headrace.kernels.compile_counter import CompileCounter
from headrace.kernels.paged_kv import KvGeometry, KvPool, Zeros
from headrace.kernels.rope_tables import rope_tables
from headrace.kernels.triton.layer_kernels import device_kernels
from headrace.kernels.triton.step_tables import embed_tokens
from headrace.kernels.triton.weight_pieces import warm
from headrace.layers.linear import GemmCounter
from headrace.models.decoder import Decoder
from headrace.parallel import SINGLE, Mesh
from headrace.runner.buckets import Buckets
from headrace.runner.device_step import DeviceStep
from headrace.runner.device_thread import leave_device, take_device
from headrace.runner.exact_products import ExactProducts
from headrace.runner.graphs import Graphs
from headrace.runner.host_pages import HostPages
from headrace.runner.launches import Launches, make_tables, sharded_embed_tokens
from headrace.runner.loading import Progress, checked_weight_map, load_weights
from headrace.runner.memory import MemoryPlan, free_bytes
from headrace.runner.occupation import Occupation
from headrace.runner.slots import InputTable
from headrace.runner.step_buffer import StepBuffer, StepSizes
from headrace.runner.step_runner import MAX_CELLS, StepRunner
from headrace.sampling.device_sampler import RECORD_SIZE, DeviceSampler
from headrace.types.plan import StepPlan
from headrace.types.weights import ELEMENT_BYTES
from headrace.weights.shard import Shard
from headrace.weights.store import WeightStore

logger = logging.getLogger(__name__)
_WARM_PAGES = 2
_SPARE_BYTES = 256 << 20


class DeviceRunner:
    """One device's executor. `resolved` is what it was given, with the number of pages filled in.

    `on_progress` is told how far the start is. `shares_process`: a caller's threads run beside it. On a `mesh` of
    several ranks this is one of them: all capture, warm and launch the same, in one order. Raises `CheckpointError`
    for a bad checkpoint, and `ConfigError` for a device that is not there, a backend that cannot run the model, a model
    that does not split over the mesh, or too little memory.
    """

    def __init__(
        self,
        resolved: ResolvedConfig,
        on_progress: Progress | None = None,
        *,
        shares_process: bool = False,
        mesh: Mesh = SINGLE,
    ) -> None:
        times = [time.perf_counter()]
        shard = Shard(mesh.rank, mesh.num_ranks, mesh.stage, mesh.num_stages)
        share = stages_of(resolved.model, mesh.num_stages)[mesh.stage].of(share_of(resolved.model, mesh.num_ranks))
        torch.set_num_threads(resolved.num_threads)
        self._device = device = take_device(resolved, shares_process=shares_process)
        free_at_start = free_bytes() if device.type == "cuda" else 0
        mesh.communicator.connect(device)
        dtype = getattr(torch, resolved.dtype)
        self._probed = torch.zeros(1, dtype=torch.int32, device=device)
        self._compiled = CompileCounter()
        self._counter = GemmCounter()
        self.memory = Occupation(device, is_saver=resolved.engine.memory_saver, shares_process=shares_process)
        self.weights = WeightStore(
            checked_weight_map(resolved, shard),
            dtype,
            device,
            allocate=self.memory.parameters,
            check_finite=resolved.engine.check_finite,
        )
        self.memory.reload = load_weights(self.weights, resolved, on_progress, shard)
        times.append(time.perf_counter())
        has_graphs = device.type == "cuda" and resolved.engine.cuda_graphs
        has_float32 = any(tensor.dtype == torch.float32 for tensor in self.weights.live.values())
        exact = ExactProducts(device, is_shared=shares_process, has_float32=has_float32)
        parts = _Parts(resolved, share, mesh, exact, self.weights, self._counter)
        if on_progress is not None:
            on_progress("sizing", 0, 0)
        self.resolved = _size_pool(resolved, parts, free_at_start, has_graphs) if device.type == "cuda" else resolved
        times.append(time.perf_counter())
        self._graphs = Graphs(self._counter, enabled=has_graphs)
        self._steps = parts.steps(self.resolved, self._graphs, partial(self.memory.zeros, "kv_cache"))
        if device.type == "cuda":
            self._steps.capture(parts.buckets.captured, parts.buckets.sampled, on_progress)
            self._steps.warm(parts.buckets.uncaptured)
            self.resolved = _fit_steps(self.resolved, self._steps)
            parts.sampler.warm()
            warm(self.weights.sum_keys.words)  # for updates
            self._compiled.arm()
            self.memory.graphs = self._steps
        times.append(time.perf_counter())
        seconds = [round(later - earlier, 1) for earlier, later in zip(times, times[1:], strict=False)]
        logger.info("weights %s s, sizing %s s, %d graphs %s s", *seconds[:2], self._graphs.num_graphs, seconds[2])

    def launch(self, plan: StepPlan) -> DeviceStep:
        """Enqueue one plan. Plans must come in the order they were issued."""
        return self._steps.launch(plan)

    def probe(self) -> None:
        """Have the device do the least thing there is, without an allocation. Raises what it answers if it cannot. What
        failed may have lacked memory: what is kept for the next update is given back."""
        self.memory.let_twins_go()
        self._probed.add_(1)
        self._synchronize()

    def counters(self) -> dict[str, float]:
        """Figures of the device since start."""
        return {
            "num_gemm_calls": float(self._counter.num_calls),
            "num_graph_replays": float(self._graphs.num_replays),
            "num_compiled_after_ready": float(self._compiled.num_calls),
            "gpu_busy_s": self._steps.clock.busy_s,
            "gpu_idle_s": self._steps.clock.idle_s,
            **self._steps.counters(),
        }

    def close(self) -> None:
        """Wait for what is enqueued and give all memory back."""
        self._compiled.disarm()
        self._synchronize()
        self._steps.drop_graphs()  # a group of NCCL's ends after its graphs, and somebody may still hold a step
        del self._steps, self._graphs
        self.weights.close()
        self.memory.close()
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        leave_device(self._device)

    def _synchronize(self) -> None:
        """Wait for this thread's stream, as a trainer may be capturing one of his."""
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()


class _Parts:
    """What does not depend on the size of the pool: model, sampler, hidden states, buckets."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        share: ModelSpec,
        mesh: Mesh,
        exact: ExactProducts,
        weights: WeightStore,
        counter: GemmCounter,
    ) -> None:
        spec, engine = resolved.model, resolved.engine
        self.mesh = mesh
        max_rows = engine.max_running_requests
        self.max_tokens = max(engine.max_step_tokens, max_rows)
        self.device = device = weights.device
        self._exact = exact
        self._dtype = weights.dtype
        kernels, in_order = device_kernels(engine.numerics, device, exact.products), engine.numerics == "invariant"
        self._model: Decoder = models.build(
            spec, weights, kernels=kernels, counter=counter, mesh=mesh, in_order=in_order
        )
        self._embed = embed_tokens if not mesh.has_shares else sharded_embed_tokens(mesh)
        self.token_bytes = share.kv_bytes_per_token(ELEMENT_BYTES[resolved.kv_dtype])
        self._groups = [
            (group, rope_tables(group.rope, group.head_dim, resolved.context_length, weights.dtype, device))
            for group in share.kv_groups
        ]
        self.sampler = DeviceSampler(spec.vocab_size, max_rows, max_rows, device)
        most_captured = min(engine.max_graph_tokens, max(engine.max_num_batched_tokens, max_rows))
        self.buckets = Buckets(max_rows, self.max_tokens, most_captured)
        self._hidden = torch.zeros(self.max_tokens, spec.hidden_size, dtype=weights.dtype, device=device)

    def steps(self, resolved: ResolvedConfig, graphs: Graphs, zeros: Zeros | None = None) -> StepRunner:
        """Everything else, over a pool of `resolved.num_pages`, which `zeros` makes, or torch."""
        engine, max_rows = resolved.engine, resolved.engine.max_running_requests
        pools = self._pools(resolved, zeros)
        attention = self._attention(resolved, pools)
        sizes = StepSizes(self.max_tokens, max_rows, MAX_CELLS, RECORD_SIZE, attention.metadata_size)
        buffer = StepBuffer(sizes, self.device, engine.overlap_depth + 2)
        tables = make_tables(buffer, max_rows, resolved.max_columns, self.device)
        launches = Launches(self._model, self._embed, attention, self.sampler, buffer, tables, self._hidden, self.mesh)
        slots = InputTable(max_rows, resolved.max_columns)
        num_host_pages, max_moves = resolved.num_host_pages, resolved.max_page_moves
        host_pages = HostPages(pools, num_host_pages, max_moves) if num_host_pages else None
        return StepRunner(launches, slots, self.buckets, graphs, self._exact, host_pages)

    def _pools(self, resolved: ResolvedConfig, zeros: Zeros | None) -> list[KvPool]:
        """One for each KV group."""
        kv_dtype, page_size = getattr(torch, resolved.kv_dtype), resolved.engine.page_size
        return [
            KvPool(KvGeometry.of_group(group, resolved.num_pages, page_size), kv_dtype, self.device, zeros)
            for group, _ in self._groups
        ]

    def _attention(self, resolved: ResolvedConfig, pools: list[KvPool]) -> DeviceAttention:
        """A backend for each KV group."""
        backends = [
            build_device_backend(
                resolved.attention_backend,
                resolved.engine.numerics,
                AttentionShape.of_group(group),
                pool,
                rotary,
                self._dtype,
                self.max_tokens,
            )
            for (group, rotary), pool in zip(self._groups, pools, strict=True)
        ]
        return backends[0] if len(backends) == 1 else GroupedAttention(backends)


def _size_pool(resolved: ResolvedConfig, parts: _Parts, free_at_start: int, has_graphs: bool) -> ResolvedConfig:
    """Run the greatest step over a tiny pool, and give the pages what that leaves; a pool of given size must fit. All
    ranks have as many pages as the one that has room for the fewest."""
    engine = resolved.engine
    without_host = msgspec.structs.replace(engine, host_kv_tokens=0)
    tiny = msgspec.structs.replace(resolved, num_pages=_WARM_PAGES, engine=without_host)
    graphs = Graphs(GemmCounter(), enabled=has_graphs)
    steps = parts.steps(tiny, graphs)
    steps.run_greatest()
    taken = free_at_start - free_bytes()
    graph_bytes = _measure_graphs(steps, graphs, parts) if has_graphs else 0
    del steps, graphs
    gc.collect()
    torch.cuda.empty_cache()
    spare = _SPARE_BYTES + 4 * engine.max_running_requests * resolved.model.vocab_size  # one more step's logits
    page_bytes = parts.token_bytes * engine.page_size
    spare += 2 * resolved.max_page_moves * page_bytes if resolved.num_host_pages else 0
    plan = MemoryPlan(free_at_start, taken, graph_bytes, spare, engine.memory_fraction, page_bytes)
    plan = plan.tightest(parts.mesh, parts.device)
    page_bytes = plan.page_bytes
    plan.check(resolved.num_pages * page_bytes, least=2 * page_bytes)  # one for sequences, beside page 0
    if resolved.num_pages:
        return resolved
    num_tokens = (plan.pages // page_bytes - 1) * engine.page_size
    return resolved.with_pool(num_tokens, _explained(resolved, "kv_pool_tokens", num_tokens, plan.explain()))


def _explained(resolved: ResolvedConfig, name: str, value: int, why: str) -> tuple[Explanation, ...]:
    """All explanations, with this one of a setting."""
    return *(entry for entry in resolved.explanations if entry[0] != name), (name, str(value), why)


def _fit_steps(resolved: ResolvedConfig, steps: StepRunner) -> ResolvedConfig:
    """Steps that bring prompts beside few rows have as many tokens as `max_step_ms` allows; how many that are is told
    the scheduler, for prompts that attend to much."""
    engine = resolved.engine
    if engine.prefill_step_tokens <= engine.max_num_batched_tokens:
        return resolved
    most, milliseconds = engine.max_step_tokens, steps.greatest_ms()
    tokens = max(engine.max_num_batched_tokens, int(most * engine.max_step_ms / milliseconds))
    resolved = msgspec.structs.replace(resolved, max_step_cost=tokens)
    if milliseconds <= engine.max_step_ms:
        return resolved
    why = f"a step of {most} took {milliseconds:.0f} ms, and max_step_ms is {engine.max_step_ms:g}"
    explanations = _explained(resolved, "prefill_step_tokens", tokens, why)
    engine = msgspec.structs.replace(engine, prefill_step_tokens=tokens)
    return msgspec.structs.replace(resolved, engine=engine, explanations=explanations)


def _measure_graphs(steps: StepRunner, graphs: Graphs, parts: _Parts) -> int:
    """Bytes that all graphs will take: their pool, by capturing the greatest of each kind, and what each one adds.

    The latter is a mean without its extremes: other processes take and free memory meanwhile, and it is multiplied by
    the number of graphs.
    """
    mixed = [bucket for bucket in parts.buckets.captured if not bucket.is_decode]
    decode = [bucket for bucket in parts.buckets.captured if bucket.is_decode]
    num_graphs = len(mixed) + len(decode) + (2 * len(parts.buckets.sampled) if parts.mesh.is_last else 0)
    left = [free_bytes()]
    steps.capture([mixed[0], decode[0]], parts.buckets.sampled[:1])
    left.append(free_bytes())
    num_greatest = graphs.num_graphs
    for bucket in (mixed[-1], *decode[1:5]):
        steps.capture([bucket], [])
        left.append(free_bytes())
    greatest, *added = (before - after for before, after in pairwise(left))
    each = mean(sorted(added)[1:-1] or added)
    return max(0, int(greatest + each * (num_graphs - num_greatest)))
