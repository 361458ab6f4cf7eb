"""The command line as text: every flag of every command, with its choices. `cli_surface.txt` is the frozen copy.

After a deliberate change: `python -m tests.cli.surface > tests/cli/cli_surface.txt`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from headrace.cli import build_parser


def surface() -> str:
    """One line per flag or positional, sorted within a command."""
    return "\n".join(_lines(build_parser(), "headrace")) + "\n"


def _lines(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    commands: dict[str, argparse.ArgumentParser] = {}
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands.update(action.choices)
            continue
        label = " ".join(action.option_strings) or action.dest
        choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        found.append(f"{name} {label}{choices}")
    yield from sorted(found)
    for command, child in commands.items():
        yield from _lines(child, f"{name} {command}")


if __name__ == "__main__":
    print(surface(), end="")
