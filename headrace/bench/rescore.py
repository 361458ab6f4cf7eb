"""Re-scoring: what the engine said of its own tokens, checked by the slow oracle.

Owns the comparison. Sequences of a timed run are run again as known tokens, one at a time, through the `reference`
attention and row operations over the same weights; their log-probabilities must be those the run returned. So no figure
is bought with wrong tokens. What rounding may come to depends on the model, so a narrow dtype is measured against the
oracle in float32, beside the same oracle in the narrow dtype: the engine may err a little more than that one does.
Needs the engine's memory: to be called after it has ended.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.config import EngineConfig, ResolvedConfig, resolve
from headrace.types.errors import InternalError
from headrace.types.plan import SlotInit, StepPlan
from headrace.types.request import Float32Array, TokenSampling
from headrace.types.sampling_params import LogprobMode, LogprobOptions

if TYPE_CHECKING:
    from headrace.runner import Runner

Float64Array = npt.NDArray[np.float64]

NUM_RESCORED = 16


class ScoredSequence(msgspec.Struct, frozen=True):
    """One sample of a run, with the log-probability it gave each of its tokens."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    mode: LogprobMode = "temperature"
    temperature: float = 1.0


FLOAT32_TOLERANCE = 2e-3
"""Of float32 engines: the greatest difference of any token."""

NARROW_MARGIN = 1.5
NARROW_MAX_MARGIN = 3.0
"""Of narrower ones: mean and greatest difference from the float32 oracle, in units of the narrow oracle's own."""

FP8_KV_TOLERANCE = 0.06
"""Mean difference that a KV pool in 8 bits may add. The oracles keep theirs in full."""


def evenly_spaced(num_items: int, num_wanted: int) -> list[int]:
    """At most `num_wanted` indices of `num_items`, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, num_items - 1, min(num_items, num_wanted)).tolist()})


def rescore(
    measured: ResolvedConfig, sequences: Sequence[ScoredSequence], on_progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Score every sequence again with the oracle of `measured`'s model; returns the fields of a report.

    Raises `InternalError` if the log-probabilities differ by more than the tolerance, so that the figure is not shown.
    """
    if not sequences:
        return {"rescored": 0}
    exact, narrow = _oracles(measured, sequences, on_progress)
    said = np.concatenate([np.array(each.logprobs) for each in sequences])
    differences, rounding = np.abs(said - exact), np.abs(narrow - exact)
    mean, largest = float(differences.mean()), float(differences.max())
    max_mean, max_largest = _bounds(measured, rounding)
    if not (mean <= max_mean and largest <= max_largest):  # also when one of them is no number
        raise InternalError(
            f"log-probabilities differ from the reference by {mean:.3g} on average and {largest:.3g} at most, over"
            f" {max_mean:.3g} and {max_largest:.3g}: the figure would be of wrong tokens"
        )
    return {
        "rescored": len(sequences),
        "num_rescored_tokens": len(differences),
        "mean_logprob_difference": float(f"{mean:.3g}"),
        "max_logprob_difference": float(f"{largest:.3g}"),
        "mean_rounding_of_dtype": float(f"{rounding.mean():.3g}"),
        "max_rounding_of_dtype": float(f"{rounding.max():.3g}"),
    }


def _bounds(measured: ResolvedConfig, rounding: Float64Array) -> tuple[float, float]:
    """What the mean and the greatest difference may be; `rounding` is that of the narrow oracle."""
    if measured.dtype == "float32" == measured.kv_dtype:
        return FLOAT32_TOLERANCE, FLOAT32_TOLERANCE
    extra = 0.0 if measured.kv_dtype == measured.dtype else FP8_KV_TOLERANCE
    mean, largest = float(rounding.mean()), float(rounding.max())
    return (
        NARROW_MARGIN * mean + FLOAT32_TOLERANCE + extra,
        NARROW_MAX_MARGIN * largest + FLOAT32_TOLERANCE + 16 * extra,
    )


