"""What every rank of a mesh does in a test; each answers with plain values, the same call on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.config import EngineConfig, resolve
from headrace.parallel import Mesh
from headrace.runner import Runner, build_runner, launches
from headrace.runner.device_runner import DeviceRunner
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions
from headrace.weights.checkpoint import Checkpoint
from tests.runner.plans import PlanBuilder

PAGE_SIZE = 4
NUM_PAGES = 300
NUM_IDS = 101  # tests.parity.models.VOCAB_SIZE, which every process would import transformers for
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "page_size": PAGE_SIZE,
    "kv_pool_tokens": PAGE_SIZE * (NUM_PAGES - 1),
    "max_running_requests": 8,
    "max_num_batched_tokens": 64,
    "num_threads": 1,
    "seed": 0,
}
LENGTHS = (23, 1, 9)

GREEDY = TokenSampling(temperature=0.0)
SCORED = LogprobOptions(prompt_start=1, num_top=3)


def make(mesh: Mesh, folder: str, **settings: Any) -> Any:
    """A runner of this rank."""
    ranks = {"tp_size": mesh.num_ranks, "pp_size": mesh.num_stages}
    resolved = resolve(EngineConfig(model=folder, **(SETTINGS | ranks | settings)), Path(folder))
    return build_runner(resolved, mesh=mesh)


def sample_in_shares(mesh: Mesh, folder: str, settings: dict[str, Any], num_rows: int, top_k: int) -> Any:
    """Random tokens of as many prompts, of which each rank samples its share, however few: in turn of one half and the
    other. With a top_k every other one is greedy and prefers a token, but is penalised for what it has sampled."""
    before, launches.MIN_SHARED_ROWS = launches.MIN_SHARED_ROWS, 1
    try:
        runner = make(mesh, folder, **settings)
        story, slots = Story(runner), list(range(num_rows))
        for slot in slots:
            sampling = TokenSampling(1.0, top_k=top_k)
            if top_k > 0 and slot % 2 == 0:
                sampling = TokenSampling(0.0, frequency_penalty=2.0, logit_bias=((7, 5.0),))
            story.enter(slot, tokens_of(slot, 2 + slot), sampling=sampling, logprobs=LogprobOptions())
        story.prefill(slots, 8)
        for _ in range(4):
            slots.reverse()
            story.decode(slots, 1)
        return story.told() | {"num_products": runner.counters()["num_gemm_calls"]}
    finally:
        launches.MIN_SHARED_ROWS = before


def tokens_of(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(NUM_IDS) for _ in range(length)]


def generate(
    mesh: Mesh,
    folder: str,
    chunk: int,
    num_tokens: int,
    settings: dict[str, Any],
    lengths: Sequence[int] = LENGTHS,
    known: dict[int, list[int]] | None = None,
) -> Any:
    """Prompts in chunks, one on the pages of the first, then tokens one by one: ids, log-probabilities, prompt scores.

    Logits are those of every sampled row, by slot. With `known` the tokens are these, and not those that are sampled.
    """
    story = Story(make(mesh, folder, **settings), known)
    for slot, length in enumerate(lengths):
        story.enter(slot, tokens_of(slot, length))
    sharer, num_shared = len(lengths), (lengths[0] - 1) // PAGE_SIZE * PAGE_SIZE
    story.prefill(list(range(sharer)), chunk)
    story.enter(sharer, [*tokens_of(0, num_shared), 7, 8, 9], share=(0, num_shared))
    story.prefill([sharer], chunk)
    story.decode(list(range(sharer + 1)), num_tokens - 1)
    return story.told()


def generate_among(mesh: Mesh, folder: str, num_mates: int, settings: dict[str, Any]) -> Any:
    """The tokens of one prompt among so many others, with random draws."""
    story = Story(make(mesh, folder, **settings))
    slots = list(range(num_mates + 1))
    random.Random(num_mates).shuffle(slots)
    for slot in slots:
        story.enter(slot, tokens_of(100, 9) if slot == 0 else tokens_of(slot, 3 + slot), sampling=TokenSampling(1.0))
    story.prefill(slots, 64)
    story.decode(slots, 5)
    return {"ids": story.ids[0], "logits": story.logits[0]}


class Story:
    """Plans of greedy sequences for a runner, and what came of them. Logits are of a CPU's runner only."""

    def __init__(self, runner: Runner | DeviceRunner, known: dict[int, list[int]] | None = None) -> None:
        self._runner = runner
        self._known = known
        self.ids: dict[int, list[int]] = {}
        self.logits: dict[int, list[bytes]] = {}
        self._logprobs: dict[int, list[float]] = {}
        self._scores: dict[int, list[float]] = {}
        self._plans = PlanBuilder(page_size=PAGE_SIZE, num_pages=NUM_PAGES)
        self._seen: list[Tensor] = []
        if isinstance(runner, Runner):
            runner._model.logits = self._watched(runner._model.logits)  # type: ignore[assignment, method-assign]

    def enter(self, slot: int, tokens: list[int], **options: Any) -> None:
        logprobs = LogprobOptions() if "share" in options else SCORED  # a prefix that was computed is not scored
        given: dict[str, Any] = {"sampling": GREEDY, "logprobs": logprobs, "seed": slot}
        self._plans.enter(slot, tokens, **(given | options))

    def prefill(self, slots: list[int], chunk: int) -> None:
        """All that is known of these, at most so many tokens of each a step."""
        while rows := [(slot, left) for slot in slots if (left := min(chunk, self._plans.remaining(slot)))]:
            self._step(rows)

    def decode(self, slots: list[int], num_steps: int) -> None:
        for step in range(num_steps):
            for slot in slots:
                self._plans.append(slot, *(() if self._known is None else (self._known[slot][step],)))
            self._step([(slot, 1) for slot in slots])

    def told(self) -> Any:
        return {"ids": self.ids, "logprobs": self._logprobs, "scores": self._scores, "logits": self.logits}

    def _watched(self, logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def watched(hidden_SX: Tensor) -> Tensor:
            self._seen.append(logits(hidden_SX))
            return self._seen[-1]

        return watched

    def _step(self, rows: list[tuple[int, int]]) -> None:
        plan = self._plans.step(rows)
        self._seen.clear()
        result = self._runner.launch(plan).wait()
        for row, scores in result.prompt_logprobs.items():
            self._scores.setdefault(rows[row][0], []).extend(scores.logprobs.tolist())
        sampled = [slot for (slot, _), samples in zip(rows, plan.row_samples, strict=True) if samples]
        logits = torch.cat(self._seen).numpy() if self._seen else ()
        for index, slot in enumerate(sampled[: len(result.token_ids)]):  # none but on the last stage
            self.ids.setdefault(slot, []).append(int(result.token_ids[index, 0]))
            self._logprobs.setdefault(slot, []).append(float(result.logprobs[index, 0]))
            if len(logits):
                self.logits.setdefault(slot, []).append(logits[index].tobytes())


def update(mesh: Mesh, folder: str, other: str, mode: str, settings: dict[str, Any]) -> Any:
    """A, then B, then A again: digests of each, and of the bits of all memory beside those of cold starts."""
    runner, cold = make(mesh, folder, **settings), make(mesh, other, **settings)
    first = {name: tensor.clone() for name, tensor in runner.weights.live.items()}
    found = [runner.weights.digest()]
    for source, expected in ((other, cold.weights.live), (folder, first)):
        checkpoint = Checkpoint(Path(source))
        manifest = checkpoint.manifest()
        runner.weights.begin(manifest, mode, False)
        indices = {info.name: index for index, info in enumerate(manifest)}
        for name, data in checkpoint.tensors():
            assert runner.weights.stage(indices[name], data).advance(60.0)
        runner.weights.commit()
        for name, tensor in runner.weights.live.items():
            assert torch.equal(tensor, expected[name]), name
        found.append(runner.weights.digest())
    return {"digests": found}
