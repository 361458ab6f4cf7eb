"""What the command line writes to. Owns how text is encoded and what becomes of a write that fails."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, NoReturn, TextIO, cast

from headrace.types.errors import HeadraceError


def watch_streams() -> None:
    """Put both in place of the standard streams, which are open. What standard output's encoding lacks is escaped, as
    on standard error, unless the user has said what becomes of it."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = cast(TextIO, StandardOutput(sys.stdout)), cast(TextIO, StandardError(sys.stderr))


def print_json(line: bytes) -> None:
    """A line of JSON, which is UTF-8 whatever the encoding of standard output."""
    if isinstance(sys.stdout, (StandardOutput, io.TextIOWrapper)):
        sys.stdout.reconfigure(encoding="utf-8")
    print(line.decode(), flush=True)


class _Stream:
    """What it does not do itself the stream in it does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class StandardOutput(_Stream):
    """Standard output. A write that fails is an error of the command, and whatever is left then goes nowhere: at the
    end of the process it would fail again. A reader that has gone stays a `BrokenPipeError`."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> NoReturn:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise error
        raise HeadraceError(f"standard output cannot be written: {error.strerror}", field="stdout") from error


class StandardError(_Stream):
    """Standard error. A full disk or a reader that has gone ends nobody: there is just nothing to see."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()