def _oracles(
    measured: ResolvedConfig, sequences: Sequence[ScoredSequence], on_progress: Callable[[str], None]
) -> tuple[Float64Array, Float64Array]:
    """Log-probabilities of all tokens of all sequences, by the oracle in float32 and in the run's dtype."""
    from headrace.runner import Runner

    on_progress("the reference loads its weights")
    oracle = oracle_settings(measured, max(len(each.prompt) + len(each.token_ids) for each in sequences))
    runners = [Runner(oracle)]
    if oracle.dtype != "float32":
        runners.append(Runner(msgspec.structs.replace(oracle, dtype="float32", kv_dtype="float32")))
        for name, parameter in runners[0].weights.live.items():
            runners[1].weights.live[name].copy_(parameter)
    found: list[list[Float32Array]] = [[], []]
    for number, sequence in enumerate(sequences):
        on_progress(f"re-scoring sequence {number + 1} of {len(sequences)}")
        for scores, runner in zip(found, (runners[-1], runners[0]), strict=True):
            scores.append(_score(runner, number, sequence, oracle.engine.page_size))
    runners.clear()
    _free(oracle.device)
    exact, narrow = (np.concatenate(scores).astype(np.float64) for scores in found)
    return exact, narrow


def oracle_settings(measured: ResolvedConfig, num_tokens: int) -> ResolvedConfig:
    """The same model, weights, dtype and device with the oracle's kernels, for one sequence of `num_tokens`."""
    page_size = measured.engine.page_size
    config = EngineConfig.from_dict(
        {
            "model": measured.folder,
            "device": measured.device,
            "dtype": measured.dtype,
            "load_format": measured.engine.load_format,
            "seed": measured.engine.seed,
            "page_size": page_size,
            "context_length": num_tokens,
            "kv_pool_tokens": -(-num_tokens // page_size) * page_size,
            "max_running_requests": 1,
            "max_num_batched_tokens": num_tokens,
            "overlap_depth": 0,
            "attention_backend": "reference",
            "num_threads": measured.num_threads,
        }
    )
    return resolve(config, Path(measured.folder))


def scoring_plan(step_id: int, sequence: ScoredSequence, page_size: int) -> StepPlan:
    """One row of all tokens but the last, in slot 0 and pages 1, 2, ...; it samples nothing and scores the output."""
    token_ids = np.array(sequence.prompt + sequence.token_ids, np.int32)
    num_computed = len(token_ids) - 1
    columns = np.arange(-(-num_computed // page_size), dtype=np.int32)
    init = SlotInit(
        slot=0,
        seed=0,
        num_prompt_tokens=len(token_ids),
        token_ids=token_ids,
        sampling=TokenSampling(temperature=sequence.temperature),
        logprobs=LogprobOptions(prompt_mode=sequence.mode, prompt_start=len(sequence.prompt)),
        stop_token_ids=(),
        min_length=0,
    )
    return StepPlan(
        step_id=step_id,
        epoch=0,
        new_slots=(init,),
        page_slots=np.zeros_like(columns),
        page_columns=columns,
        page_ids=columns + np.int32(1),
        row_slots=np.zeros(1, np.int32),
        row_starts=np.zeros(1, np.int32),
        row_lengths=np.array([num_computed], np.int32),
        token_ids=token_ids[:-1],
        row_samples=np.zeros(1, np.bool_),
        prefix_groups=np.zeros((0, 3), np.int32),
    )


def _score(runner: Runner, step_id: int, sequence: ScoredSequence, page_size: int) -> Float32Array:
    result = runner.launch(scoring_plan(step_id, sequence, page_size)).wait()
    logprobs = result.prompt_logprobs[0].logprobs
    if not len(logprobs) == len(sequence.token_ids) == len(sequence.logprobs):
        raise InternalError(f"{len(sequence.token_ids)} tokens were to be re-scored, {len(logprobs)} were")
    return logprobs


def _free(device: str) -> None:
    """Give the device's memory back: another engine may come next."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
