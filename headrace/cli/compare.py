"""`headrace compare`: score trajectories again, by a checkpoint or other servers, and print how far they are apart.

Prints a table for each target, or with `--json` one object as the last line. See docs/compare.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.cli.flags import add_flags, given, with_keys
from headrace.compare.options import CompareOptions
from headrace.config import EngineConfig

if TYPE_CHECKING:
    from headrace.compare.gaps import Comparison, Gap
    from headrace.compare.scores import ScoredTrajectory
    from headrace.compare.trajectories import Trajectory

_SET_HERE = ("model", "skip_tokenizer_init", "logprob_mode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trajectories", metavar="FILE", help="JSON lines: a log of rollouts, or prompt_ids, ids, logprobs"
    )
    text = "a checkpoint's folder (or hub id), or the http:// address of a server; may be repeated"
    parser.add_argument("--against", action="append", required=True, metavar="TARGET", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object, the last line of standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture: .png, .svg or .pdf; needs matplotlib")
    add_flags(parser, CompareOptions, title="how it is scored")
    add_flags(parser, EngineConfig, title="engine settings, of folders", skip=_SET_HERE)


def run(arguments: argparse.Namespace) -> int:
    from headrace.compare.gaps import compare
    from headrace.compare.picture import draw_comparisons
    from headrace.compare.trajectories import read_trajectories
    from headrace.telemetry import require_matplotlib

    options = CompareOptions.from_dict(with_keys(given(arguments, CompareOptions), ("api_key",)))
    if arguments.plot:
        require_matplotlib("--plot", Path(arguments.plot))
    trajectories = read_trajectories(arguments.trajectories, options.limit)
    settings = given(arguments, EngineConfig, skip=_SET_HERE)
    found = []
    for target in arguments.against:
        found.append(compare(target, _score(target, trajectories, options, settings)))
        if not arguments.json:
            _print(found[-1][0])
    if arguments.plot:
        draw_comparisons(Path(arguments.plot), found)
    if arguments.json:
        print(msgspec.json.encode({"comparisons": [each for each, _ in found]}).decode(), flush=True)
    return 0


def _score(
    target: str, trajectories: Sequence[Trajectory], options: CompareOptions, settings: dict[str, Any]
) -> list[ScoredTrajectory]:
    from headrace.compare.by_engine import score_by_engine
    from headrace.compare.by_server import score_by_server

    on_progress = _progress(target, len(trajectories))
    if target.startswith(("http://", "https://")):
        return score_by_server(target, trajectories, options, on_progress)
    return score_by_engine(target, trajectories, options.temperature, settings, on_progress)


def _progress(target: str, number: int) -> Callable[[int], None]:
    every = max(1, number // 10)

    def tell(done: int) -> None:
        if done == number or done % every == 0:
            print(f"{target}: {done} of {number} trajectories", file=sys.stderr)

    return tell


def _print(found: Comparison) -> None:
    print(f"{found.target}: {found.num_trajectories - found.num_refused} of {found.num_trajectories} trajectories")
    print(f"  {'':24s} {'tokens':>9s} {'mean gap':>10s} {'mean |gap|':>10s} {'p99':>9s} {'max':>9s} {'KL':>9s}")
    _print_gap("all", found.gap)
    for version, gap in found.by_version.items():
        _print_gap(f"version {version}", gap)
    for each in found.by_place:
        _print_gap(f"places {each.first} to {each.last}", each.gap)
    for token in found.worst[:1]:
        where = f"line {token.line}, place {token.place}, id {token.token_id}"
        print(f"  widest: {where}: recorded {token.recorded:.4f}, scored {token.scored:.4f}")
    for refusal in found.refused:
        print(f"  not scored: line {refusal.line}: {refusal.message}")
    sys.stdout.flush()


def _print_gap(name: str, gap: Gap) -> None:
    numbers = f"{gap.mean:10.2e} {gap.mean_abs:10.2e} {gap.p99_abs:9.2e} {gap.max_abs:9.2e} {gap.kl:9.2e}"
    print(f"  {name[:24]:24s} {gap.num_tokens:9d} {numbers}")
