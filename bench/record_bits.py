"""What the engine computes on a CPU, as bits, beside what it computed before: does a refactoring move none of them?

    python bench/record_bits.py record FILE     on the old tree: run every case and write what came out
    python bench/record_bits.py compare FILE    on the new one: run again, print every difference; exit code 1 if any

Owns the set of cases and the recipes of their checkpoints, and asks the engine only what any caller may, so that it
runs on both sides of any renaming inside. Nothing recorded depends on time: requests are handed over behind a pause,
each with a priority of its own, so the plans are the same in every run. Both runs need the same machine, torch and
transformers; the file names them. The package is that of the script's own tree: copy it into a tree that lacks it.
A case that is younger than the record is named and not run.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import itertools
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before the libraries read them; where triton is installed, its kernels are interpreted
    os.environ.update(TRITON_INTERPRET="1", OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")
    os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the package of this tree, whichever is installed

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import headrace
from headrace import AsyncEngine, Generation

VOCAB_SIZE = 263
CONTEXT_LENGTH = 256
EOS_ID = 256
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "headrace-bits"

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
WIDE = {"hidden_size": 256, "intermediate_size": 528, "head_dim": 64, "initializer_range": 0.08}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha-llama3-tied": (
        "Llama",
        {"num_key_value_heads": 4, "head_dim": 16, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama-mqa-linear": (
        "Llama",
        {
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "mistral-mqa-window": ("Mistral", {"num_key_value_heads": 1, "head_dim": 10, "sliding_window": 192}),
    "mistral-gqa": ("Mistral", {"num_attention_heads": 6, "head_dim": 8, "sliding_window": None}),
    "qwen2-gqa-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-mha-three-heads": (
        "Qwen2",
        {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 14},
    ),
    "qwen3-gqa-biases": ("Qwen3", {"hidden_size": 40, "head_dim": 24, "attention_bias": True}),
    "qwen3-wide": ("Qwen3", WIDE),
    "qwen3-mqa-bfloat16": ("Qwen3", {"num_key_value_heads": 1, "dtype": "bfloat16"}),
    "qwen3-small": ("Qwen3", SMALL),
    "llama-small-biases-tied": (
        "Llama",
        {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3-experts": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    "mixtral-experts": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
}
"""Family and what differs from `SIZES`. The "small" ones are for Triton's interpreter; "experts" came later."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": tuple(name for name in MODELS if "small" not in name and "experts" not in name),
    "kernels": ("fast", "invariant", "reference"),
    "dtype": ("float32", "bfloat16"),
    "page_size": (4, 1, 16),
    "max_num_batched_tokens": (2048, 24, 7),
    "overlap_depth": (0, 1),
    "kv_pool_tokens": (8192, 192),
    "prefix_cache": (True, False),
}
"""Settings of the engine: any three values of three of them occur together."""
FURTHER: tuple[dict[str, Any], ...] = (
    {"model": "qwen3-wide", "kernels": "fast", "dtype": "float32", "num_threads": 2},
    {"model": "qwen3-wide", "kernels": "invariant", "dtype": "bfloat16", "num_threads": 2, "overlap_depth": 1},
    {"model": "llama-mha-llama3-tied", "kernels": "fast", "dtype": "float16", "page_size": 64},
    {"model": "qwen3-gqa-biases", "kernels": "invariant", "dtype": "float16", "page_size": 64, "overlap_depth": 3},
    *(
        {"model": model, "kernels": kernels, "dtype": dtype, "page_size": 4, "max_num_batched_tokens": 24}
        for model in ("qwen3-experts", "mixtral-experts")
        for kernels in ("fast", "invariant", "reference")
        for dtype in ("float32", "bfloat16")
    ),
)
"""What is too slow, or too rare, to be a factor, or would change which values of older ones occur together."""
KERNELS = {
    "fast": {"attention_backend": "cpu", "numerics": "fast"},
    "invariant": {"attention_backend": "cpu", "numerics": "invariant"},
    "reference": {"attention_backend": "reference", "numerics": "fast"},
}

METRICS = (
    "num_steps",
    "num_scheduled_tokens",
    "num_prefill_tokens",
    "num_decode_tokens",
    "num_generated_tokens",
    "num_overshoot_tokens",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_resumed_tokens",
    "num_shared_prefills",
    "num_chunked_prompts",
    "num_finished",
    "num_aborted",
    "num_failed",
    "num_failed_steps",
    "num_nonfinite",
    "num_preemptions",
    "num_evicted_pages",
    "num_updates",
    "num_free_pages",
    "num_cached_pages",
    "num_used_tokens",
    "max_total_num_tokens",
)

