"""The `headrace` command, and `python -m headrace`: what holds from the first moment, before imports that take long.

Owns two things: every standard stream is open, and Ctrl-C ends without a traceback, whatever is being imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import NoReturn

EXIT_INTERRUPTED = 130


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
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(EXIT_INTERRUPTED)


def _open_standard_streams() -> None:
    """Where the caller closed one, its number and its name are the null device."""
    from headrace.ipc.descriptors import keep_standard_numbers

    keep_standard_numbers()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    sys.exit(main())
