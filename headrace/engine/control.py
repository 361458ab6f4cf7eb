"""What control calls take, checked: versions, choices, time limits, folders. Errors name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from headrace.types.errors import CheckpointError, RequestError, WeightUpdateError
from headrace.types.weights import InFlight, UpdateMode


def version_of(version: Any) -> str:
    """A version label; an int is accepted."""
    if isinstance(version, bool) or not isinstance(version, (str, int)) or version == "":
        raise WeightUpdateError("version must be a non-empty string or an int", field="version")
    return str(version)


def folder_of(path: str | Path) -> str:
    """An absolute path, without links."""
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, a user nobody knows, a null character
        raise CheckpointError(f"{path} is not a path on this machine", field="path") from None


def seconds_of(timeout: Any) -> float | None:
    """A time limit; None stands for the default."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise RequestError("timeout must be a number of seconds greater than 0", field="timeout")
    return float(timeout)


def check_update(mode: Any, in_flight: Any) -> None:
    """Refuse modes of an update that do not exist."""
    check_choice(mode, UpdateMode, "mode")
    check_choice(in_flight, InFlight, "in_flight")


def check_choice(value: Any, choices: Any, field: str) -> None:
    """Refuse what is not one of the strings of a `Literal`."""
    if value not in get_args(choices):
        raise RequestError(f"{field} must be one of {', '.join(get_args(choices))}", field=field)
