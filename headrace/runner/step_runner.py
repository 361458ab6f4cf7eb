"""From a plan to what is enqueued on the device. Owns the order of copies and launches within a step.

A plan becomes one packed array, one copy and two launches, forward and sample. Nothing here waits for the device, and
tokens sampled stay on it. Must not know how anything was built, nor requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, product

import numpy as np
import torch

from headrace.attention.base import Bucket, StepRows
from headrace.runner.buckets import Buckets
from headrace.runner.device_step import DeviceClock, DeviceStep, ScoredPrompt, StepMarks
from headrace.runner.exact_products import ExactProducts
from headrace.runner.graphs import Graphs
from headrace.runner.host_pages import HostPages
from headrace.runner.launches import Launches
from headrace.runner.loading import Progress
from headrace.runner.prompt_scores import scored_spans
from headrace.runner.slots import InputTable
from headrace.runner.step_buffer import HostStep
from headrace.types.plan import RankLost, SamplePatch, StepPlan

MAX_CELLS = 2048
"""Page cells that travel with a step; more are written one copy by one."""

Int64Array = np.ndarray[tuple[int], np.dtype[np.int64]]
_NO_ROWS: Int64Array = np.empty(0, np.int64)


class StepRunner:
    """Turns plans into launches, in the order they are issued."""

    def __init__(
        self,
        launches: Launches,
        slots: InputTable,
        buckets: Buckets,
        graphs: Graphs,
        exact: ExactProducts,
        host_pages: HostPages | None = None,
    ) -> None:
        self.clock = DeviceClock()
        self._launches = launches
        self._mesh = launches.mesh
        self._has_launched = False
        self._attention = launches.attention
        self._sampler = launches.sampler
        self._buffer = launches.buffer
        self._page_table = launches.tables.page_table
        self._is_cuda = self._page_table.is_cuda
        self._slots = slots
        self._buckets = buckets
        self._graphs = graphs
        self._exact = exact
        self._host_pages = host_pages

    def counters(self) -> dict[str, float]:
        """Figures for the metrics, of what runs beside steps."""
        return self._host_pages.counters() if self._host_pages else {}

    def launch(self, plan: StepPlan) -> DeviceStep:
        """Enqueue one plan, up to its sampling if that waits. Of a stage but the last the result is empty."""
        host = self._buffer.take()
        with self._enqueueing(host):
            step = self._forward(plan, host) if self._mesh.num_stages == 1 else self._pass_through(plan, host)
            if not plan.waits_to_sample:
                self._finish(step, None)
        return step

    def sample(self, step: DeviceStep, patch: SamplePatch | None) -> None:
        """Enqueue the rest of a step whose sampling waits. No other may have been enqueued since."""
        with self._enqueueing(step.host):
            self._finish(step, patch)

    @contextmanager
    def _enqueueing(self, host: HostStep) -> Iterator[None]:
        """What is launched inside is one step's; where that fails its host copy is free again."""
        with torch.inference_mode():
            try:
                with self._exact.guard:
                    yield
            except BaseException:
                self._give_back(host)
                raise

    def capture(self, buckets: list[Bucket], sampled: list[int], on_progress: Progress | None = None) -> None:
        """Capture the launches of these sizes, over an empty step."""
        sampling = list(product(sampled if self._mesh.is_last else (), (False, True)))
        num_done, num_all = count(1), len(buckets) + len(sampling)
        tell = on_progress or _tell_nobody
        with torch.inference_mode(), self._exact.guard:
            self._launches.make_empty()
            for bucket in buckets:
                first = partial(self._launches.forward, bucket, samples=True)
                if self._attention.captures:
                    self._graphs.capture(bucket, partial(self._launches.forward, bucket), first)
                else:
                    first()  # later steps of this size run as they are
                tell("graphs", next(num_done), num_all)
            for num_rows, plain in sampling:
                body = partial(self._launches.sample, num_rows, plain=plain)
                self._graphs.capture((num_rows, plain), body)
                tell("graphs", next(num_done), num_all)

    def drop_graphs(self) -> None:
        """Give up what was captured, with no step in flight: until it is captured again steps run as they are."""
        self._graphs.drop()

    def capture_again(self) -> Iterator[None]:
        """Capture what was dropped, in the order of the start, which is that of every rank; rests after each."""
        dropped = list(self._graphs.dropped)
        if dropped:
            self._graphs.check_room()
        for key in dropped:
            with torch.inference_mode(), self._exact.guard:
                self._graphs.capture_again(key)
            yield

    def warm(self, buckets: list[Bucket]) -> None:
        """Run forward launches of these sizes once, over an empty step, for the kernels that they compile."""
        with torch.inference_mode(), self._exact.guard:
            self._launches.make_empty()
            for bucket in buckets:
                self._launches.forward(bucket, samples=True)

    def run_greatest(self) -> None:
        """Run launches of the greatest sizes, over padding: what their peak of memory is measured by."""
        with torch.inference_mode(), self._exact.guard:
            self._launches.make_empty()
            self._launches.forward(self._buckets.greatest)
            if not self._mesh.is_last:
                return
            num_rows = self._buckets.sampled[0]
            self._launches.sample(num_rows, plain=False)
            self._launches.logits_of(slice(0, num_rows)).clone()  # prompt scores work on a copy at times

    def greatest_ms(self) -> float:
        """Milliseconds that a CUDA device takes for the forward launches of the greatest step: over padding, so without
        attention to anything."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.inference_mode(), self._exact.guard:
            self._launches.make_empty()
            self._launches.forward(self._buckets.greatest)
            begin.record()
            self._launches.forward(self._buckets.greatest)
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def _give_back(self, host: HostStep) -> None:
        if self._is_cuda:
            torch.cuda.current_stream().synchronize()  # nothing may read the host copy when it is taken again
        host.is_free = True

    def _forward(self, plan: StepPlan, host: HostStep) -> DeviceStep:
        num_records = self._enter(plan, host)
        self._slots.apply(plan)
        self._pack_cells(plan, host)
        sampled_rows = np.flatnonzero(plan.row_samples) if self._mesh.is_last else _NO_ROWS
        step = DeviceStep(plan.step_id, host, self, sampled_rows, begin=self._mark())
        if len(plan.row_slots):
            self._run_rows(plan, host, num_records, step)
        else:
            self._send(plan, step, 0, num_records)
            self._launches.write_cells()
        return step

    def _finish(self, step: DeviceStep, patch: SamplePatch | None) -> None:
        if len(step.sampled_rows):
            self._sample(step, patch)
            step.host.receive(self._buffer.results)
        step.marks = self._marks(step.begin)

    def _pass_through(self, plan: StepPlan, host: HostStep) -> DeviceStep:
        """As `_forward`, and where that fails the other stages get what they expect all the same."""
        self._has_launched = not len(plan.token_ids)
        try:
            return self._forward(plan, host)
        except RankLost:
            raise
        except BaseException:
            if not self._has_launched:
                self._launches.pass_on(self._buckets.of_step(len(plan.token_ids), len(plan.row_slots)))
            raise

    def _enter(self, plan: StepPlan, host: HostStep) -> int:
        if not self._mesh.is_last:
            return 0
        for index, init in enumerate(plan.new_slots):
            host.views.records[index] = self._sampler.enter(init)
        return len(plan.new_slots)

    def _pack_cells(self, plan: StepPlan, host: HostStep) -> None:
        """Cells into the step's own section; where they do not fit, straight into the page table."""
        count = len(plan.page_ids)
        if count > MAX_CELLS:
            rows, columns, pages = (torch.from_numpy(a) for a in (plan.page_slots, plan.page_columns, plan.page_ids))
            table = self._page_table
            table.index_put_((rows.long().to(table.device), columns.long().to(table.device)), pages.to(table.device))
            count = 0
        host.views.cell_count[0] = count
        cells = host.views.cells[:count]
        cells[:, 0], cells[:, 1], cells[:, 2] = (
            plan.page_slots[:count],
            plan.page_columns[:count],
            plan.page_ids[:count],
        )

    def _run_rows(self, plan: StepPlan, host: HostStep, num_records: int, step: DeviceStep) -> None:
        num_tokens, num_rows = len(plan.token_ids), len(plan.row_slots)
        bucket = self._buckets.of_step(num_tokens, num_rows)
        num_sampled = len(step.sampled_rows)
        step.num_padded = self._buckets.num_sampled(num_sampled) if num_sampled else 0
        row_firsts = _pack_rows(plan, host, bucket, step.sampled_rows, step.num_padded)
        row_slots, row_starts, row_lengths = plan.row_slots, plan.row_starts, plan.row_lengths
        rows = StepRows(row_slots, row_starts, row_lengths, plan.prefix_groups, self._slots.page_table.numpy())
        metadata_size = self._attention.fill(host.views.metadata, rows, bucket)
        self._send(plan, step, metadata_size, num_records)
        self._has_launched = True
        self._graphs.run(bucket, partial(self._launches.forward, bucket))
        if self._mesh.is_last:
            step.prompts = list(self._score_prompts(plan, row_firsts))

    def _send(self, plan: StepPlan, step: DeviceStep, metadata_size: int, num_records: int) -> None:
        """What the step needs goes first: pages that move beside it would keep it waiting for the same copy engine."""
        step.host.send(self._buffer.words, metadata_size)
        if num_records:
            self._sampler.write_slots(self._buffer.views.records[:num_records])
        if self._host_pages is not None and len(plan.page_moves):
            step.moved = self._host_pages.move(plan.page_moves)

    def _sample(self, step: DeviceStep, patch: SamplePatch | None) -> None:
        views, num_sampled, num_padded = step.host.views, len(step.sampled_rows), step.num_padded
        slots, positions = views.sampled_slots[:num_sampled], views.sampled_positions[:num_sampled]
        path = self._sampler.path(slots, positions)
        if path != "eager" and patch is None:
            plain = path == "plain"
            self._graphs.run((num_padded, plain), partial(self._launches.sample, num_padded, plain=plain))
            return
        buffer, device_views = self._buffer, self._buffer.views
        step.extras = self._sampler.sample_eager(
            self._launches.sampled_logits(num_padded),
            device_views.sampled_slots[:num_padded],
            device_views.sampled_positions[:num_padded],
            buffer.token_ids[:num_padded],
            buffer.logprobs[:num_padded],
            slots.copy(),
            positions.copy(),
            patch=patch,
        )

    def _score_prompts(self, plan: StepPlan, row_firsts: Int64Array) -> Iterator[ScoredPrompt]:
        """Enqueue the scores of the prompt positions that this step's hidden states predict, for rows that asked."""
        device = self._page_table.device
        scored = self._slots.scored_rows(plan.row_slots, plan.row_starts)
        for span in scored_spans(scored, plan.row_starts, plan.row_lengths, row_firsts):
            parts = []
            for tokens, target_ids in span.chunks(self._buffer.sizes.max_rows):
                targets = torch.from_numpy(target_ids.copy()).to(device, non_blocking=True)
                parts.append(self._sampler.score(self._launches.logits_of(tokens), targets, span.init.slot))
            yield ScoredPrompt(span.row, span.first, parts)

    def _mark(self) -> torch.cuda.Event | None:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _marks(self, begin: torch.cuda.Event | None) -> StepMarks | None:
        end = self._mark()
        if begin is None or end is None:
            return None
        return self.clock.mark(begin, end)


