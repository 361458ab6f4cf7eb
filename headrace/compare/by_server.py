"""Scores of somebody's server: SGLang's `/generate`, or an OpenAI completion with its prompt scored.

Owns how each is asked, and how its answer is read. A refusal of one trajectory is that one's; one of the key, and a
server that is not there, end the comparison.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httpx
import msgspec

from headrace.compare.options import CompareOptions
from headrace.compare.scores import ScoredTrajectory, scored
from headrace.compare.trajectories import Trajectory
from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.errors import ConfigError, UnreachableError

_MISSING = (404, 405, 501)
_UNAUTHORIZED = (401, 403)
_SHOWN_CHARACTERS = 300
_SAYING = ("message", "error", "detail", "msg")
_MAX_DEPTH = 4


class _Refused(Exception):
    """The server answers, but not so."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(f"HTTP {status}: {' '.join(_message_in(text).split())[:_SHOWN_CHARACTERS]}")


def _message_in(text: str) -> str:
    """What an error says for people, in the forms of OpenAI, SGLang and FastAPI; else all of it."""
    try:
        found = msgspec.json.decode(text)
    except DECODE_ERRORS:
        return text
    for _ in range(_MAX_DEPTH):
        if isinstance(found, list) and found:
            found = found[0]
        elif isinstance(found, dict):
            found = next((found[name] for name in _SAYING if found.get(name)), None)
        elif isinstance(found, str):
            return found
    return text


def score_by_server(
    url: str, trajectories: Sequence[Trajectory], options: CompareOptions, on_progress: Callable[[int], None]
) -> list[ScoredTrajectory]:
    """Raises `ConfigError` for a key that it refuses and for a temperature that it cannot score at, `UnreachableError`
    if it is not there."""
    if options.temperature != 1.0:
        message = "servers give log-probabilities at temperature 1; for another one compare with a folder"
        raise ConfigError(message, field="temperature")
    return asyncio.run(_score_all(url.rstrip("/"), trajectories, options, on_progress))


async def _score_all(
    url: str, trajectories: Sequence[Trajectory], options: CompareOptions, on_progress: Callable[[int], None]
) -> list[ScoredTrajectory]:
    headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}
    async with httpx.AsyncClient(timeout=options.timeout, headers=headers, trust_env=False) as http:
        ask = await _choose(http, url, trajectories[0], options)
        places, done = asyncio.Semaphore(options.concurrency), 0

        async def score(trajectory: Trajectory) -> ScoredTrajectory:
            nonlocal done
            async with places:
                try:
                    found = scored(trajectory, await ask(trajectory))
                except _Refused as refusal:
                    found = ScoredTrajectory(trajectory, [], str(refusal))
            done += 1
            on_progress(done)
            return found

        tasks = [asyncio.create_task(score(each)) for each in trajectories]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Ask(Protocol):
    """Log-probabilities of a sequence's tokens, the last ones last."""

    async def __call__(self, trajectory: Trajectory) -> Sequence[float | None]: ...


async def _choose(http: httpx.AsyncClient, url: str, first: Trajectory, options: CompareOptions) -> _Ask:
    """The way that the server knows."""

    async def native(trajectory: Trajectory) -> Sequence[float | None]:
        return await _ask_native(http, url, trajectory)

    if options.dialect == "sglang":
        return native
    if options.dialect == "auto":
        try:
            await native(first)
        except _Refused as refusal:
            if refusal.status not in _MISSING:
                return native
        else:
            return native
    return await _choose_openai(http, url, first, options)


async def _choose_openai(http: httpx.AsyncClient, url: str, first: Trajectory, options: CompareOptions) -> _Ask:
    model = options.server_model or await _first_model(http, url)

    async def echoed(trajectory: Trajectory) -> Sequence[float | None]:
        return await _ask_echo(http, url, model, trajectory)

    async def with_prompt(trajectory: Trajectory) -> Sequence[float | None]:
        return await _ask_prompt_logprobs(http, url, model, trajectory)

    try:
        await echoed(first)
    except _Refused:
        return with_prompt
    return echoed


async def _ask_native(http: httpx.AsyncClient, url: str, trajectory: Trajectory) -> list[float | None]:
    """Entries may begin with one that has no log-probability, so one token more is asked for."""
    body = {
        "input_ids": trajectory.prompt_ids + trajectory.ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(trajectory.prompt_ids) - 1,
    }
    told = await _call(http, "POST", f"{url}/generate", body)
    entries = _at(told, "meta_info", "input_token_logprobs")
    _check_ids([entry[1] for entry in entries], trajectory)
    return [entry[0] for entry in entries]


async def _ask_echo(http: httpx.AsyncClient, url: str, model: str, trajectory: Trajectory) -> list[float | None]:
    ids = trajectory.prompt_ids + trajectory.ids
    body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 1.0}
    told = await _call(http, "POST", f"{url}/v1/completions", body)
    values: list[float | None] = _at(told, "choices", 0, "logprobs", "token_logprobs")
    if len(values) < len(ids):
        raise _Refused(200, f"{len(values)} log-probabilities came for {len(ids)} tokens that were to be echoed")
    return values[: len(ids)]


async def _ask_prompt_logprobs(
    http: httpx.AsyncClient, url: str, model: str, trajectory: Trajectory
) -> list[float | None]:
    ids = trajectory.prompt_ids + trajectory.ids
    body = {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
    told = await _call(http, "POST", f"{url}/v1/completions", body)
    entries: list[Any] = _at(told, "choices", 0, "prompt_logprobs")
    if len(entries) != len(ids):
        raise _Refused(200, f"{len(entries)} prompt_logprobs came for {len(ids)} tokens")
    pairs = zip(entries, ids, strict=True)
    return [None if entry is None else _at(entry, str(token_id), "logprob") for entry, token_id in pairs]


async def _first_model(http: httpx.AsyncClient, url: str) -> str:
    try:
        return str(_at(await _call(http, "GET", f"{url}/v1/models"), "data", 0, "id"))
    except _Refused as refusal:
        message = f"{url} speaks neither /generate nor OpenAI's /v1/models: {refusal}"
        raise ConfigError(message, field="against") from None


def _check_ids(told: list[Any], trajectory: Trajectory) -> None:
    """What was scored has to be what was sent."""
    ids = (trajectory.prompt_ids + trajectory.ids)[-len(told) :] if told else []
    if told != ids:
        raise _Refused(200, "the ids that came back are not those that were sent")


def _at(value: Any, *path: str | int) -> Any:
    """What an answer has at that place. `_Refused` where it has nothing there."""
    try:
        for each in path:
            value = value[each]
    except (LookupError, TypeError):
        raise _Refused(200, f"the answer has no {'.'.join(map(str, path))}") from None
    if value is None:
        raise _Refused(200, f"{'.'.join(map(str, path))} is null")
    return value


async def _call(http: httpx.AsyncClient, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    try:
        answer = await http.request(method, url, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnreachableError(f"{url}: {type(error).__name__}: {error}", field="against") from None
    if answer.status_code in _UNAUTHORIZED:
        raise ConfigError(f"{url} refuses the key: HTTP {answer.status_code}", field="api_key")
    if answer.status_code != 200:
        raise _Refused(answer.status_code, answer.text)
    try:
        return answer.json()
    except ValueError:
        raise _Refused(200, f"no JSON: {answer.text}") from None
