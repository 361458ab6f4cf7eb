"""What the engine's tests on a device share: random models of every family, engines on them, and how to compare."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace import Engine, Generation, SamplingParams
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions
from tests.parity.models import LLAMA3_ROPE, make_model
from tests.sampling import reference

DEVICE = torch.device("cuda")
VOCAB_SIZE = 5003  # more than one block of the sampling kernels, and a multiple of nothing
CONTEXT_LENGTH = 8192

SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "inprocess": True,
    "skip_tokenizer_init": True,
    "seed": 0,
    "kv_pool_tokens": 1 << 17,
    "max_running_requests": 256,
    "max_num_batched_tokens": 1024,
}

_GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
_MULTI_HEAD = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
_MULTI_QUERY = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}
_WIDE_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}

# Few shapes among many variants: every new shape is a set of kernels to compile.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GROUPED, "rope_parameters": LLAMA3_ROPE}),
    "llama-tied": ("llama", {**_MULTI_HEAD, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {**_MULTI_QUERY, **_BIASES}),
    "llama-linear": ("llama", {**_GROUPED, **_LINEAR_ROPE}),
    "mistral": ("mistral", {**_WIDE_HEADS, "sliding_window": None}),
    "qwen2": ("qwen2", {**_GROUPED}),
    "qwen2-tied": ("qwen2", {**_MULTI_HEAD, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_WIDE_HEADS}),
    "qwen3-tied-biases": ("qwen3", {**_WIDE_HEADS, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-even-vocabulary": ("qwen3", {**_WIDE_HEADS, "vocab_size": 5008}),  # two ranks have whole blocks of it
    "qwen3-odd-widths": ("qwen3", {**_GROUPED, "hidden_size": 320, "intermediate_size": 704}),
}
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": CONTEXT_LENGTH,
    "eos_token_id": None,
    "bos_token_id": None,
}


@dataclass(frozen=True)
class Checkpoint:
    """A model of transformers on the device in float32, and its folder, whose weights are exactly these."""

    model: PreTrainedModel
    folder: Path

    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [len(token_ids), V] on the CPU."""
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([token_ids], device=DEVICE)).logits[0]
        return logits.float().cpu()

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """What a trainer on the same device would push."""
        return [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]


class Checkpoints:
    """Makes each checkpoint once. `dtype` is that of the saved weights; the model holds the same values.

    Weights of a narrow dtype are drawn smaller, as trained ones are: its errors are then those of rounding, not of a
    chaotic model.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, int, torch.dtype], Checkpoint] = {}

    def get(self, variant: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32) -> Checkpoint:
        key = (variant, seed, dtype)
        if key not in self._made:
            family, overrides = VARIANTS[variant]
            spread = {"initializer_range": 0.08 if dtype == torch.float32 else 0.04}
            folder = self._root / f"{variant}-{seed}-{dtype}"
            make_model(family, seed=seed, **(_SIZES | spread | overrides)).to(dtype).save_pretrained(folder)
            self._made[key] = Checkpoint(load_reference(folder, torch.float32), folder)
        return self._made[key]


def load_reference(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint as transformers computes it. Read back, since a cast model has its rotary tables cast as well."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval().to(DEVICE)


Starter = Callable[..., Engine]


def start_engine(folder: Path, **settings: Any) -> Engine:
    """An engine on the device; `settings` over the defaults of these tests."""
    return Engine(folder, **{**SETTINGS, **settings})


def lay_otherwise(tensors: list[tuple[str, Tensor]], device: str, in_one: Collection[int]) -> None:
    """Have the same values lie otherwise: of each five tensors the first transposed if it is a matrix, the second on
    the host, the third in bfloat16; else those in `in_one`, at odd places of one allocation on `device`."""
    together = torch.empty(sum(each.numel() for _, each in tensors) + 3, device=device)[3:]
    taken = 0
    for number, (name, each) in enumerate(tensors):
        kind = number % 5
        if kind == 0 and each.ndim == 2:
            tensors[number] = name, each.t().contiguous().t()
        elif kind == 1:
            tensors[number] = name, each.cpu()
        elif kind == 2:
            tensors[number] = name, each.bfloat16()
        elif kind in in_one:
            part = together[taken : taken + each.numel()].view(each.shape)
            tensors[number] = name, part.copy_(each)
            taken += each.numel()


def random_ids(choose: random.Random, length: int) -> list[int]:
    """A prompt."""
    return [choose.randrange(3, VOCAB_SIZE) for _ in range(length)]


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly that many greedy tokens."""
    return SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True)


