"""One rank of several that hold a model together: its half of the weights and heads, and what ranks tell each other.

The ranks are processes over gloo. All do the same for a message, in the order in which rank 0 sends them. A rank that
cannot be reached, or answers too late, is a lost device: `DeviceLost`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from headrace import models
from headrace.attention import AttentionShape, Heads, build_backend
from headrace.config import ResolvedConfig
from headrace.core.executor import LocalExecutor
from headrace.core.faults import DeviceLost, StepError
from headrace.kernels import ExpertKernels, KernelSet, select_kernels
from headrace.kernels.paged_kv import KvGeometry, KvPool
from headrace.kernels.rope_tables import rope_tables
from headrace.layers.linear import Embedding, GemmCounter
from headrace.runner.exact_products import ExactProducts
from headrace.runner.loading import load_weights
from headrace.runner.occupation import Occupation
from headrace.runner.prompt_scores import PromptScorer
from headrace.runner.runner import Runner
from headrace.runner.slots import InputTable
from headrace.sampling import Sampler
from headrace.types.plan import PlanRefused, SamplePatch, StepPlan, StepResult
from headrace.weights.shard import Shard
from headrace.weights.store import WeightStore

CPU = torch.device("cpu")
dist: Any = torch.distributed  # whose types lack most of it
START_SECONDS = 60.0


class Kind(IntEnum):
    """What rank 0 asks of all; the message's two numbers and bytes in brackets."""

    CLOSE = 0
    PLAN = 1  # (bytes: a plan's words)
    REFUSE = 2  # (step)
    SAMPLE = 3  # (step, number of rows; bytes: rows and masks)
    COLLECT = 4
    BEGIN = 5  # (bytes: manifest, mode, partial)
    STAGE = 6  # (index, start or -1; bytes: the tensor or piece, after the ticket's number)
    FORGET = 7  # (index)
    COMMIT = 8  # (ticket)
    ABORT = 9
    DIGEST = 10
    READ = 11  # (start, number of bytes; bytes: the name)
    SCRAMBLE = 12  # (seed)
    BEGIN_OPEN = 13  # (in place, partial)
    EXTEND = 14  # (bytes: manifest)
    RELEASE = 15  # (ticket, whether a copy is kept; bytes: tags)
    RESUME = 16  # (ticket; bytes: tags, where weights come from)


