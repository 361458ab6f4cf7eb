"""How far a target's log-probabilities are from recorded ones: in all, by weight version, by place in the output."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.compare.scores import ScoredTrajectory
from headrace.types.errors import RequestError

Float64Array = npt.NDArray[np.float64]
NUM_WORST = 5
NUM_SHOWN_REFUSALS = 5


class Gap(msgspec.Struct, frozen=True):
    """Of some tokens. A token's gap is the target's log-probability less the recorded one, in nats.

    mean, mean_abs, p99_abs, max_abs  of the gaps
    kl    an estimate of the divergence of the target from what sampled, in nats per token: the mean of exp(g) - 1 - g
    """

    num_tokens: int
    mean: float
    mean_abs: float
    p99_abs: float
    max_abs: float
    kl: float


class PlaceGap(msgspec.Struct, frozen=True):
    """Of the tokens at places first to last of the output, counted from 0."""

    first: int
    last: int
    gap: Gap


class WorstToken(msgspec.Struct, frozen=True):
    """`line` of the file, `place` behind the prompt."""

    line: int
    place: int
    token_id: int
    version: str
    recorded: float
    scored: float


class Refusal(msgspec.Struct, frozen=True):
    line: int
    message: str


class Comparison(msgspec.Struct, frozen=True):
    """One target. `refused` are the first trajectories that it did not score."""

    target: str
    num_trajectories: int
    num_refused: int
    gap: Gap
    by_version: dict[str, Gap]
    by_place: list[PlaceGap]
    worst: list[WorstToken]
    refused: list[Refusal]


class TokenTable(msgspec.Struct, frozen=True, eq=False):
    """Sampled tokens, one entry each: float64 but for `places` (int64), `versions` and `origins` (line, token id)."""

    recorded: Float64Array
    scored: Float64Array
    places: npt.NDArray[np.int64]
    versions: list[str]
    origins: list[tuple[int, int]]

    @property
    def gaps(self) -> Float64Array:
        return self.scored - self.recorded


def table_of(answers: Sequence[ScoredTrajectory]) -> TokenTable:
    """The sampled tokens of all trajectories that were scored."""
    recorded: list[float] = []
    told: list[float] = []
    places: list[int] = []
    versions: list[str] = []
    origins: list[tuple[int, int]] = []
    for answer in answers:
        if answer.refusal:
            continue
        for place, version in answer.trajectory.sampled():
            recorded.append(answer.trajectory.logprobs[place])
            told.append(answer.logprobs[place])
            places.append(place)
            versions.append(version)
            origins.append((answer.trajectory.line, answer.trajectory.ids[place]))
    return TokenTable(np.array(recorded), np.array(told), np.array(places, np.int64), versions, origins)


def compare(target: str, answers: Sequence[ScoredTrajectory]) -> tuple[Comparison, TokenTable]:
    """The figures of a target, and the tokens that they are of. Raises `RequestError` if it scored none."""
    refused = [Refusal(each.trajectory.line, each.refusal) for each in answers if each.refusal]
    if len(refused) == len(answers):
        raise RequestError(f"{target} scored no trajectory; line {refused[0].line}: {refused[0].message}")
    table = table_of(answers)
    gaps, names = table.gaps, np.array(table.versions, dtype=object)
    by_version = {name: gap_of(gaps[names == name]) for name in dict.fromkeys(table.versions)}
    found = Comparison(
        target,
        num_trajectories=len(answers),
        num_refused=len(refused),
        gap=gap_of(gaps),
        by_version=by_version,
        by_place=by_place(table),
        worst=_worst(table),
        refused=refused[:NUM_SHOWN_REFUSALS],
    )
    return found, table


def gap_of(gaps: Float64Array) -> Gap:
    """Of at least one token. A gap may be minus infinity: the target excludes what was sampled."""
    sizes = np.abs(gaps)
    with np.errstate(over="ignore"):
        kl = np.exp(gaps) - 1.0 - gaps
    # of infinite gaps there is no percentile between two: take the one that is there
    p99 = float(np.sort(sizes)[min(len(sizes) - 1, len(sizes) * 99 // 100)])
    return Gap(len(gaps), float(gaps.mean()), float(sizes.mean()), p99, float(sizes.max()), float(kl.mean()))


def by_place(table: TokenTable) -> list[PlaceGap]:
    """In stretches that double: 0, 1, 2 to 3, 4 to 7, ..."""
    found, first, last = [], 0, 0
    while first <= table.places.max():
        inside = (table.places >= first) & (table.places <= last)
        if inside.any():
            found.append(PlaceGap(first, last, gap_of(table.gaps[inside])))
        first, last = last + 1, max(1, 2 * last + 1)
    return found


def _worst(table: TokenTable) -> list[WorstToken]:
    order = np.argsort(-np.abs(table.gaps), kind="stable")[:NUM_WORST].tolist()
    return [
        WorstToken(
            line=table.origins[index][0],
            place=int(table.places[index]),
            token_id=table.origins[index][1],
            version=table.versions[index],
            recorded=float(table.recorded[index]),
            scored=float(table.scored[index]),
        )
        for index in order
    ]
