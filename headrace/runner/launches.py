"""The two launches of a step over static buffers: forward, and sample.

Each is a fixed sequence of kernels for its size, so it may be captured once and replayed; what changes between steps is
read from the step buffer. Must not know plans. Legend: T packed tokens, S sampled rows, X hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.attention.base import Bucket, DeviceAttention, DeviceTables
from headrace.kernels.triton.step_tables import embed_tokens, write_cells
from headrace.layers.sharded import joined
from headrace.layers.step import ForwardStep
from headrace.models.decoder import Decoder
from headrace.parallel import SINGLE, Mesh
from headrace.runner.passage import Passage
from headrace.runner.step_buffer import StepBuffer
from headrace.sampling.device_sampler import DeviceSampler

MIN_SHARED_ROWS = 8
"""That a rank samples by itself: with fewer the ranks would rather all sample all of them than tell each other."""

Embed = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""As `embed_tokens`."""


@dataclass(frozen=True, eq=False)
class Launches:
    """Bodies of launches: nothing in them waits for the device or looks at the host's values."""

    model: Decoder
    embed: Embed
    attention: DeviceAttention
    sampler: DeviceSampler
    buffer: StepBuffer
    tables: DeviceTables
    hidden_TX: Tensor
    mesh: Mesh = SINGLE

    def write_cells(self) -> None:
        """The page cells of the step buffer, into the page table."""
        views = self.buffer.views
        write_cells(views.cells, views.cell_count, self.tables.page_table)

    def forward(self, bucket: Bucket, *, samples: bool = False) -> None:
        """Cells, embeddings and every layer; the residual stream stays in `hidden`. Of several stages: this one's
        layers, between the stream that comes and the stream that goes. `samples`: as few layers as have all kernels."""
        self.write_cells()
        hidden_TX = self.hidden_TX[: bucket.num_tokens]
        if self.mesh.num_stages == 1:
            self._embed(hidden_TX)
            self._run_layers(bucket, hidden_TX, samples=samples)
            return
        with Passage(self.mesh, hidden_TX) as passage:
            if self.mesh.before is None:
                self._embed(hidden_TX)
            else:
                passage.take()
            self._run_layers(bucket, hidden_TX, samples=samples)
            if self.mesh.after is not None:
                passage.give(hidden_TX)

    def pass_on(self, bucket: Bucket) -> None:
        """What other stages expect of this one instead of `forward`, where that cannot be run."""
        with Passage(self.mesh, self.hidden_TX[: bucket.num_tokens]) as passage:
            passage.skip()

    def _embed(self, hidden_TX: Tensor) -> None:
        views, num_tokens = self.buffer.views, len(hidden_TX)
        self.embed(
            views.token_ids[:num_tokens],
            views.table_rows[:num_tokens],
            self.sampler.last_tokens,
            self.model.embed.weight,
            hidden_TX,
        )

    def _run_layers(self, bucket: Bucket, hidden_TX: Tensor, *, samples: bool) -> None:
        run = self.model.sample_layers if samples else self.model.forward
        run(hidden_TX, ForwardStep(self.attention.steps(self.tables, bucket)))

    def sample(self, num_rows: int, *, plain: bool) -> None:
        """Tokens and log-probabilities of `num_rows` rows into the step buffer's results."""
        num_ranks = self.mesh.num_ranks
        if num_ranks > 1 and plain and self.sampler.samples_shares(num_ranks):
            self._sample_by_vocabulary(num_rows)
        elif num_ranks > 1 and num_rows >= MIN_SHARED_ROWS * num_ranks and num_rows % num_ranks == 0:
            self._sample_share(num_rows // num_ranks, plain=plain)
        else:
            self._sample_rows(self.sampled_logits(num_rows), slice(0, num_rows), plain=plain)

    def _sample_rows(self, logits_SV: Tensor, rows: slice, *, plain: bool, leaves: bool = True) -> None:
        views, buffer = self.buffer.views, self.buffer
        slots_S, positions_S = views.sampled_slots[rows], views.sampled_positions[rows]
        results = buffer.token_ids[rows], buffer.logprobs[rows]
        self.sampler.sample(logits_SV, slots_S, positions_S, *results, plain=plain, leaves=leaves)

    def _sample_by_vocabulary(self, num_rows: int) -> None:
        """Each rank looks at what it has of all rows' logits, and tells the others a few numbers of each."""
        views, buffer = self.buffer.views, self.buffer
        slots_S, positions_S = views.sampled_slots[:num_rows], views.sampled_positions[:num_rows]
        hidden_SX = self.hidden_TX.index_select(0, views.sampled_tokens[:num_rows])
        share_SW = self.model.share_of_logits(hidden_SX)
        found_SBW = self.sampler.walk_share(share_SW, self.mesh.rank, slots_S, positions_S)
        found_NSBW = self.mesh.communicator.all_gather(found_SBW)
        self.sampler.sample_shares(found_NSBW, slots_S, buffer.token_ids[:num_rows], buffer.logprobs[:num_rows])

    def _sample_share(self, num_own: int, *, plain: bool) -> None:
        """Each rank samples as many rows, of which it gets the logits of the others' vocabulary: a part of what all
        logits would be."""
        communicator, num_rows = self.mesh.communicator, num_own * self.mesh.num_ranks
        own = slice(self.mesh.rank * num_own, (self.mesh.rank + 1) * num_own)
        hidden_SX = self.hidden_TX.index_select(0, self.buffer.views.sampled_tokens[:num_rows])
        parts = communicator.exchange(self.model.share_of_logits(hidden_SX))
        self._sample_rows(joined(parts, self.sampler.vocab_size), own, plain=plain, leaves=False)
        results = communicator.all_gather(self.buffer.results[:, own])
        self.buffer.results[:, :num_rows] = torch.cat([*results], dim=1)
        self.sampler.leave_tokens(self.buffer.token_ids[:num_rows], self.buffer.views.sampled_slots[:num_rows])

    def sampled_logits(self, num_rows: int) -> Tensor:
        """float32 [num_rows, V] of the rows that sample."""
        return self.model.logits(self.hidden_TX.index_select(0, self.buffer.views.sampled_tokens[:num_rows]))

    def logits_of(self, tokens: slice) -> Tensor:
        """float32 [n, V] of n consecutive packed tokens."""
        return self.model.logits(self.hidden_TX[tokens])

    def make_empty(self) -> None:
        """Nothing to do in the step buffer: launches then compute padding and write no page."""
        self.buffer.words.zero_()
        self.buffer.views.table_rows.fill_(-1)
        self.buffer.views.sampled_slots.fill_(-1)


def sharded_embed_tokens(mesh: Mesh) -> Embed:
    """Where this rank has its share of the embedding's rows."""

    def embed(
        token_ids_T: Tensor, table_rows_T: Tensor, last_tokens: Tensor, embedding_VX: Tensor, hidden_TX: Tensor
    ) -> None:
        first = mesh.rank * len(embedding_VX)
        embed_tokens(token_ids_T, table_rows_T, last_tokens, embedding_VX, hidden_TX, first_row=first)
        mesh.communicator.all_reduce_(hidden_TX)

    return embed


def make_tables(buffer: StepBuffer, num_slots: int, num_columns: int, device: torch.device) -> DeviceTables:
    """The page table, all zero, beside the step buffer's positions and table rows."""
    page_table = torch.zeros(num_slots, num_columns, dtype=torch.int32, device=device)
    return DeviceTables(page_table, buffer.views.positions, buffer.views.table_rows, buffer.views.metadata)