class Group:
    """The ranks, and what they compute together."""

    def __init__(self, store: Any, rank: int, num_ranks: int, seconds: float) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        keys = [f"rank {each}" for each in range(num_ranks)]
        store.set(keys[rank], "is here")
        store.wait(keys, timedelta(seconds=START_SECONDS))
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, num_ranks, timedelta(seconds=seconds))

    def add(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def greatest(self, values: Tensor) -> Tensor:
        """The greatest over the ranks, in place."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def all_of(self, values: Tensor) -> list[Tensor]:
        """Those of every rank."""
        found = [torch.empty_like(values) for _ in range(self.num_ranks)]
        self._wait(lambda: self._gloo.allgather([found], [values.contiguous()]))
        return found

    def from_first(self, values: Tensor) -> Tensor:
        """Those of rank 0, in place."""
        self._wait(lambda: self._gloo.broadcast(values, 0))
        return values

    def agree(self, *, is_ready: bool) -> bool:
        """Whether every rank is."""
        return not self.greatest(torch.tensor([not is_ready], dtype=torch.int32)).item()

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        self._wait(lambda: self._gloo.allreduce([values], options))
        return values

    @staticmethod
    def _wait(begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except RuntimeError as error:
            raise DeviceLost(f"a rank is lost: {str(error).splitlines()[0]}") from error


class RankKernels:
    """Products of which each rank has a part: sums of rows are added up, logits are put side by side."""

    def __init__(self, kernels: KernelSet, group: Group, vocab_size: int) -> None:
        self.normed_linear = kernels.normed_linear
        self.normed_gate = kernels.normed_gate
        self.experts: ExpertKernels | None = None
        self._kernels, self._group, self._vocab_size = kernels, group, vocab_size

    def linear_add_(self, residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        residual_TO.add_(self._group.add(self._kernels.linear(x_TI, weight_OI, None)))
        if bias_O is not None:
            residual_TO.add_(bias_O)

    def normed_logits(self, x_TI: Tensor, norm_I: Tensor, eps: float, weight_VI: Tensor) -> Tensor:
        parts = self._group.all_of(self._kernels.normed_logits(x_TI, norm_I, eps, weight_VI))
        return torch.cat(parts, dim=1)[:, : self._vocab_size].contiguous()


class RankEmbedding(Embedding):
    """A table of which each rank has as many rows."""

    def __init__(self, weight: Tensor, group: Group) -> None:
        super().__init__(weight)
        self._group = group

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows = token_ids - self._group.rank * len(self.weight)
        is_here = (rows >= 0) & (rows < len(self.weight))
        return self._group.add(super().__call__(rows.clamp(0, len(self.weight) - 1)) * is_here[:, None])


class RankRunner(Runner):
    """A runner whose weights, heads and KV are one rank's share."""

    def __init__(self, resolved: ResolvedConfig, group: Group) -> None:
        spec, engine, shard = resolved.model, resolved.engine, Shard(group.rank, group.num_ranks)
        torch.set_num_threads(1)
        self._device, dtype, self.resolved = CPU, getattr(torch, resolved.dtype), resolved
        self._counter, self._exact = GemmCounter(), ExactProducts(CPU)
        self.memory = Occupation(CPU, is_saver=False)
        allocate, zeros = partial(self.memory.allocate, "weights"), partial(self.memory.zeros, "kv_cache")
        table = models.weight_map(spec, shard)
        self.weights = WeightStore(table, dtype, CPU, memory=lambda: 1 << 40, allocate=allocate)
        kernels = select_kernels(engine.numerics)
        shared = RankKernels(kernels, group, spec.vocab_size)
        self._model = models.build(spec, self.weights, kernels=shared, counter=self._counter)
        self._model.embed = RankEmbedding(self._model.embed.weight, group)
        self._attention = []
        for whole in spec.kv_groups:
            held = msgspec.structs.replace(
                whole,
                num_heads=whole.num_heads // shard.num_ranks,
                num_kv_heads=max(1, whole.num_kv_heads // shard.num_ranks),
            )
            tables = rope_tables(held.rope, held.head_dim, resolved.context_length, dtype, CPU)
            pool = KvPool(KvGeometry.of_group(held, resolved.num_pages, engine.page_size), dtype, CPU, zeros)
            heads = Heads(AttentionShape.of_group(held), kernels, tables)
            backend = build_backend(resolved.attention_backend, engine.numerics, heads, pool, self._exact.products)
            self._attention.append(backend)
        self._slots = InputTable(engine.max_running_requests, resolved.max_columns)
        self._sampler = Sampler(spec.vocab_size, engine.max_running_requests)
        self._scorer = PromptScorer(self._model.logits, self._sampler, spec.vocab_size)
        self._max_sampled_rows = 64
        self.memory.reload = load_weights(self.weights, resolved, None)


class Rank(LocalExecutor):
    """What every rank does for a plan: its own part, and to agree with the others on what came of it."""

    def __init__(self, resolved: ResolvedConfig, group: Group) -> None:
        runner = RankRunner(resolved, group)
        super().__init__(runner)
        self.store, self.group = runner.weights, group

    def submit_together(self, plan: StepPlan | None, step_id: int) -> None:
        """Execute a plan if all ranks have it; None: it is none here."""
        if self.group.agree(is_ready=plan is not None) and plan is not None:
            self.submit(plan)
        else:
            self.refuse(step_id, PlanRefused("a rank could not read it"))

    def refuse(self, step_id: int, cause: PlanRefused) -> None:
        """A plan that nothing is done for."""
        self._fail(StepError(step_id, cause))

    def collect_together(self) -> StepResult:
        """The oldest result, of which all ranks have the same bits. Raises `StepError` where all have that."""
        try:
            found: StepResult | StepError = self.collect()
        except StepError as error:
            found = error
        digest = torch.from_numpy(np.frombuffer(hashlib.sha256(_told(found)).digest(), np.int64).copy())
        if any(not torch.equal(each, digest) for each in self.group.all_of(digest)):
            raise DeviceLost(f"the ranks disagree on {found}")
        if isinstance(found, StepError):
            raise found
        return found

    def digests(self) -> list[list[str]]:
        """The digests of all tensors, as each rank has them."""
        own = "".join(self.store.digest().values()).encode()
        found = self.group.all_of(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        texts = [part.numpy().tobytes().decode() for part in found]
        return [[text[at : at + 32] for at in range(0, len(text), 32)] for text in texts]

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """Bytes of a tensor: what a rank does not hold reads as zero there."""
        part = bytearray(num_bytes)
        for _ in self.store.copy_in_slices(name, start, memoryview(part)):
            pass
        return self.group.greatest(torch.frombuffer(part, dtype=torch.uint8)).numpy().tobytes()


def _told(found: StepResult | StepError) -> bytes:
    if isinstance(found, StepError):
        return f"{found.step_id} failed".encode()
    return msgspec.msgpack.encode(found, enc_hook=lambda array: array.tobytes())


def patch_of(num_rows: int, words: np.ndarray) -> SamplePatch | None:
    """A patch as it travels: rows, then masks; no rows: None."""
    masks = words[num_rows:]
    return SamplePatch(words[:num_rows], masks.reshape(num_rows, -1)) if num_rows else None
