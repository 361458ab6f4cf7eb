"""All kernels that some models need on this GPU, as one folder that can be carried.

    python tools/kernels.py build --shape qwen3-0.6b --shape qwen3-8b --out DIR [engine settings]
    headrace serve MODEL --kernel-cache DIR [the same settings]

An engine with dummy weights is started per model, which builds every kernel that a step can need. What is built depends
on the model's sizes, the settings (`--dtype`, `--numerics`, `--page-size` and so on), the GPU, and the versions of
Triton and Headrace: give those that will serve. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from headrace import Engine, __version__
from headrace.bench.models import SHAPES, write_config
from headrace.cli.flags import add_flags, given
from headrace.config import EngineConfig
from headrace.config.kernel_cache import seal
from headrace.types.errors import HeadraceError

SET_HERE = ("model", "tokenizer", "skip_tokenizer_init", "device", "load_format", "kernel_cache")
KV_POOL_TOKENS = 65536
"""Unless given: kernels do not depend on it, and a small pool is made at once."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="kernels.py", description="Build kernels into a folder that can be carried.")
    build = top.add_subparsers(dest="command", required=True).add_parser("build", help="build the kernels of models")
    build.add_argument("--shape", action="append", default=[], choices=sorted(SHAPES), help="a model by its size")
    build.add_argument("--model", action="append", default=[], metavar="FOLDER", help="a model by its folder")
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to build into")
    add_flags(build, EngineConfig, title="engine settings", skip=SET_HERE)
    return top


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; a wrong one ends the process with exit code 2."""
    top = parser()
    arguments = top.parse_args(words)
    if not arguments.shape and not arguments.model:
        top.error("name at least one --shape or --model")
    return arguments


def build(arguments: argparse.Namespace) -> None:
    """Start one engine after another, seal the folder and print its size."""
    folder: Path = arguments.out.resolve()
    settings = {"kv_pool_tokens": KV_POOL_TOKENS, **given(arguments, EngineConfig, skip=SET_HERE)}
    device = ""
    with tempfile.TemporaryDirectory() as configs:
        models = [(shape, str(write_config(Path(configs) / shape, shape))) for shape in arguments.shape]
        models += [(Path(model).resolve().name, model) for model in arguments.model]
        for name, model in models:
            with Engine(
                model,
                device="cuda",
                load_format="dummy",
                skip_tokenizer_init=True,
                kernel_cache=str(folder),
                **settings,
            ) as engine:
                engine.generate(input_ids=[[1, 2, 3]], sampling_params={"max_new_tokens": 2, "ignore_eos": True})
                device = engine.resolved.cuda.name if engine.resolved.cuda is not None else ""
            print(f"{name}: {describe(folder)}", flush=True)
    seal(folder, headrace=__version__, device=device, models=tuple(name for name, _ in models))


def describe(folder: Path) -> str:
    """The number of built kernels and the size of all files below a folder."""
    num_kernels = len(list((folder / "triton").glob("*/*.cubin")))
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{num_kernels} kernels, {num_bytes / 1e6:.1f} MB in {folder}"


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parse(words)
    try:
        build(arguments)
    except HeadraceError as error:
        print(f"kernels: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
