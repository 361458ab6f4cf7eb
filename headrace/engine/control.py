"""What control calls take, checked: versions, choices, time limits, flags, folders. Errors name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from headrace.engine.fields import MAX_NAME_LENGTH
from headrace.types.errors import CheckpointError, RequestError, WeightUpdateError
from headrace.types.plain_values import as_choice, as_integer, as_seconds
from headrace.types.weights import InFlight, UpdateMode


def version_of(version: Any) -> str:
    """A version label; an int is accepted."""
    label = version if isinstance(version, str) else str(as_integer(version, "version", WeightUpdateError))
    if not label or len(label) > MAX_NAME_LENGTH or not _is_text(label):
        rule = f"must be text of 1 to {MAX_NAME_LENGTH} characters, or an integer"
        raise WeightUpdateError(f"version {rule}", field="version")
    return label


def folder_of(path: str | Path) -> str:
    """An absolute path, without links."""
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, TypeError, ValueError):  # too long, an unknown user, a null character, no path
        raise CheckpointError(f"{path} is not a path on this machine", field="path") from None


def seconds_of(timeout: Any) -> float | None:
    """A time limit; None stands for the default."""
    return None if timeout is None else as_seconds(timeout, "timeout")


def check_update(mode: Any, in_flight: Any) -> None:
    """Refuse modes of an update that do not exist."""
    check_choice(mode, UpdateMode, "mode")
    check_choice(in_flight, InFlight, "in_flight")


def check_choice(value: Any, choices: Any, field: str) -> None:
    """Refuse what is not one of the strings of a `Literal`."""
    as_choice(value, get_args(choices), field)


def check_text(value: Any, field: str) -> None:
    """Refuse what is not a short string that can be sent."""
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH or not _is_text(value):
        raise RequestError(f"{field} must be text of at most {MAX_NAME_LENGTH} characters", field=field)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
