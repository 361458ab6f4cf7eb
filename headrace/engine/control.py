"""What control calls take, checked: versions, choices, time limits, flags, folders. Errors name the field."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, get_args

import msgspec

from headrace.engine.fields import MAX_NAME_LENGTH
from headrace.types.errors import CheckpointError, WeightUpdateError, encodable
from headrace.types.memory import MEMORY_TAGS, MemoryTag
from headrace.types.plain_values import as_choice, as_flag, as_integer, as_list, as_seconds, plain_text
from headrace.types.weights import InFlight, UpdateMode

DEFAULT_UPDATE_TIMEOUT = 600.0
MAX_TAGS = 64


class UpdateTerms(msgspec.Struct, frozen=True):
    """How an update is to come about, checked; see `AsyncEngine.begin_update`."""

    version: str
    mode: UpdateMode
    in_flight: InFlight
    timeout_s: float
    partial: bool = False


def terms_of_part(version: Any, mode: Any, in_flight: Any, timeout: Any) -> UpdateTerms:
    """What a call says that brings a part of an update: None is no version."""
    terms = terms_of(0 if version is None else version, mode, in_flight, timeout)
    return msgspec.structs.replace(terms, version="") if version is None else terms


def terms_of(version: Any, mode: Any, in_flight: Any, timeout: Any, partial: Any = False) -> UpdateTerms:
    """What an update call says, apart from its tensors."""
    is_partial, seconds = as_flag(partial, "partial"), seconds_of(timeout) or DEFAULT_UPDATE_TIMEOUT
    modes = as_choice(mode, get_args(UpdateMode), "mode"), as_choice(in_flight, get_args(InFlight), "in_flight")
    return UpdateTerms(version_of(version), *modes, seconds, is_partial)


def version_of(version: Any) -> str:
    """A version label; an int is accepted."""
    label = plain_text(version)
    if not isinstance(label, str):
        with contextlib.suppress(WeightUpdateError):  # which would speak of integers only
            label = str(as_integer(version, "version", WeightUpdateError))
    if not isinstance(label, str) or not label or len(label) > MAX_NAME_LENGTH or label != encodable(label):
        rule = f"must be text of 1 to {MAX_NAME_LENGTH} characters, or an integer"
        raise WeightUpdateError(f"version {rule}", field="version")
    return label


def folder_of(path: str | Path) -> str:
    """An absolute path, without links."""
    try:
        return str(Path(plain_text(path)).expanduser().resolve())
    except (OSError, RuntimeError, TypeError, ValueError):  # too long, an unknown user, a null character, no path
        raise CheckpointError(f"{path} is not a path on this machine", field="path") from None


def seconds_of(timeout: Any) -> float | None:
    """A time limit; None stands for the default."""
    return None if timeout is None else as_seconds(timeout, "timeout")


def tags_of(tags: Any) -> tuple[MemoryTag, ...]:
    """Tags of memory, each once; none are all."""
    given = (
        () if tags is None else as_list(tags, "tags", f"a list of {', '.join(MEMORY_TAGS)}", MAX_TAGS, takes_sets=True)
    )
    found = [as_choice(tag, MEMORY_TAGS, "tags") for tag in given]
    return tuple(tag for tag in MEMORY_TAGS if tag in found)
