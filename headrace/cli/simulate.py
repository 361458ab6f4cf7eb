"""`headrace simulate`: what many replicas would do, without one: router and scheduler as they are, steps by a model.

Prints a line for each number of replicas, or with `--json` one object as the last line. See docs/simulation.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headrace.cli.flags import add_flags, given
from headrace.simulation.options import SimulationOptions, check_replicas

if TYPE_CHECKING:
    from headrace.simulation.figures import RunFigures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "how many, or several numbers as 1,8,64: one run each (default: 1)"
    parser.add_argument("--replicas", type=_integers, default=(1,), metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object, the last line of standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture: .png, .svg or .pdf; needs matplotlib")
    add_flags(parser, SimulationOptions, title="what is simulated")


def run(arguments: argparse.Namespace) -> int:
    from headrace.simulation.picture import draw_run, draw_sweep
    from headrace.simulation.simulator import Simulation
    from headrace.telemetry import require_matplotlib

    options = SimulationOptions.from_dict(given(arguments, SimulationOptions))
    for number in arguments.replicas:
        check_replicas(number, options)
    if arguments.plot:
        require_matplotlib("--plot", Path(arguments.plot))
    runs = []
    for number in arguments.replicas:
        began = time.perf_counter()
        simulation = Simulation(number, options)
        runs.append(simulation.run())
        line = _line(runs[-1])
        print(f"{line}  ({time.perf_counter() - began:.1f} s)", file=sys.stderr if arguments.json else sys.stdout)
        sys.stdout.flush()
    if arguments.plot:
        title = f"{options.profile}, {options.policy}, {options.fronts} front{'s' if options.fronts > 1 else ''}"
        if len(runs) == 1:
            draw_run(Path(arguments.plot), simulation, title)
        else:
            draw_sweep(Path(arguments.plot), runs, title)
    if arguments.json:
        print(msgspec.json.encode({"options": options, "runs": runs}).decode(), flush=True)
    return 0


def _line(run: RunFigures) -> str:
    """One run for a person."""
    tail = "" if run.tail_share is None else f", last tenth {run.tail_share:.0%} of the time"
    lost = f", {run.num_failures} failures, {run.num_asked_again} asked again" if run.num_failures else ""
    warning = "; ITS FRONT DOES NOTHING BUT LOOK AT REPLICAS" if run.front_look_share >= 1 else ""
    return (
        f"{run.num_replicas} replicas: {run.generating_tokens_per_second:,.0f} tokens/s generating, busy"
        f" {run.busy_share:.0%}{tail}, hits {run.hit_rate:.1%} (one cache {run.one_cache_hit_rate:.1%}), update"
        f" {run.update_seconds:.2f} s, front {run.front_busy_share + run.front_look_share:.0%} of a core{lost}{warning}"
    )


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("must be numbers, as in 1,8,64") from None
