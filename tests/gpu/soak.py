"""Traffic of every kind against one engine, from threads, with what it must hold to checked as it goes.

`Client` owns one caller's requests; `Control` owns what an operator and a trainer do meanwhile.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from headrace import Engine, Generation, SamplingParams
from headrace.types.weights import InFlight, PauseMode, UpdateMode
from tests.gpu.builders import Checkpoint, check_aligned, random_ids

PROBE_TOKENS = 8
MIN_GAP = 0.02
MODES: tuple[UpdateMode, ...] = ("shadow", "inplace", "auto")
IN_FLIGHT: tuple[InFlight, ...] = ("keep", "recompute", "abort", "drain")
PAUSES: tuple[PauseMode, ...] = ("keep", "recompute", "abort", "drain")


@dataclass
class Probe:
    """A prompt whose greedy tokens are beyond doubt under each version of the weights."""

    prompt: list[int]
    tokens: dict[str, list[int]]


def find_probes(versions: dict[str, Checkpoint], count: int) -> list[Probe]:
    """Prompts whose greedy tokens all lead the next best by `MIN_GAP`, by transformers, for every version."""
    choose = random.Random(123)
    found: list[Probe] = []
    while len(found) < count:
        prompt = random_ids(choose, choose.randint(2, 120))
        tokens = {version: _certain_tokens(checkpoint, prompt) for version, checkpoint in versions.items()}
        if all(tokens.values()):
            found.append(Probe(prompt, tokens))
    return found


def _certain_tokens(checkpoint: Checkpoint, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    for _ in range(PROBE_TOKENS):
        best = checkpoint.logits(prompt + tokens)[-1].topk(2)
        if float(best.values[0] - best.values[1]) < MIN_GAP:
            return []
        tokens.append(int(best.indices[0]))
    return tokens


@dataclass
class Shared:
    """What the threads of one soak have in common. `update_count` is odd while the weights may change."""

    engine: Engine
    probes: list[Probe]
    is_over: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)
    update_count: int = 0

    def run(self, turn: Any) -> None:
        """Call `turn` until it is over. What it raises ends everything and is kept."""
        try:
            while not self.is_over.is_set():
                turn()
        except Exception as failure:  # told by the test, in its own thread
            self.failures.append(failure)
            self.is_over.set()


class Client(threading.Thread):
    """One caller. Counts sequences asked for and terminal answers had; each must have exactly one."""

    def __init__(self, shared: Shared, number: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self.num_asked = 0
        self.num_answered = 0
        self.num_probed = 0
        self._shared = shared
        self._engine = shared.engine
        self._number = number
        self._turn = 0
        self._choose = random.Random(number)
        self._shapes = [random_ids(random.Random(i), 90) for i in range(4)]

    def run(self) -> None:
        self._shared.run(self._act)

    def _act(self) -> None:
        self._turn += 1
        acts = (self._generate, self._group, self._stream, self._leave, self._score, self._aborted, self._probe)
        self._choose.choice(acts)()

    def _prompt(self) -> list[int]:
        start = self._choose.choice([[], self._choose.choice(self._shapes)])
        return start + random_ids(self._choose, int(2 ** self._choose.uniform(0, 8)))

    def _params(self, **settings: Any) -> SamplingParams:
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {},
            {"top_p": 0.9, "top_k": 40},
            {"repetition_penalty": 1.2},
            {"stop_token_ids": tuple(range(3, 200))},
        ]
        length = self._choose.choice([1, 8, 40, 160])
        return SamplingParams(**{"max_new_tokens": length, **self._choose.choice(kinds), **settings})

    def _take(self, pieces: list[Generation], count: int) -> None:
        """Whole samples, one each."""
        self.num_asked += count
        self.num_answered += len(pieces)
        assert len(pieces) == count
        for piece in pieces:
            check_aligned(piece)
            assert piece.finish_reason in ("stop", "length", "abort")

    def _generate(self) -> None:
        prompts = [self._prompt() for _ in range(self._choose.randint(1, 5))]
        options: dict[str, Any] = {
            "priority": self._choose.choice([0, 0, 0, 5]),
            "top_logprobs": self._choose.choice([0, 0, 3]),
            "return_prompt_logprobs": self._choose.random() < 0.2,
        }
        params = [self._params() for _ in prompts]
        self._take(self._engine.generate(input_ids=prompts, sampling_params=params, **options), len(prompts))

    def _group(self) -> None:
        count = self._choose.choice([2, 8, 16])
        self._take(self._engine.generate(input_ids=self._prompt(), sampling_params=self._params(n=count)), count)

    def _stream(self) -> None:
        """Each sequence ends once, and nothing comes after its end."""
        prompts, ended = [self._prompt() for _ in range(2)], []
        self.num_asked += 4
        for piece in self._engine.stream(input_ids=prompts, sampling_params=self._params(n=2)):
            key = (piece.prompt_index, piece.index)
            assert key not in ended, "a piece after the last"
            check_aligned(piece)
            if piece.finish_reason is not None:
                ended.append(key)
        assert len(ended) == 4
        self.num_answered += 4

    def _leave(self) -> None:
        """A caller who goes away in the middle."""
        num_pieces = self._choose.randint(1, 6)
        stream = self._engine.stream(input_ids=self._prompt(), sampling_params=self._params(max_new_tokens=300))
        for _ in zip(range(num_pieces), stream, strict=False):
            pass
        stream.close()

    def _score(self) -> None:
        prompt = self._prompt()
        pieces = self._engine.score(input_ids=[prompt], top_logprobs=self._choose.choice([0, 2]))
        self._take(pieces, 1)
        if pieces[0].finish_reason == "length":
            assert len(pieces[0].prompt_logprobs) == len(prompt)

    def _aborted(self) -> None:
        name = f"{self.name}-{self._turn}"
        timer = threading.Timer(self._choose.uniform(0.0, 0.05), self._engine.abort, [name], {"prefix": True})
        timer.start()
        prompts = [self._prompt() for _ in range(3)]
        params = self._params(max_new_tokens=300)
        self._take(self._engine.generate(input_ids=prompts, sampling_params=params, request_id=name), 3)
        timer.join()

    def _probe(self) -> None:
        """Greedy tokens under one version of the weights are those of that version."""
        probe = self._choose.choice(self._shared.probes)
        params = SamplingParams(temperature=0.0, max_new_tokens=PROBE_TOKENS, ignore_eos=True)
        before = self._shared.update_count
        pieces = self._engine.generate(input_ids=probe.prompt, sampling_params=params)
        self._take(pieces, 1)
        if before == self._shared.update_count and before % 2 == 0 and pieces[0].finish_reason == "length":
            [(version, _)] = pieces[0].version_spans
            assert pieces[0].token_ids == probe.tokens[version]
            self.num_probed += 1


class Control(threading.Thread):
    """Updates, pauses and flushes, one after the other with rests between them."""

    def __init__(self, shared: Shared, weights: dict[str, list[tuple[str, torch.Tensor]]]) -> None:
        super().__init__(name="control", daemon=True)
        self.num_updates = 0
        self.num_pauses = 0
        self._shared = shared
        self._engine = shared.engine
        self._weights = weights
        self._choose = random.Random(99)

    def run(self) -> None:
        self._shared.run(self._act)

    def _act(self) -> None:
        time.sleep(self._choose.uniform(0.05, 0.4))
        self._choose.choice((self._update, self._update, self._give_up, self._pause, self._flush))()

    def _update(self) -> None:
        version = self._choose.choice(list(self._weights))
        self._shared.update_count += 1
        self._engine.update_weights_from_tensor(
            self._weights[version],
            version=version,
            mode=self._choose.choice(MODES),
            in_flight=self._choose.choice(IN_FLIGHT),
        )
        self._shared.update_count += 1
        self.num_updates += 1

    def _give_up(self) -> None:
        """A session that is dropped half way leaves the old weights."""
        tensors = self._weights[self._choose.choice(list(self._weights))]
        manifest = [(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors]
        session = self._engine.begin_update("never", manifest, mode="shadow")
        self._engine.stage(session, tensors[: len(tensors) // 2])
        self._engine.abort_update(session)

    def _pause(self) -> None:
        self._engine.pause(self._choose.choice(PAUSES))
        time.sleep(self._choose.uniform(0.0, 0.1))
        self._engine.resume()
        self.num_pauses += 1

    def _flush(self) -> None:
        self._engine.flush_cache()
