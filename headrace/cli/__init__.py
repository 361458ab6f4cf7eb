"""The `headrace` command: serve, generate, demo, bench, check. Imports no torch until a command needs it."""

from headrace.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
