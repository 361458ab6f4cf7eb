"""The `headrace` command. Owns the list of subcommands, exit codes, and how an error looks to a person.

Exit codes: 0 done, 1 our own bug, 2 a wrong argument or anything Headrace refuses, 3 the engine died, 128 + N ended by
signal N: 130 interrupted, 143 terminated.
An error is one line on standard error; `--debug` adds the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from headrace import __version__
from headrace.cli import check, compare, demo, generate, merge, router, serve, simulate
from headrace.config.machine import check_working_directory
from headrace.telemetry import flush_logs
from headrace.types.errors import EngineDeadError, HeadraceError
from headrace.types.plain_values import meant_by

EXIT_BUG = 1
EXIT_REFUSED = 2
EXIT_DEAD = 3
EXIT_INTERRUPTED = 130
_OWN_SIGNALS = ("serve", "router")
"""Commands that see to signals themselves."""


class _Terminated(KeyboardInterrupt):
    """A signal asks this process to end. It takes the road of Ctrl-C: what is tidied up then is tidied up now."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def main(argv: Sequence[str] | None = None, *, is_process: bool = False) -> int:
    """Run the command line `argv` (the process's own by default). Returns the exit code. Signals are taken only where
    the command is all that this process does."""
    arguments = argparse.Namespace(command="", debug=False)
    try:
        arguments = parse(argv)
        check_working_directory()
        if is_process:
            _take_signals(arguments.command)
        exit_code: int = arguments.run(arguments)
        sys.stdout.flush()
        return exit_code
    except EngineDeadError as error:
        return _report(arguments, error.message, EXIT_DEAD)
    except HeadraceError as error:
        return _report(arguments, error.message, EXIT_REFUSED)
    except _Terminated as error:
        return _report(arguments, "terminated", error.exit_code)
    except KeyboardInterrupt:
        return _report(arguments, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        return EXIT_BUG  # whoever read our output has gone; there is nobody to tell
    except Exception as error:
        return _report(arguments, f"internal error: {type(error).__name__}: {error}", EXIT_BUG)


def _take_signals(command: str) -> None:
    """From here on Ctrl-C is a `KeyboardInterrupt`, not the end on the spot that it is while modules are imported, and
    what else asks a process to end is one too. A signal that was ignored at the start stays so.

    `check` has nothing to end, and imports as it goes. What computes in this process has torch first: it does not
    survive an exception in the middle of its import.
    """
    if command == "check":
        return
    if command in ("bench", "demo", "merge"):
        importlib.import_module("torch")
    if getattr(signal.getsignal(signal.SIGINT), "is_of_start", False):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if command not in _OWN_SIGNALS and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated(number)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; a wrong one ends the process with exit code 2.

    Prompts may stand after flags too, which argparse alone does not allow.
    """
    arguments, rest = build_parser().parse_known_args(argv)
    if rest:
        end = _end_of_flags(rest)
        arguments.prompts.extend(rest[:end] + rest[end + 1 :])
    return arguments


class _Parser(argparse.ArgumentParser):
    """Complains itself of words that it does not know, so that the usage and the hint are those of its subcommand."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in rest[: _end_of_flags(rest)] if word.startswith("-")]
        if flags or (rest and getattr(found, "command", None) != "generate"):
            near = [each for each in map(self._meant, flags) if each]
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found, rest

    def _meant(self, flag: str) -> str:
        """The flag that was meant by one that is none, or ""."""
        known = {each.dest: each.dest.upper() for each in self._actions if not each.option_strings}
        known |= {each.strip("-").replace("-", "_"): each for each in self._option_string_actions}
        return known.get(meant_by(flag.strip("-").replace("-", "_"), known), "")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # the text of --help
        super().exit(status, message)


def _end_of_flags(words: Sequence[str]) -> int:
    """What follows is no flag, whatever it looks like."""
    return words.index("--") if "--" in words else len(words)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, every subcommand and flag."""
    from headrace.bench import command as bench

    parser = _Parser(prog="headrace", description="An LLM rollout engine for reinforcement learning.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    modules = {"serve": serve, "router": router, "generate": generate, "demo": demo, "bench": bench, "check": check}
    modules |= {"merge": merge, "simulate": simulate, "compare": compare}
    for name, module in modules.items():
        summary = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=name, run=module.run)
        module.add_arguments(command)
    return parser


def _report(arguments: argparse.Namespace, message: str, exit_code: int) -> int:
    flush_logs()
    if arguments.debug:
        traceback.print_exc()
    print(f"headrace {arguments.command}".rstrip() + f": {' '.join(message.split())}", file=sys.stderr)
    return exit_code
