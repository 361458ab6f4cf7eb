"""`headrace bench`: measure throughput, the engine's own overhead, and the prefix cache.

Owns the flags of the benchmarks and how a result is printed: a few lines for a person, or with `--json` one object as
the last line of standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from headrace.bench.workloads import CPU_SCALE, FULL_SCALE, QUICK_SCALE, Scale
from headrace.cli.flags import add_flags, given
from headrace.config import EngineConfig
from headrace.config.resolve import available_cores

_SET_BY_BENCH = ("model", "skip_tokenizer_init", "num_threads", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `headrace bench` and its kinds."""
    kinds = parser.add_subparsers(title="kinds", dest="kind", metavar="KIND", required=True)
    _add_offline(kinds.add_parser("offline", help="tokens per second of a whole workload", allow_abbrev=False))
    _add_overhead(kinds.add_parser("overhead", help="what the engine costs beside the model", allow_abbrev=False))
    _add_prefix_cache(kinds.add_parser("prefix-cache", help="match and insert, per page", allow_abbrev=False))
    for kind in kinds.choices.values():
        kind.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Run one benchmark and print its result; what is running is shown on standard error."""
    from rich.console import Console

    bodies: dict[str, Callable[[argparse.Namespace, Callable[[str], None]], dict[str, Any]]] = {
        "offline": _run_offline,
        "overhead": _run_overhead,
        "prefix-cache": _run_prefix_cache,
    }
    with Console(stderr=True).status("starting") as status:
        result = bodies[arguments.kind](arguments, status.update)
    if arguments.json:
        print(json.dumps(result), flush=True)
    else:
        _print_result(result)
    return 0


def _add_offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=("A", "B", "C"), default="B", help="see docs/benchmarks.md (default: B)")
    parser.add_argument("--vs", choices=("transformers",), help="run the same workload with transformers beside it")
    parser.add_argument("--model", help="a folder (default: a small random model made on the spot)")
    parser.add_argument("--shape", default="small", help="shape of the model made on the spot (default: small)")
    parser.add_argument("--full", action="store_true", help="the workload as published, not scaled down for a CPU")
    parser.add_argument("--quick", action="store_true", help="scaled down further, one run: a smoke test")
    parser.add_argument("--num-divisor", type=int, help="divide the number of prompts by this")
    parser.add_argument("--length-divisor", type=int, help="divide every length by this")
    parser.add_argument("--runs", type=int, help="timed runs; the median counts (default: 3)")
    parser.add_argument("--threads", type=int, help="torch threads, for both engines (default: all cores)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--batch-sizes", type=_integers, default=(), help="of transformers' generate(), as 8,16,32")
    parser.add_argument("--concurrencies", type=_integers, default=(), help="of transformers' continuous batching")
    add_flags(parser, EngineConfig, title="engine settings", skip=_SET_BY_BENCH)


def _add_overhead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", type=_integers, default=(16, 64, 256, 1024), help="(default: 16,64,256,1024)")
    parser.add_argument("--num-waiting", type=int, default=10_000, help="requests queued meanwhile (default: 10000)")
    parser.add_argument("--prompt-length", type=int, default=512, help="tokens, all prompts different (default: 512)")
    parser.add_argument("--output-length", type=int, default=256, help="mean tokens per request (default: 256)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per batch size (default: 5)")
    parser.add_argument("--http-concurrency", type=int, default=256, help="in flight; 0: no HTTP (default: 256)")
    parser.add_argument("--stream", action="store_true", help="stream over HTTP")
    add_flags(parser, EngineConfig, title="engine settings", skip=(*_SET_BY_BENCH, "max_running_requests"))


def _add_prefix_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-sequences", type=int, default=100_000, help="(default: 100000)")
    parser.add_argument("--num-tokens", type=int, default=1000, help="tokens per sequence (default: 1000)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page (default: 16)")


def _run_offline(arguments: argparse.Namespace, on_progress: Callable[[str], None]) -> dict[str, Any]:
    from headrace.bench.offline import OfflineOptions, run_offline

    return run_offline(
        OfflineOptions(
            workload=arguments.workload,
            scale=_scale(arguments),
            model=arguments.model,
            shape=arguments.shape,
            versus=arguments.vs,
            runs=arguments.runs or (1 if arguments.quick else 3),
            num_threads=arguments.threads or available_cores(),
            dtype=arguments.dtype,
            batch_sizes=arguments.batch_sizes,
            concurrencies=arguments.concurrencies,
            engine=given(arguments, EngineConfig, skip=_SET_BY_BENCH),
        ),
        on_progress,
    )


def _run_overhead(arguments: argparse.Namespace, on_progress: Callable[[str], None]) -> dict[str, Any]:
    from headrace.bench.overhead import OverheadOptions, run_overhead

    return run_overhead(
        OverheadOptions(
            batch_sizes=arguments.batch_sizes,
            num_waiting=arguments.num_waiting,
            prompt_length=arguments.prompt_length,
            output_length=arguments.output_length,
            seconds=arguments.seconds,
            http_concurrency=arguments.http_concurrency,
            stream=arguments.stream,
            engine=given(arguments, EngineConfig, skip=_SET_BY_BENCH),
        ),
        on_progress,
    )


def _run_prefix_cache(arguments: argparse.Namespace, on_progress: Callable[[str], None]) -> dict[str, Any]:
    from headrace.bench.prefix_cache import run_prefix_cache

    return run_prefix_cache(
        num_sequences=arguments.num_sequences,
        num_tokens=arguments.num_tokens,
        page_size=arguments.page_size,
        on_progress=on_progress,
    )


def _scale(arguments: argparse.Namespace) -> Scale:
    scale = FULL_SCALE if arguments.full else QUICK_SCALE if arguments.quick else CPU_SCALE
    return Scale(arguments.num_divisor or scale.num_divisor, arguments.length_divisor or scale.length_divisor)


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
