"""`headrace generate`: generate text once and print it.

Prompts come from arguments, from JSON lines, or as one prompt from standard input. Text goes to standard output, or
with `--json` one JSON object per sample; progress goes to standard error. Output is in the order of the prompts. What
is wrong with one prompt is told at the end, and drops no other, unless it can be told before a model is loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

import msgspec

from headrace.cli.flags import add_flags, given
from headrace.cli.streams import print_json
from headrace.config import EngineConfig
from headrace.engine import AsyncEngine
from headrace.telemetry import Progress, ProgressBar
from headrace.types.errors import ErrorInfo, HeadraceError, RequestError
from headrace.types.generation import Generation
from headrace.types.sampling_params import SamplingParams

_RENAMED = {"seed": "sampling_seed"}
_MAX_CONCURRENT_PROMPTS = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HALF_OF_PAIR = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])")


class PromptLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a `--jsonl` file: text or token ids, and sampling parameters that win over the flags."""

    prompt: str | None = None
    input_ids: list[int] | None = None
    sampling_params: dict[str, Any] = {}
    request_id: str | None = None


class Job(msgspec.Struct, frozen=True):
    """A prompt to run; `where` tells errors of it from those of others."""

    prompt: PromptLine
    params: dict[str, Any]
    where: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    config = EngineConfig.from_dict({"model": arguments.model, **given(arguments, EngineConfig)})
    sampling = given(arguments, SamplingParams, rename=_RENAMED)
    asyncio.run(_run(arguments, config, _read_jobs(arguments, sampling, sys.stdin)))
    return 0


def _read_jobs(arguments: argparse.Namespace, sampling: dict[str, Any], stdin: TextIO) -> list[Job]:
    """What is to be run, checked as far as it can be before a model is loaded."""
    SamplingParams.from_dict(sampling)
    if arguments.jsonl is not None:
        if arguments.prompts:
            raise RequestError("prompts are given as arguments and by --jsonl", field="jsonl")
        return _read_lines(arguments.jsonl, sampling, stdin)
    prompts = arguments.prompts or [_read_prompt(stdin)]
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)] if len(prompts) > 1 else [""]
    return [Job(PromptLine(prompt=text), sampling, name) for text, name in zip(prompts, names, strict=True)]


def _read_prompt(stdin: TextIO) -> str:
    try:
        return stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"standard input cannot be read: {error}", field="prompts") from None


def _read_lines(source: str, sampling: dict[str, Any], stdin: TextIO) -> list[Job]:
    try:
        data = stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error}", field="jsonl") from None
    jobs = []
    for number, line in enumerate(data.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            prompt = _read_line(line)
            params = {**sampling, **prompt.sampling_params}
            SamplingParams.from_dict(params)
        except RequestError as error:
            raise _located(error, where) from None
        jobs.append(Job(prompt, params, where))
    return jobs


def _read_line(line: bytes) -> PromptLine:
    try:
        prompt = msgspec.json.decode(line, type=PromptLine)
    except RecursionError:
        raise RequestError("JSON is nested too deeply", field="jsonl") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"JSON is not UTF-8: {error}", field="jsonl") from None
    except msgspec.DecodeError as error:
        is_half = _HALF_OF_PAIR.search(line) and not isinstance(error, msgspec.ValidationError)
        what = "half of a surrogate pair is no text" if is_half else str(error)
        raise RequestError(what, field="jsonl") from None
    if (prompt.prompt is None) == (prompt.input_ids is None):
        raise RequestError("exactly one of prompt and input_ids is needed", field="jsonl")
    return prompt


def _located(error: HeadraceError, where: str, num_others: int = 0) -> HeadraceError:
    """The same error, saying whose it is, and how many more prompts failed."""
    message = f"{where}: {error.message}" if where else error.message
    message += f" ({num_others} more failed)" if num_others else ""
    return ErrorInfo(type(error).__name__, message, error.field).to_exception()


async def _run(arguments: argparse.Namespace, config: EngineConfig, jobs: list[Job]) -> None:
    done: list[Job] = []
    is_seen = sys.stdout is not None and sys.stdout.isatty()  # where the samples are, one by one
    async with AsyncEngine(**msgspec.structs.asdict(config)) as engine:
        bar = ProgressBar(lambda: Progress("prompts", len(done), len(jobs)), is_wanted=len(jobs) > 1 and not is_seen)
        with bar:
            await _generate_all(engine, arguments, jobs, on_done=done.append)


async def _generate_all(
    engine: AsyncEngine, arguments: argparse.Namespace, jobs: list[Job], *, on_done: Callable[[Job], None]
) -> None:
    """All prompts at once, within a bound; each is printed once those before it are. What failed is told then."""
    room = asyncio.Semaphore(_MAX_CONCURRENT_PROMPTS)

    async def generate(job: Job) -> list[Generation]:
        async with room:
            outputs = await _generate_one(engine, arguments, job)
        on_done(job)
        return outputs

    failures: list[tuple[HeadraceError, str]] = []
    tasks = [asyncio.create_task(generate(job)) for job in jobs]
    try:
        for job, task in zip(jobs, tasks, strict=True):
            try:
                outputs = await task
            except RequestError as error:  # of the call, before there were samples
                failures.append((error, job.where))
                continue
            _print(outputs, as_json=arguments.json)
            failures += [(each.error.to_exception(), job.where) for each in outputs if each.error is not None][:1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failures:
        raise _located(*failures[0], num_others=len(failures) - 1)


def _generate_one(engine: AsyncEngine, arguments: argparse.Namespace, job: Job) -> Awaitable[list[Generation]]:
    text, input_ids = job.prompt.prompt, job.prompt.input_ids
    if arguments.chat and text is not None:
        if engine.tokenizer is None:
            raise RequestError("--chat needs a tokenizer", field="chat")
        text, input_ids = None, engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return engine.generate(
        prompts=text,
        input_ids=input_ids,
        sampling_params=job.params,
        request_id=job.prompt.request_id,
        top_logprobs=arguments.top_logprobs,
        return_prompt_logprobs=arguments.prompt_logprobs,
        return_errors=True,
        progress=False,
    )


def _print(outputs: list[Generation], *, as_json: bool) -> None:
    for output in outputs:
        if as_json:
            print_json(output.to_json())
        elif output.error is None:
            print(output.text, flush=True)
