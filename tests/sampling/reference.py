"""The sampler once more, in plain float64 with a full sort: the oracle of the tests in this folder."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.sampling.noise import gumbel_of, noise_keys, noise_words
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling

Float64Array = npt.NDArray[np.float64]


def log_softmax(row: Float64Array) -> Float64Array:
    shifted = row - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def penalised(row: Float64Array, init: SlotInit, position: int, *, scoring: bool = False) -> Float64Array:
    """Bias, mask and penalties, in that order."""
    sampling, row = init.sampling, row.copy()
    for token, value in sampling.logit_bias:
        row[token] += value
    if scoring:
        return row
    if position < init.min_length:
        row[list(init.stop_token_ids)] = -np.inf
    output = init.token_ids[init.num_prompt_tokens :].tolist()
    for token in set(init.token_ids.tolist()):
        penalty = sampling.repetition_penalty
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in set(output):
        row[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    return row


def kept(row: Float64Array, sampling: TokenSampling) -> npt.NDArray[np.bool_]:
    """Which of the penalised logits survive top-k, top-p and min-p: equal logits live or die together."""
    keep = np.ones(len(row), np.bool_)
    if 0 < sampling.top_k < len(row):
        keep &= row >= np.sort(row)[::-1][sampling.top_k - 1]
    if sampling.top_p < 1.0:
        probabilities = np.exp(log_softmax(np.where(keep, row / sampling.temperature, -np.inf)))
        order = np.argsort(-row, kind="stable")
        reached = int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p))
        keep &= row >= row[order[min(reached, len(row) - 1)]]
    if sampling.min_p > 0.0:
        probabilities = np.exp(log_softmax(row / sampling.temperature))
        keep &= probabilities >= sampling.min_p * probabilities.max()
    return keep


def drawn_from(row: Float64Array, init: SlotInit, position: int, *, scoring: bool = False) -> Float64Array:
    """The log-probabilities the sampler draws from (mode "sampled")."""
    row = penalised(row, init, position, scoring=scoring)
    if init.sampling.temperature == 0.0:
        point = np.full(len(row), -np.inf)
        point[row.argmax()] = 0.0
        return point
    return log_softmax(np.where(kept(row, init.sampling), row / init.sampling.temperature, -np.inf))


def in_mode(row: Float64Array, init: SlotInit, position: int, mode: str, *, scoring: bool = False) -> Float64Array:
    """All log-probabilities of a row in one of the three modes."""
    if mode == "sampled":
        return drawn_from(row, init, position, scoring=scoring)
    if mode == "raw" or init.sampling.temperature == 0.0:
        return log_softmax(row)
    return log_softmax(row / init.sampling.temperature)


def scores(row: Float64Array, init: SlotInit, position: int) -> Float64Array:
    """What Gumbel-max takes the greatest of."""
    keys = noise_keys(np.array([init.seed], np.uint64), np.array([position]))
    noise = gumbel_of(noise_words(keys, np.arange(len(row))[None]))[0]
    return np.asarray(drawn_from(row, init, position) + noise)