Values = dict[str, list[Any]]
Request = dict[str, Any]


class Case(NamedTuple):
    """One engine and what is asked of it."""

    name: str
    model: str
    settings: Mapping[str, Any]
    ask: Callable[[Session], Awaitable[None]]


# --- checkpoints: nothing of the package is used to make them


def checkpoint(name: str, root: Path, seed: int = 0) -> Path:
    """The folder of a model's checkpoint below `root`, written if it is not there yet."""
    family, overrides = MODELS[name]
    settings = SIZES | overrides
    recipe = json.dumps([family, settings, seed, torch.__version__, transformers.__version__], sort_keys=True)
    folder = root / f"{name}-{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            _write_checkpoint(family, settings, seed, Path(scratch, "new"))
            os.rename(Path(scratch, "new"), folder)
    return folder


def _write_checkpoint(family: str, settings: dict[str, Any], seed: int, folder: Path) -> None:
    """Random weights whose logits are far from flat, and a tokenizer whose ids 0 to 255 are the bytes."""
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, settings.get("dtype", "float32"))).save_pretrained(folder)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={character[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """What a trainer would push."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# --- one engine, asked so that time decides nothing


class Session:
    """An engine that is paused between batches, and what it answered. `values` are by batch and field."""

    def __init__(self, engine: AsyncEngine, model: str, root: Path) -> None:
        self.engine = engine
        self.model = model
        self.root = root
        self.values: Values = {}

    async def batch(self, name: str, requests: Sequence[Request], *, metrics: bool = True) -> list[Generation]:
        """Hand over all requests behind the pause, let them run, note what came."""
        calls = [
            asyncio.ensure_future(self.engine.generate(**request, priority=-number))
            for number, request in enumerate(requests)
        ]
        num_samples = sum(request["sampling_params"].get("n", 1) for request in requests)
        while (await self.engine.status()).num_waiting < num_samples:
            for call in calls:
                if call.done():
                    raise RuntimeError(f"{name}: ended behind a pause: {call.result()}")
            await asyncio.sleep(0.002)
        await self.engine.resume()
        pieces = list(itertools.chain.from_iterable(await asyncio.gather(*calls)))
        await self.engine.pause("drain")
        for number, piece in enumerate(pieces):
            self._note_generation(f"{name}.{number}", piece)
        if metrics:
            found = await self.engine.metrics()
            self.note(f"{name}.metrics", [f"{metric}={found[metric]:g}" for metric in METRICS])
        return pieces

    async def note_weights(self, name: str) -> None:
        """Digests, and bytes read back."""
        digests = await self.engine.digest()
        self.note(f"{name}.digest", [f"{tensor}={digests[tensor]}" for tensor in sorted(digests)])
        tensors = {tensor: await self.engine.get_weights_by_name(tensor) for tensor in sorted(digests)}
        self.note(f"{name}.read", [f"{tensor}={_bytes_digest(value)}" for tensor, value in tensors.items()])

    def note(self, name: str, values: list[Any]) -> None:
        self.values[name] = [_as_bits(value) for value in values]

    def _note_generation(self, name: str, piece: Generation) -> None:
        self.note(f"{name}.ids", piece.token_ids)
        for field in ("logprobs", "prompt_logprobs"):
            self.note(f"{name}.{field}", getattr(piece, field))
        for field in ("top_logprobs", "token_ids_logprobs", "prompt_top_logprobs", "prompt_token_ids_logprobs"):
            tables = getattr(piece, field)
            self.note(f"{name}.{field}", [table and [list(item) for item in table.items()] for table in tables])
        ends = ("finish_reason", "matched", "text", "seed", "logprob_mode", "prompt_logprob_mode")
        counts = ("num_prompt_tokens", "num_cached_tokens", "num_preemptions")
        self.note(f"{name}.end", [getattr(piece, field) for field in (*ends, *counts)])
        spans: list[list[Any]] = [piece.version_spans, piece.version_epochs, piece.prompt_version_spans]
        self.note(f"{name}.spans", [[list(span) if isinstance(span, tuple) else span for span in row] for row in spans])


def _as_bits(value: Any) -> Any:
    """A float as its bits in words that JSON keeps."""
    if isinstance(value, float):
        return value.hex()
    return [_as_bits(item) for item in value] if isinstance(value, list) else value


def _bytes_digest(tensor: torch.Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype}{list(tensor.shape)}{hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"


# --- requests


def prompt_ids(seed: int, length: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(VOCAB_SIZE - 7) for _ in range(length)]


def request(ids: list[int], num_tokens: int, options: Request | None = None, **params: Any) -> Request:
    params = {"max_new_tokens": num_tokens, "seed": 1000 + len(ids), "ignore_eos": True} | params
    return {"input_ids": [ids], "sampling_params": params} | (options or {})


ASKED = [5, 77, 260]
PROCESSORS: tuple[tuple[dict[str, Any], Request], ...] = (
    ({"temperature": 0.0}, {}),
    ({}, {"logprob_mode": "raw"}),
    ({"temperature": 0.7, "n": 3}, {}),
    ({"temperature": 1.4, "top_k": 12}, {"logprob_mode": "sampled"}),
    ({"top_p": 0.8}, {"logprob_mode": "sampled", "top_logprobs": 4}),
    ({"min_p": 0.05, "top_k": 40, "top_p": 0.95}, {"logprob_token_ids": ASKED}),
    ({"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}, {"logprob_mode": "sampled"}),
    ({"temperature": 0.0, "repetition_penalty": 0.8, "frequency_penalty": 1.5}, {"top_logprobs": 3}),
    ({"logit_bias": {5: 6.0, 77: 5.5, 9: -10000.0}}, {"logprob_mode": "sampled", "logprob_token_ids": ASKED}),
    ({"stop_token_ids": list(range(0, 200, 3)), "min_new_tokens": 6}, {"logprob_mode": "sampled", "top_logprobs": 2}),
    ({"ignore_eos": False, "logit_bias": {EOS_ID: 7.0}, "min_new_tokens": 3}, {}),
    ({"temperature": 0.0}, {"return_prompt_logprobs": True, "top_logprobs": 2, "logprob_token_ids": ASKED}),
    ({"temperature": 0.9}, {"return_prompt_logprobs": True, "logprob_start": 9, "prompt_logprob_mode": "temperature"}),
    ({"max_new_tokens": 0}, {"return_prompt_logprobs": True, "top_logprobs": 3}),
)
LENGTHS = (1, 17, 33, 5, 64, 12, 90, 3, 28, 16, 40, 21, 50, 75)


async def ask_everything(session: Session) -> None:
    """Every processor and kind of score in one batch; then prefixes of it, continued; then other weights and back."""
    folder, other = (checkpoint(session.model, session.root, seed) for seed in (0, 1))
    files = [path / file for path in (folder, other) for file in ("config.json", "model.safetensors")]
    session.note("checkpoints", [hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    prompts = [prompt_ids(number, length) for number, length in enumerate(LENGTHS)]
    pieces = await session.batch("processors", _processor_requests(prompts, 14))
    firsts = [piece for piece in pieces if piece.index == 0]
    await session.batch("prefixes", _prefix_requests(prompts, firsts))
    await _ask_updates(session, folder, other, prompts)


def _processor_requests(prompts: Sequence[list[int]], num_tokens: int) -> list[Request]:
    return [
        request(prompt, num_tokens + number % 5, options, **params)
        for number, (prompt, (params, options)) in enumerate(zip(prompts, PROCESSORS, strict=True))
    ]


def _prefix_requests(prompts: Sequence[list[int]], firsts: Sequence[Generation]) -> list[Request]:
    """Prompts of before: the same again, longer, scored, apart by their key, and continued from their own output."""
    penalised = prompts[6] + firsts[6].token_ids
    scored = {"return_prompt_logprobs": True, "top_logprobs": 1}
    return [
        request(prompts[6], 9, n=2),
        request(prompts[4] + firsts[4].token_ids + prompt_ids(50, 7), 9, temperature=0.0),
        request(prompts[4] + prompt_ids(51, 21), 9, {"top_logprobs": 2}, temperature=0.5),
        request(prompts[13], 0, scored | {"logprob_start": 70}),
        request(prompts[12] + firsts[12].token_ids, 0, scored | {"prompt_logprob_mode": "sampled"}, temperature=0.8),
        request(prompts[4], 6, {"extra_key": "apart"}),
        request(penalised, 6, {"num_output_ids_in_prompt": len(firsts[6].token_ids)}, **PROCESSORS[6][0]),
    ]


async def _ask_updates(session: Session, folder: Path, other: Path, prompts: Sequence[list[int]]) -> None:
    """A to B by tensors, a part of A, all of A from disk: each digested, read back and generated with."""
    engine, mine, theirs = session.engine, tensors_of(folder), tensors_of(other)
    few = [request(prompts[4], 6, {"top_logprobs": 2}), request(prompts[6], 5, {"return_prompt_logprobs": True})]
    await session.note_weights("cold")
    await _update(session, "tensors", few, engine.update_weights_from_tensor(theirs, "b", mode="shadow"))
    part = {name: tensor for number, (name, tensor) in enumerate(mine.items()) if number % 3 == 0}
    await _update(session, "partial", few, engine.update_weights_from_tensor(part, "b+", mode="shadow", partial=True))
    await _update(session, "disk", few, engine.update_weights_from_disk(folder, "a", mode="inplace"))


async def _update(session: Session, name: str, requests: Sequence[Request], update: Awaitable[Any]) -> None:
    report = await update
    session.note(f"{name}.report", [report.version, report.epoch, report.num_tensors, report.num_bytes, report.mode])
    await session.note_weights(name)
    await session.batch(name, requests)


async def ask_stop_strings(session: Session) -> None:
    """One request at a time: the front finds a stop string when it comes to it, and others would feel when.

    Letters are made likely, so that strings of one and two of them do come.
    """
    letters: dict[str, Any] = {"logit_bias": {letter: 9.0 for letter in b"abcdefgh"}}
    stops: tuple[dict[str, Any], ...] = (
        {"stop": ["dc", "never"]},
        {"stop": ["gbg", "ffgf"], "no_stop_trim": True},
        {"stop": ["a", "b", "c"], "min_new_tokens": 8},
        {"stop": ["e"], "stop_token_ids": [97, 98]},
        {"stop": ["never"]},
    )
    for number, stop in enumerate(stops):
        prompt = prompt_ids(100 + number, 19 + number)
        await session.batch(f"stop{number}", [request(prompt, 24, **letters, **stop)], metrics=False)


async def ask_device_path(session: Session) -> None:
    """Few tokens, each kind of launch: chunks beside decode rows, a shared prefix, processors, scores."""
    prompts = [prompt_ids(200 + number, length) for number, length in enumerate((1, 27, 9, 5, 6, 4, 7))]
    await session.batch("device", [
        request(prompts[0], 4, temperature=0.0),
        request(prompts[1], 3, n=2),
        request(prompts[2], 3, {"return_prompt_logprobs": True, "top_logprobs": 2}, temperature=0.0),
        request(prompts[3], 4, {"logprob_mode": "sampled"}, top_k=12, top_p=0.9, temperature=0.8),
        request(prompts[4], 4, {"logprob_mode": "sampled"}, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3),
        request(prompts[5], 3, {"logprob_token_ids": ASKED}, logit_bias={5: 3.0, 9: -50.0}),
        request(prompts[6], 3, stop_token_ids=list(range(0, 200, 3)), min_new_tokens=2),
    ])  # fmt: skip
    await session.batch("again", [request(prompts[1] + prompts[2], 2, {"return_prompt_logprobs": True})])
    await session.engine.update_weights_from_tensor(tensors_of(checkpoint(session.model, session.root, 1)), "b")
    await session.note_weights("updated")
    await session.batch("updated", [request(prompts[1], 2, temperature=0.0)])


# --- the set of cases


@functools.cache
def covering_rows() -> tuple[dict[str, Any], ...]:
    """Those of `FACTORS`, which take seconds to find."""
    return tuple(covering(FACTORS))


def covering(factors: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Rows of which any three values of three factors have one: greedily, each row the best of a few drawn ones."""
    names, choose = list(factors), random.Random(0)
    left = {
        tuple(zip(chosen, values, strict=True))
        for chosen in itertools.combinations(names, 3)
        for values in itertools.product(*(factors[name] for name in chosen))
    }
    while left:
        seed = min(left, key=repr)
        rows = [{name: choose.choice(factors[name]) for name in names} | dict(seed) for _ in range(40)]
        covered = [{triple for triple in left if all(row[name] == value for name, value in triple)} for row in rows]
        best = max(range(len(rows)), key=lambda number: len(covered[number]))
        left -= covered[best]
        yield rows[best]


def all_cases() -> list[Case]:
    """Every case, in order; names are unique."""
    cases = []
    for row in (*covering_rows(), *FURTHER):
        model, kernels, dtype = row["model"], row["kernels"], row["dtype"]
        name = "-".join([kernels, dtype, *(f"{key}={row[key]}" for key in list(row)[3:])])
        settings = {**row, **KERNELS[kernels], "max_running_requests": 8}
        del settings["model"], settings["kernels"]
        cases.append(Case(f"engine/{model}/{name}", model, settings, ask_everything))
    for depth, numerics in itertools.product((0, 1), ("fast", "invariant")):
        settings = {"overlap_depth": depth, "numerics": numerics, "dtype": "float32"}
        cases.append(Case(f"stops/depth={depth}-{numerics}", "qwen2-gqa-tied", settings, ask_stop_strings))
    for model, numerics, dtype, depth, extra in (
        ("qwen3-small", "fast", "float32", 1, {}),
        ("qwen3-small", "invariant", "bfloat16", 1, {}),
        ("qwen3-small", "fast", "bfloat16", 0, {"kv_dtype": "fp8_e4m3"}),
        ("llama-small-biases-tied", "invariant", "float32", 0, {}),
        ("llama-small-biases-tied", "fast", "bfloat16", 1, {"prefix_cache": False}),
    ):
        settings = {"numerics": numerics, "dtype": dtype, "overlap_depth": depth, "page_size": 8}
        settings |= {"attention_backend": "triton", "max_running_requests": 5, "max_num_batched_tokens": 16, **extra}
        words = "-".join(["", *map(str, extra.values())])
        cases.append(Case(f"device/{model}/{numerics}-{dtype}-depth={depth}{words}", model, settings, ask_device_path))
    return cases


async def run_case(case: Case, root: Path) -> Values:
    settings = {"kv_pool_tokens": 1024, "device": "cpu", "num_threads": 1, "seed": 0, **case.settings}
    async with AsyncEngine(checkpoint(case.model, root), inprocess=True, **settings) as engine:
        session = Session(engine, case.model, root)
        await engine.pause("keep")
        await case.ask(session)
    return session.values


def run_cases(cases: Sequence[Case], root: Path) -> dict[str, Values]:
    found = {}
    for number, case in enumerate(cases, 1):
        begin = time.perf_counter()
        found[case.name] = asyncio.run(run_case(case, root))
        print(f"{number}/{len(cases)} {case.name} {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return found


# --- what is written, and what differs


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every single value with the path to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from flatten(item, f"{name}[{key}]" if isinstance(value, list) else f"{name} {key}".strip())


def differences(before: Any, after: Any) -> list[str]:
    """A line for each single value that is not the same, or is there on one side only."""
    old, new = dict(flatten(before, "")), dict(flatten(after, ""))
    return [
        f"{path}: {old.get(path, 'nothing')} -> {new.get(path, 'nothing')}"
        for path in [*old, *(path for path in new if path not in old)]
        if path not in old or path not in new or old[path] != new[path]
    ]


def environment() -> dict[str, str]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose names this regular expression finds")
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER, help="where models are kept (%(default)s)")
    options = parser.parse_args(words)
    print(f"the package is {Path(headrace.__file__).parent}", file=sys.stderr)
    cases = [case for case in all_cases() if re.search(options.only, case.name)]
    if not cases:
        parser.error(f"no case is named like {options.only!r}")
    before = json.loads(options.file.read_text()) if options.action == "compare" else None
    if before is not None:
        new = [case.name for case in cases if case.name not in before["cases"]]
        cases = [case for case in cases if case.name not in new]
        print("\n".join(f"not in the record: {name}" for name in new), file=sys.stderr)
    found = {"environment": environment(), "cases": run_cases(cases, options.checkpoints)}
    num_values = sum(1 for _ in flatten(found, ""))
    if before is None:
        options.file.write_text(json.dumps(found, indent=0))
        print(f"{num_values} values of {len(cases)} cases in {options.file}")
        return 0
    before["cases"] = {name: values for name, values in before["cases"].items() if re.search(options.only, name)}
    lines = differences(before, found)
    print("\n".join([*lines, f"{len(lines)} differences in {num_values} values of {len(cases)} cases"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
