"""The `headrace` command, and `python -m headrace`: what holds from the first moment, before imports that take long.

Owns two things: every standard stream is open, and Ctrl-C ends without a traceback, whatever is being imported. Until
the command runs it ends the process on the spot: an exception in the middle of an import may be lost in it, or abort
the process. So nothing is imported here that is not part of the interpreter, before that is arranged.
"""

import _signal  # type: ignore[import-not-found]  # `signal` imports more than the interpreter has
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

EXIT_INTERRUPTED = 130
_BY_SIGNAL = 128


def main() -> int:
    """Run the command line. Returns the exit code."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _end_at_once)
    try:
        _open_standard_streams()
        from headrace.cli import main as run
        from headrace.cli.streams import watch_streams

        watch_streams()
        exit_code = run(is_process=True)
    except KeyboardInterrupt:
        print("headrace: interrupted", file=sys.stderr)
        exit_code = EXIT_INTERRUPTED
    if exit_code > _BY_SIGNAL:
        _leave(exit_code)
    return exit_code


def _end_at_once(number: int, frame: object) -> "NoReturn":
    try:
        os.write(2, b"headrace: interrupted\n")
    finally:
        os._exit(EXIT_INTERRUPTED)


_end_at_once.is_of_start = True  # type: ignore[attr-defined]  # what `headrace.cli.main` knows it by


def _leave(exit_code: int) -> "NoReturn":
    """End now: imports may go on in a thread of a start, and an interpreter that ends under them may hang."""
    import contextlib
    import logging

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    logging.shutdown()
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    os._exit(exit_code)


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