def _pack_rows(plan: StepPlan, host: HostStep, bucket: Bucket, sampled_rows: Int64Array, num_padded: int) -> Int64Array:
    """Write packed tokens and sampled rows, padded; returns each row's first packed token."""
    views, num_tokens, num_sampled = host.views, len(plan.token_ids), len(sampled_rows)
    lengths, starts, slots = plan.row_lengths, plan.row_starts, plan.row_slots
    row_ends = np.cumsum(lengths, dtype=np.int64)
    row_firsts = row_ends - lengths
    padding = slice(num_tokens, bucket.num_tokens)
    views.token_ids[:num_tokens], views.token_ids[padding] = plan.token_ids, 0
    views.table_rows[padding], views.positions[padding] = -1, 0
    if bucket.is_decode:
        views.table_rows[:num_tokens], views.positions[:num_tokens] = slots, starts
    else:
        views.table_rows[:num_tokens] = np.repeat(slots, lengths)
        views.positions[:num_tokens] = np.arange(num_tokens) + np.repeat(starts - row_firsts, lengths)
    sampled, padding = slice(0, num_sampled), slice(num_sampled, num_padded)
    views.sampled_tokens[sampled], views.sampled_tokens[padding] = row_ends[sampled_rows] - 1, 0
    views.sampled_slots[sampled], views.sampled_slots[padding] = slots[sampled_rows], -1
    views.sampled_positions[sampled] = (starts + lengths)[sampled_rows]
    views.sampled_positions[padding] = 0
    return row_firsts


def _tell_nobody(stage: str, num_done: int, num_all: int) -> None:
    """Where nobody wants to know how far a start is."""
