"""Files of trajectories: JSON lines, each what was given, what was sampled, and what was said of it.

Owns the plain form and its checks. The log of `headrace.rl.rollout` is read as it is: its lines have these keys, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from headrace.types.errors import ConfigError
from headrace.types.plain_values import TORN_JSON, as_path

NO_VERSION = "unknown"
"""The version of tokens of which the file names none."""


class Trajectory(msgspec.Struct, frozen=True):
    """One line.

    id          its name; of several lines with one name the last counts ("": it is none of several)
    prompt_ids  token ids that were given first; at least one
    ids         token ids behind them
    logprobs    one for each of `ids`, as recorded
    loss_mask   1 for a sampled token, 0 for a given one; []: all are sampled
    spans       ((weight version, number of tokens), ...) summing to len(ids), None for given tokens; []: see `version`
    version     of all tokens, where there are no spans
    line        its number in the file
    """

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    loss_mask: list[int] = []
    spans: list[tuple[str | None, int]] = []
    version: str | None = None
    id: str = ""
    line: int = 0

    def sampled(self) -> Iterator[tuple[int, str]]:
        """(its place in `ids`, its version) of each sampled token."""
        versions = (version for version, count in self.spans or [(self.version, len(self.ids))] for _ in range(count))
        for place, version in enumerate(versions):
            if not self.loss_mask or self.loss_mask[place]:
                yield place, NO_VERSION if version is None else version


def read_trajectories(path: str | Path, limit: int | None = None) -> list[Trajectory]:
    """The trajectories of a file that have sampled tokens, in the order of their first lines; at most `limit`.

    A line that is not whole is left out: whoever wrote it was cut off, and perhaps another went on. Raises
    `ConfigError` (field "trajectories") with the number of the line, and what of it is wrong.
    """
    where = as_path(str(path), "trajectories", ConfigError)
    try:
        lines = where.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}", field="trajectories") from None
    found: dict[object, Trajectory] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            trajectory = _decode(line, number)
        except ValueError as error:
            if str(error) == TORN_JSON or (number == len(lines) and _is_cut(line, error)):
                continue
            raise ConfigError(f"{where}, line {number}: {error}", field="trajectories") from None
        if wrong := _problem(trajectory):
            raise ConfigError(f"{where}, line {number}: {wrong}", field="trajectories")
        found[trajectory.id or number] = trajectory
    chosen = [each for each in found.values() if next(each.sampled(), None) is not None][:limit]
    if not chosen:
        raise ConfigError(f"{where} has no sampled token", field="trajectories")
    return chosen


_decoder = msgspec.json.Decoder(Trajectory)


def _decode(line: bytes, number: int) -> Trajectory:
    """Raises `ValueError` for what is no trajectory."""
    try:
        return msgspec.structs.replace(_decoder.decode(line), line=number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_cut(line: bytes, error: ValueError) -> bool:
    """Whether this is the beginning of a line, not a whole one that is wrong."""
    is_whole = isinstance(error, msgspec.ValidationError)
    return not is_whole and not line.rstrip().endswith(b"}")


def _problem(found: Trajectory) -> str:
    """What is wrong with one that has the right form, or ""."""
    number = len(found.ids)
    if not found.prompt_ids and number:
        return "prompt_ids is empty: nothing says what the first token follows"
    if len(found.logprobs) != number:
        return f"logprobs has {len(found.logprobs)} entries for {number} ids"
    if found.loss_mask and (len(found.loss_mask) != number or not set(found.loss_mask) <= {0, 1}):
        return f"loss_mask must have a 0 or a 1 for each of {number} ids"
    if any(count < 0 for _, count in found.spans) or (found.spans and sum(n for _, n in found.spans) != number):
        return f"spans must sum to {number}, the number of ids"
    if not all(map(math.isfinite, found.logprobs)):
        return "logprobs must be finite"
    if min([*found.prompt_ids, *found.ids], default=0) < 0:
        return "token ids must not be negative"
    return ""
