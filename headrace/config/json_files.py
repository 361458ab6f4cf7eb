"""Foreign JSON files of a model folder: read within bounds, and every value checked before it is used.

Owns what a refusal says: the file, the field and what was found there. Must not know what a field means.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.config.json_bounds import MODEL_FILE, JsonBounds, excess
from headrace.types.errors import CheckpointError, UnsupportedModelError

MAX_CONFIG_BYTES = 16 << 20
"""Far above any `config.json`; a file over it is none."""

MOST = 2**31 - 1
"""Of any number in a configuration: sizes are multiplied, and some are 32-bit integers on a device."""


def read_bytes(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """A regular file's bytes. `CheckpointError` for one that is absent, unreadable, over `max_bytes` or a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe nobody writes would block
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is not a regular file", field=path.name)
            data = file.read(max_bytes + 1) if found.st_size <= max_bytes else bytes(max_bytes + 1)
        if data is None:  # some files that call themselves regular have nothing to say now
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", field=path.name) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field=path.name) from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes", field=path.name)
    return data


def is_there(path: Path) -> bool:
    """True for a file that exists. `CheckpointError` for one that may not be looked at."""
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field=path.name) from None


def read_text(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> str:
    """A UTF-8 file's text. Raises as `read_bytes`."""
    return _decoded(read_bytes(path, max_bytes), path)


def read_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES, bounds: JsonBounds = MODEL_FILE) -> dict[str, Any]:
    """The object that a JSON file holds; of a key given twice the last counts. Raises as `read_bytes`, and for one with
    more parts than `bounds`."""
    data = read_bytes(path, max_bytes)
    too_much = excess(data, bounds)
    if too_much is not None:
        raise CheckpointError(f"{path} has {too_much} or more; no model needs so many", field=path.name)
    try:
        parsed = json.loads(_decoded(data, path))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
        raise CheckpointError(f"{path} cannot be read: {error}", field=path.name) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} does not hold an object", field=path.name)
    return parsed


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field=path.name) from None


def shown(value: Any) -> str:
    """A foreign value in a message: short, and without characters that cannot be printed or sent."""
    return reprlib.repr(value)


class Fields:
    """The fields of one JSON object, `file` and `within` being where it stands.

    Each reader returns a value of the right kind or raises `CheckpointError` naming the field. A field that is absent
    has the `default`; so has one that is null where `null=True`. A default of None makes the field required, unless
    null is allowed.
    """

    def __init__(self, values: Mapping[str, Any], file: str, within: str = "") -> None:
        self.values = values
        self.file = file
        self._within = within

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """The refusal of a field's value; a nested field's error names the field it is nested in."""
        found = f"got {shown(self.values[name])}" if name in self.values else "it is missing"
        message = f"{self.file}: {self._path(name)} must be {wanted}, {found}"
        return CheckpointError(message, field=self._within or name)

    def unsupported(self, name: str, why: str) -> UnsupportedModelError:
        """The refusal of a feature that is not implemented."""
        return UnsupportedModelError(f"{self.file}: {self._path(name)} {why}", field=self._within or name)

    def has(self, name: str) -> bool:
        """True for a field that is there and not null."""
        return self.values.get(name) is not None

    def integer(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = MOST, null: bool = False
    ) -> int:
        """A whole number within bounds."""
        value = self._value(name, default, null)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        too_large = isinstance(value, int) and value > most
        raise self.wrong(name, f"{kind} of at most {most}" if too_large else kind)

    def number(self, name: str, default: float | None = None, *, may_be_zero: bool = False) -> float:
        """A finite number over zero, or from zero on."""
        value = self._value(name, default, False)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer that no float can hold
                converted = float(value)
                if math.isfinite(converted) and (converted > 0 or (may_be_zero and converted == 0)):
                    return converted
        raise self.wrong(name, "a finite number of at least 0" if may_be_zero else "a finite number over 0")

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false, and nothing that looks like it."""
        value = self._value(name, default, False)
        if isinstance(value, bool):
            return value
        raise self.wrong(name, "true or false")

    def text(self, name: str, default: str | None = None, *, null: bool = False) -> str:
        """A string of valid Unicode."""
        value = self._value(name, default, null)
        if is_text(value):
            return str(value)
        raise self.wrong(name, "a string")

    def _value(self, name: str, default: Any, null: bool) -> Any:
        value = self.values.get(name, default)
        return default if value is None and null else value

    def _path(self, name: str) -> str:
        return f"{self._within}.{name}" if self._within else name


def is_text(value: Any) -> bool:
    """True for a string that can be encoded: JSON can spell lone surrogates, which can be neither printed nor sent."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