def bits(pieces: list[Generation]) -> list[tuple[list[int], bytes]]:
    """Token ids and the very bits of their log-probabilities."""
    return [(piece.token_ids, np.asarray(piece.logprobs, np.float32).tobytes()) for piece in pieces]


def check_aligned(piece: Generation) -> None:
    """Ids, log-probabilities and versions of a sample belong together."""
    assert len(piece.token_ids) == len(piece.logprobs) == sum(count for _, count in piece.version_spans)


def check_greedy(checkpoint: Checkpoint, prompt: list[int], piece: Generation, tolerance: float) -> None:
    """Every token is transformers' greedy one, unless its logit is within `tolerance` of it; all values close."""
    logits = checkpoint.logits(prompt + piece.token_ids)[len(prompt) - 1 : -1]
    tokens = torch.tensor(piece.token_ids)
    taken = logits.gather(1, tokens[:, None])[:, 0]
    shortfall = float((logits.max(-1).values - taken).max())
    assert shortfall < tolerance, f"a token is {shortfall} below the greatest logit"
    expected = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(piece.logprobs), expected, atol=tolerance, rtol=0)


def shortfall(
    checkpoint: Checkpoint, prompt: list[int], piece: Generation, index: int, params: SamplingParams
) -> float:
    """How far token `index` of a sample is below the one to take, by transformers' logits and the float64 sampler.

    In units of logit / T + noise, at T = 0 of the penalised logit. 0: it is the one to take.
    """
    known = prompt + piece.token_ids[:index]
    assert piece.seed is not None
    row = checkpoint.logits(known)[-1].double().numpy()
    init = SlotInit(
        slot=0,
        seed=piece.seed,
        num_prompt_tokens=len(prompt),
        token_ids=np.array(known, np.int32),
        sampling=token_sampling(params),
        logprobs=LogprobOptions(),
        stop_token_ids=tuple(params.stop_token_ids),
        min_length=len(prompt) + params.min_new_tokens,
    )
    judge = reference.penalised if params.is_greedy else reference.scores
    scores = judge(row, init, len(known))
    return float(scores.max() - scores[piece.token_ids[index]])


def token_sampling(params: SamplingParams) -> TokenSampling:
    """The part of the parameters that acts on logits."""
    return TokenSampling(
        temperature=0.0 if params.is_greedy else params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple((params.logit_bias or {}).items()),
    )


def num_same(found: list[int], expected: list[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(found), len(expected))
    return next((index for index in range(shorter) if found[index] != expected[index]), shorter)


def check_samples_agree(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    params: list[SamplingParams],
    found: list[Generation],
    expected: list[Generation],
    tolerance: float,
) -> None:
    """Two engines drew the same tokens with values within `tolerance`. A sequence may part where the two candidates lie
    within `tolerance` of each other; few may, or this would say nothing."""
    num_compared = num_tokens = 0
    for prompt, each, one, other in zip(prompts, params, found, expected, strict=True):
        same = num_same(one.token_ids, other.token_ids)
        torch.testing.assert_close(
            torch.tensor(one.logprobs[:same]), torch.tensor(other.logprobs[:same]), atol=tolerance, rtol=0
        )
        if same == min(len(one.token_ids), len(other.token_ids)):
            assert (one.finish_reason, one.matched) == (other.finish_reason, other.matched), "the same tokens end alike"
        else:
            for piece in (one, other):
                gap = shortfall(checkpoint, prompt, piece, same, each)
                assert gap < tolerance, f"token {same} of {each} is {gap} off"
        num_compared += same
        num_tokens += len(one.token_ids)
    assert num_compared > 0.95 * num_tokens


class Background:
    """One `generate` call in a thread of its own."""

    def __init__(self, engine: Engine, **arguments: Any) -> None:
        self._engine = engine
        self._arguments = arguments
        self._found: list[Generation] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def answer(self, timeout: float = 60.0) -> list[Generation]:
        """What the call returned."""
        self._thread.join(timeout)
        assert self._found is not None, f"no answer within {timeout} s"
        return self._found

    def _run(self) -> None:
        self._found = self._engine.generate(**self._arguments)


def wait_for(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    """Poll until a state is reached."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the state to test was not reached"
        time.sleep(0.002)
