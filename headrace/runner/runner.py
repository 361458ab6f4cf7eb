"""A CPU's runner, and that of the reference kernels on any device: step plans are executed when they are issued.

Owns the input table, the KV pools and the model; must not know requests.

A step is: enter slots and write pages, one packed forward over all rows, the head for the rows that need logits, one
sampling pass. Nothing here decides which rows run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headrace import models
from headrace.attention import AttentionShape, Heads, build_backend
from headrace.config import ResolvedConfig, share_of, stages_of
from headrace.kernels import select_kernels
from headrace.kernels.paged_kv import KvGeometry, KvPool
from headrace.kernels.rope_tables import rope_tables
from headrace.layers.linear import GemmCounter
from headrace.layers.step import ForwardStep
from headrace.parallel import SINGLE, Mesh
from headrace.runner.batch import ForwardBatch, build_batch
from headrace.runner.device_thread import take_device
from headrace.runner.exact_products import ExactProducts
from headrace.runner.host_pages import HostPages
from headrace.runner.loading import Progress, checked_weight_map, load_weights
from headrace.runner.occupation import Occupation
from headrace.runner.passage import Passage
from headrace.runner.pending import step_result
from headrace.runner.prompt_scores import PromptScorer
from headrace.runner.routed_pool import RoutedPool
from headrace.runner.slots import InputTable
from headrace.sampling import Sampler
from headrace.types.plan import PositionLogprobs, PromptLogprobs, RoutedRow, SamplePatch, StepPlan, StepResult
from headrace.types.request import Int32Array
from headrace.weights.shard import Shard
from headrace.weights.store import WeightStore

_MAX_LOGITS_BYTES = 256 << 20


class Runner:
    """What executes plans on a CPU; on a CUDA device `StepRunner` does, but for the reference kernels.

    `on_progress` is told how far the start is. `shares_process`: a caller's threads run beside it. On a `mesh` of
    several ranks this is one of them: all are given the same plans, in one order. Sets the process's torch thread
    count. Raises `CheckpointError` for a bad checkpoint and `ConfigError` for a backend that cannot run
    the model, or a model that does not split over the mesh.
    """

    def __init__(
        self,
        resolved: ResolvedConfig,
        on_progress: Progress | None = None,
        *,
        shares_process: bool = False,
        mesh: Mesh = SINGLE,
    ) -> None:
        spec, engine = resolved.model, resolved.engine
        shard = Shard(mesh.rank, mesh.num_ranks, mesh.stage, mesh.num_stages)
        share = stages_of(spec, mesh.num_stages)[mesh.stage].of(share_of(spec, mesh.num_ranks))
        torch.set_num_threads(resolved.num_threads)
        self._device = device = take_device(resolved, shares_process=shares_process)
        self._dtype = dtype = getattr(torch, resolved.dtype)
        self._mesh = mesh
        self.resolved = resolved
        self._counter = GemmCounter()
        self.memory = Occupation(device, is_saver=engine.memory_saver, shares_process=shares_process)
        self.weights = WeightStore(
            checked_weight_map(resolved, shard),
            dtype,
            device,
            allocate=self.memory.parameters,
            check_finite=engine.check_finite,
        )
        self._exact = ExactProducts(device, is_shared=shares_process)
        products = self._exact.products
        kernel_set = "reference" if resolved.attention_backend == "reference" else engine.numerics
        kernels = select_kernels(kernel_set, products)
        in_order = engine.numerics == "invariant"
        self._model = models.build(
            spec, self.weights, kernels=kernels, counter=self._counter, mesh=mesh, in_order=in_order
        )
        zeros = partial(self.memory.zeros, "kv_cache")
        pools = [
            KvPool(KvGeometry.of_group(group, resolved.num_pages, engine.page_size), dtype, device, zeros)
            for group in share.kv_groups
        ]
        num_host_pages, max_moves = resolved.num_host_pages, resolved.max_page_moves
        self._host_pages = HostPages(pools, num_host_pages, max_moves) if num_host_pages else None
        self._attention = [
            build_backend(
                resolved.attention_backend,
                engine.numerics,
                Heads(
                    AttentionShape.of_group(group),
                    kernels,
                    rope_tables(group.rope, group.head_dim, resolved.context_length, dtype, device),
                ),
                pool,
                products,
            )
            for group, pool in zip(share.kv_groups, pools, strict=True)
        ]
        self._slots = InputTable(engine.max_running_requests, resolved.max_columns)
        self._routed: RoutedPool | None = None
        if engine.keep_routed_experts:
            num_slots = engine.max_running_requests
            self._routed = RoutedPool(spec.layers, resolved.num_pages, engine.page_size, num_slots)
        self._sampler = Sampler(spec.vocab_size, engine.max_running_requests)
        self._scorer = PromptScorer(self._model.logits, self._sampler, spec.vocab_size)
        self._max_sampled_rows = max(1, _MAX_LOGITS_BYTES // (4 * spec.vocab_size))
        self.memory.reload = load_weights(self.weights, resolved, on_progress, shard)

    def launch(self, plan: StepPlan) -> RunnerStep:
        """Run one step now, up to its sampling if that waits. Plans must come in the order they were issued. Of a stage
        but the last the result is empty."""
        if self._mesh.num_stages == 1 or not len(plan.token_ids):
            return self._run(plan, None)
        shape = len(plan.token_ids), self.resolved.model.hidden_size
        with Passage(self._mesh, torch.empty(shape, dtype=self._dtype, device=self._device)) as passage:
            return self._run(plan, passage)

    def _run(self, plan: StepPlan, passage: Passage | None) -> RunnerStep:
        step = RunnerStep(plan.step_id, self)
        with torch.inference_mode(), self._exact.guard:
            if len(plan.page_moves):
                self._move_pages(plan.page_moves)
            self._slots.apply(plan)
            for init in plan.new_slots if self._mesh.is_last else ():
                self._sampler.enter(init)
            if self._routed is not None:
                self._routed.enter(plan.new_slots)
            if len(plan.row_slots):
                self._forward(plan, step, passage)
            if not plan.waits_to_sample:
                step.result = self._finish(step, None)
        return step

    def sample(self, step: RunnerStep, patch: SamplePatch | None) -> None:
        """The rest of a step whose sampling waits."""
        with torch.inference_mode(), self._exact.guard:
            step.result = self._finish(step, patch)

    def probe(self) -> None:
        """Nothing to ask: a CPU that runs this works. What failed may have lacked memory: what is kept for the next
        update is given back."""
        self.memory.let_twins_go()

    def close(self) -> None:
        """Give the weights back; the pool goes with the runner."""
        self.weights.close()
        self.memory.close()

    def counters(self) -> dict[str, float]:
        """Figures of its own for the metrics."""
        copies = self._host_pages.counters() if self._host_pages else {}
        return {"num_gemm_calls": float(self._counter.num_calls), **copies}

    def _forward(self, plan: StepPlan, step: RunnerStep, passage: Passage | None) -> None:
        batch, is_last = build_batch(plan, self._slots, self._device), self._mesh.is_last
        routed: list[Tensor] | None = None if self._routed is None else []
        reads_all = (
            routed is not None or not is_last or batch.scored_rows or len(batch.sampled_tokens) == len(batch.token_ids)
        )
        attention = []
        for backend in self._attention:
            attention.append(backend.plan(batch.attention))
        forward = ForwardStep(attention, None if reads_all else batch.sampled_tokens, routed)
        hidden = self._model.embed(batch.token_ids) if passage is None or self._mesh.stage == 0 else passage.take()
        hidden = self._model.forward(hidden, forward)
        if self._routed is not None and routed is not None:
            step.routed = self._routed.keep(batch.attention, routed)
        if passage is not None and not is_last:
            passage.give(hidden)
            return
        if batch.scored_rows:
            step.prompts = self._scorer.score(batch, hidden)
        if len(hidden) != len(batch.sampled_tokens):
            hidden = hidden.index_select(0, batch.sampled_tokens)
        step.sampled = batch, hidden

    def _move_pages(self, moves: Int32Array) -> None:
        assert self._host_pages is not None, "a plan moves pages and there is no room for them"
        moved = self._host_pages.move(moves)
        if moved is not None:
            moved.wait()

    def _finish(self, step: RunnerStep, patch: SamplePatch | None) -> StepResult:
        """Sample, a bounded number of rows at a time: a row of logits is large."""
        if step.sampled is None:
            return step_result(step.step_id, np.zeros(0, np.int32), np.zeros(0, np.float32), {}, {})
        batch, hidden_SX = step.sampled
        slots, positions = torch.from_numpy(batch.sampled_slots), torch.from_numpy(batch.sampled_positions)
        token_ids, logprobs = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        extras: dict[int, PositionLogprobs] = {}
        for first in range(0, len(slots), self._max_sampled_rows):
            chunk = slice(first, first + self._max_sampled_rows)
            logits_SV = self._model.logits(hidden_SX[chunk])
            part = patch and patch.within(range(chunk.start, chunk.stop))
            sampled = self._sampler.sample(logits_SV, slots[chunk], positions[chunk], part)
            token_ids.append(sampled.token_ids.numpy())
            logprobs.append(sampled.logprobs.numpy())
            for row, extra in sampled.extras.items():
                extras[int(batch.sampled_rows[first + row])] = extra
        new_ids = np.concatenate(token_ids)
        self._slots.record(batch.sampled_slots, new_ids)
        token_ids_S, logprobs_S = new_ids.astype(np.int32), np.concatenate(logprobs)
        return step_result(step.step_id, token_ids_S, logprobs_S, extras, step.prompts, step.routed)


@dataclass
class RunnerStep:
    """A plan that ran when it was issued; `sampled` are the rows that sample and their hidden states."""

    step_id: int
    runner: Runner
    sampled: tuple[ForwardBatch, Tensor] | None = None
    prompts: dict[int, PromptLogprobs] = field(default_factory=dict)
    routed: dict[int, RoutedRow] = field(default_factory=dict)
    result: StepResult | None = None

    @property
    def is_done(self) -> bool:
        """As `LocalStep.is_done`."""
        return self.result is not None

    def sample(self, patch: SamplePatch | None) -> None:
        """As `PendingStep.sample`."""
        self.runner.sample(self, patch)

    def wait(self) -> StepResult:
        """As `PendingStep.wait`."""
        assert self.result is not None, "a step is collected that was not sampled"
        return self.result
