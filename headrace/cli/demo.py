"""`headrace demo`: train a small policy by reinforcement learning, with the engine as its sampler.

Prints a progress line to standard error and the figures, as one JSON object, as the last line of standard output.
"""

from __future__ import annotations

import argparse
import json

from headrace.cli.flags import add_flags, given
from headrace.rl.demo_options import DemoOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DemoOptions, title="demo settings")


def run(arguments: argparse.Namespace) -> int:
    from headrace.rl.demo import run_demo  # an engine, a client and torch

    print(json.dumps(run_demo(DemoOptions(**given(arguments, DemoOptions)))), flush=True)
    return 0
