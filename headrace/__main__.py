"""The `headrace` command, and `python -m headrace`: what holds from the first moment, before imports that take long.

Owns three things: every standard stream is open; what cannot be written to one is lost where it is only news, and a
plain error where it is the answer; and Ctrl-C ends without a traceback, whatever is being imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import Any, NoReturn, TextIO, cast

EXIT_INTERRUPTED = 130


class _Answer:
    """Standard output. A write that fails is an error of the command, and whatever is left then goes nowhere: at the
    end of the process it would fail again. A reader that has gone stays a `BrokenPipeError`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

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
        from headrace.types.errors import HeadraceError

        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise error
        raise HeadraceError(f"standard output cannot be written: {error.strerror}", field="stdout") from error


class _News:
    """Standard error. A full disk or a reader that has gone ends nobody: there is just nothing to see."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def main() -> int:
    """Run the command line. Returns the exit code."""
    try:
        _open_standard_streams()
        from headrace.cli import main as run

        exit_code = run()
    except KeyboardInterrupt:
        print("headrace: interrupted", file=sys.stderr)
        exit_code = EXIT_INTERRUPTED
    if exit_code == EXIT_INTERRUPTED:
        _leave()
    return exit_code


def _leave() -> NoReturn:
    """End now: imports may go on in a thread of a start, and an interpreter that ends under them may hang."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.shutdown()
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    os._exit(EXIT_INTERRUPTED)


def _open_standard_streams() -> None:
    """Where the caller closed one, its number and its name are the null device. Failing writes: see above."""
    from headrace.ipc.descriptors import keep_standard_numbers

    keep_standard_numbers()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    sys.stdout, sys.stderr = cast(TextIO, _Answer(sys.stdout)), cast(TextIO, _News(sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
