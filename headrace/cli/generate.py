"""`headrace generate`: generate text once and print it.

Prompts come from arguments, from JSON lines, or as one prompt from standard input. Text goes to standard output, or
with `--json` one JSON object per sample; progress goes to standard error. Output is in the order of the prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

import msgspec

from headrace.cli.flags import add_flags, given
from headrace.config import EngineConfig
from headrace.engine import AsyncEngine
from headrace.types.errors import RequestError
from headrace.types.generation import Generation
from headrace.types.sampling_params import SamplingParams

_RENAMED = {"seed": "sampling_seed"}
_MAX_CONCURRENT_PROMPTS = 4096


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a `--jsonl` file: text or token ids, and sampling parameters that win over the flags."""

    prompt: str | None = None
    input_ids: list[int] | None = None
    sampling_params: dict[str, Any] = {}
    request_id: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `headrace generate`."""
    parser.add_argument("model", help="a Hugging Face folder or hub id")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; none: standard input is the prompt")
    parser.add_argument("--jsonl", metavar="FILE", help="objects with prompt or input_ids, one per line; - is stdin")
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    parser.add_argument("--chat", action="store_true", help="wrap each prompt as a user message in the chat template")
    parser.add_argument("--top-logprobs", type=int, default=0, metavar="K", help="most probable tokens to report")
    parser.add_argument("--prompt-logprobs", action="store_true", help="score the prompt too")
    add_flags(parser, SamplingParams, title="sampling", rename=_RENAMED)
    add_flags(parser, EngineConfig, title="engine settings", skip=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Generate for every prompt and print."""
    config = EngineConfig.from_dict({"model": arguments.model, **given(arguments, EngineConfig)})
    sampling = given(arguments, SamplingParams, rename=_RENAMED)
    SamplingParams.from_dict(sampling)  # a wrong flag is told before a model is loaded
    prompts = _read_prompts(arguments, sys.stdin)
    asyncio.run(_run(arguments, config, sampling, prompts))
    return 0


def _read_prompts(arguments: argparse.Namespace, stdin: TextIO) -> list[Prompt]:
    if arguments.jsonl is not None:
        if arguments.prompts:
            raise RequestError("prompts are given as arguments and by --jsonl", field="jsonl")
        return _read_lines(arguments.jsonl, stdin)
    if arguments.prompts:
        return [Prompt(prompt=text) for text in arguments.prompts]
    return [Prompt(prompt=stdin.read())]


def _read_lines(source: str, stdin: TextIO) -> list[Prompt]:
    try:
        text = stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{source} cannot be read: {error}", field="jsonl") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON strings may hold what splitlines() takes for line ends
        if not line.strip():
            continue
        try:
            prompt = msgspec.json.decode(line, type=Prompt)
        except msgspec.DecodeError as error:
            raise RequestError(f"{source}, line {number}: {error}", field="jsonl") from None
        if (prompt.prompt is None) == (prompt.input_ids is None):
            raise RequestError(f"{source}, line {number}: exactly one of prompt and input_ids is needed", field="jsonl")
        prompts.append(prompt)
    return prompts


async def _run(
    arguments: argparse.Namespace, config: EngineConfig, sampling: dict[str, Any], prompts: list[Prompt]
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = len(prompts) < 2 or not console.is_terminal
    async with contextlib.AsyncExitStack() as stack:
        with console.status(f"loading {config.model}"):
            engine = await stack.enter_async_context(AsyncEngine(**msgspec.structs.asdict(config)))
        with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
            task = progress.add_task("prompts", total=len(prompts))
            await _generate_all(
                engine, arguments, sampling, prompts, on_done=lambda: progress.advance(task), write=_writer(arguments)
            )


async def _generate_all(
    engine: AsyncEngine,
    arguments: argparse.Namespace,
    sampling: dict[str, Any],
    prompts: list[Prompt],
    *,
    on_done: Callable[[], None],
    write: Callable[[list[Generation]], None],
) -> None:
    """All prompts at once, within a bound; each is written once those before it are."""
    room = asyncio.Semaphore(_MAX_CONCURRENT_PROMPTS)

    async def generate(prompt: Prompt) -> list[Generation]:
        async with room:
            outputs = await _generate_one(engine, arguments, prompt, sampling)
        on_done()
        return outputs

    tasks = [asyncio.create_task(generate(prompt)) for prompt in prompts]
    try:
        for task in tasks:
            write(await task)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _generate_one(
    engine: AsyncEngine, arguments: argparse.Namespace, prompt: Prompt, sampling: dict[str, Any]
) -> Awaitable[list[Generation]]:
    text, input_ids = prompt.prompt, prompt.input_ids
    if arguments.chat and text is not None:
        if engine.tokenizer is None:
            raise RequestError("--chat needs a tokenizer", field="chat")
        text, input_ids = None, engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return engine.generate(
        prompts=text,
        input_ids=input_ids,
        sampling_params=SamplingParams.from_dict({**sampling, **prompt.sampling_params}),
        request_id=prompt.request_id,
        top_logprobs=arguments.top_logprobs,
        return_prompt_logprobs=arguments.prompt_logprobs,
    )


def _writer(arguments: argparse.Namespace) -> Callable[[list[Generation]], None]:
    def write(outputs: list[Generation]) -> None:
        for output in outputs:
            line = msgspec.json.encode(output).decode() if arguments.json else output.text
            print(line, flush=True)

    return write
