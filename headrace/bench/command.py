"""`headrace bench`: measure throughput, latency, start, the engine's own overhead, and the prefix cache.

Owns the flags of the benchmarks and how a result is printed: a few lines for a person, or with `--json` one object as
the last line of standard output. The module of a kind says by its `run` what it takes; it is loaded when it is wanted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any, get_type_hints

import msgspec

from headrace.bench.engine_setup import EngineSetup
from headrace.bench.models import SHAPES
from headrace.bench.request_style import RequestStyle
from headrace.bench.rescore import NUM_RESCORED
from headrace.bench.workloads import ScaleChoice
from headrace.cli.flags import add_flags, given
from headrace.config import EngineConfig
from headrace.types.plain_values import as_seconds

_SET_BY_BENCH = ("model", "skip_tokenizer_init", "num_threads")
_SET_BY_OVERHEAD = (*_SET_BY_BENCH, "dtype", "max_running_requests")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="kinds", dest="kind", metavar="KIND", required=True)
    _add_offline(kinds.add_parser("offline", help="tokens per second of a whole workload", allow_abbrev=False))
    _add_online(kinds.add_parser("online", help="streams in a closed loop: time between tokens", allow_abbrev=False))
    _add_serve(kinds.add_parser("serve", help="a whole workload over HTTP, and without it", allow_abbrev=False))
    _add_start(kinds.add_parser("start", help="from starting a process to its first token", allow_abbrev=False))
    _add_overhead(kinds.add_parser("overhead", help="what the engine costs beside the model", allow_abbrev=False))
    _add_prefix_cache(kinds.add_parser("prefix-cache", help="match and insert, per page", allow_abbrev=False))
    for kind in kinds.choices.values():
        kind.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Run one benchmark and print its result; what is running is shown on standard error, in a file line by line."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with console.status("starting") as status:
        benchmark = importlib.import_module(f"headrace.bench.{arguments.kind.replace('-', '_')}")
        options = get_type_hints(benchmark.run)["options"]
        on_progress = status.update if console.is_terminal else console.print
        result = benchmark.run(options(**_fields(arguments, options)), on_progress)
    if arguments.json:
        print(json.dumps(result), flush=True)
    else:
        _print_result(result)
    return 0


def _add_offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=("A", "B", "C"), default="B", help="see docs/benchmarks.md (default: B)")
    parser.add_argument(
        "--vs", dest="versus", choices=("transformers",), help="run the same workload with transformers beside it"
    )
    parser.add_argument("--runs", type=_positive, help="timed runs; the median counts (default: 3)")
    parser.add_argument("--batch-sizes", type=_integers, default=(), help="of transformers' generate(), as 8,16,32")
    parser.add_argument("--concurrencies", type=_integers, default=(), help="of transformers' continuous batching")
    _add_scale(parser)
    _add_common(parser)


def _add_online(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=_positive, help="in all (default: 2000, on a CPU 100)")
    parser.add_argument("--concurrency", type=_positive, help="in flight (default: 256, on a CPU 32)")
    parser.add_argument("--length-divisor", type=_positive, help="divide every length by this (default: 1, on a CPU 8)")
    parser.add_argument("--http", action="store_true", help="stream over HTTP; nothing is re-scored then")
    _add_common(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=("A", "B", "C"), default="A", help="see docs/benchmarks.md (default: A)")
    parser.add_argument("--runs", type=_positive, help="timed runs each way; the median counts (default: 3)")
    _add_scale(parser)
    _add_common(parser)


def _add_start(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--runs", type=_positive, default=3, help="starts with kernels cached (default: 3)")
    add_flags(parser, EngineConfig, title="engine settings", skip=(*_SET_BY_BENCH, "kernel_cache"))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder (default: a random model made on the spot)")
    help_text = f"of the model made on the spot: {', '.join(SHAPES)} (default: small)"
    parser.add_argument("--shape", default="small", help=help_text)
    parser.add_argument("--threads", type=_positive, help="torch threads (default: the engine's own choice)")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="the workload as published (default on a GPU)")
    parser.add_argument("--quick", action="store_true", help="scaled down further, one run: a smoke test")
    parser.add_argument("--num-divisor", type=_positive, help="divide the number of prompts by this")
    parser.add_argument("--length-divisor", type=_positive, help="divide every length by this")


def _add_common(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of requests to a whole engine takes."""
    _add_model(parser)
    text = f"sequences re-scored by the reference (default: {NUM_RESCORED})"
    parser.add_argument("--rescored", dest="num_rescored", type=_count, default=NUM_RESCORED, metavar="N", help=text)
    add_flags(parser, RequestStyle, title="requests")
    add_flags(parser, EngineConfig, title="engine settings", skip=_SET_BY_BENCH)


def _add_overhead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", type=_integers, default=(16, 64, 256, 1024), help="(default: 16,64,256,1024)")
    parser.add_argument("--num-waiting", type=_count, default=10_000, help="requests queued meanwhile (default: 10000)")
    parser.add_argument("--prompt-length", type=_positive, default=512, help="tokens, each its own (default: 512)")
    parser.add_argument("--output-length", type=_positive, default=256, help="mean tokens per request (default: 256)")
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="measured time per batch size (default: 5)")
    parser.add_argument("--http-concurrency", type=_count, default=256, help="in flight; 0: no HTTP (default: 256)")
    parser.add_argument("--stream", action="store_true", help="stream over HTTP")
    add_flags(parser, EngineConfig, title="engine settings", skip=_SET_BY_OVERHEAD)


def _add_prefix_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-sequences", type=_positive, default=100_000, help="(default: 100000)")
    parser.add_argument("--num-tokens", type=_positive, default=1000, help="tokens per sequence (default: 1000)")
    parser.add_argument("--page-size", type=_positive, default=16, help="tokens per page (default: 16)")


def _fields(arguments: argparse.Namespace, options: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of a benchmark's options: flags of the same name, and what several flags say together."""
    found = {name: getattr(arguments, name) for name in options.__struct_fields__ if name in arguments}
    if "setup" in options.__struct_fields__:
        engine = given(arguments, EngineConfig, skip=_SET_BY_BENCH)
        if arguments.threads is not None:
            engine["num_threads"] = arguments.threads
        found["setup"] = EngineSetup(model=arguments.model, shape=arguments.shape, engine=engine)
    if "engine" in options.__struct_fields__:
        found["engine"] = given(arguments, EngineConfig, skip=_SET_BY_OVERHEAD)
    if "style" in options.__struct_fields__:
        found["style"] = RequestStyle(**given(arguments, RequestStyle))
    if "scale" in options.__struct_fields__:
        preset: Any = "full" if arguments.full else "quick" if arguments.quick else None
        found["scale"] = ScaleChoice(preset, arguments.num_divisor, arguments.length_divisor)
        found["runs"] = arguments.runs or (1 if arguments.quick else 3)
    return found


def _positive(text: str) -> int:
    count = _count(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be a positive integer")
    return count


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be an integer, not negative")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return as_seconds(float(text), "it")
    except ValueError as error:  # no number, or one that is refused
        raise argparse.ArgumentTypeError("must be a number of seconds, more than 0") from error


def _integers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("must be integers, as in 8,16,32") from None
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError("must be positive integers")
    return values


def _print_result(result: dict[str, Any], indent: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_result(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")
    sys.stdout.flush()
