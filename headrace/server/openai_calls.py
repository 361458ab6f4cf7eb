"""One call of an OpenAI route while it runs: its sequences, its identity and its token counts."""

from __future__ import annotations

import functools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from headrace.engine import GenerateItem, Stream
from headrace.engine.bounds import check_body
from headrace.engine.chat import chat_finish
from headrace.engine.pacing import Turn
from headrace.engine.stream import all_or_none, cancel_all
from headrace.server.carrying import Carriage
from headrace.server.errors import FieldNames
from headrace.server.native_reply import weight_versions
from headrace.server.openai_logprobs import TokenWriter, prompt_logprobs
from headrace.server.openai_types import OpenAiBody
from headrace.server.prompts import check_count
from headrace.server.state import ServerState
from headrace.server.wire import EventStream, encode_json, event
from headrace.text import run_sized
from headrace.types.generation import Generation
from headrace.types.sampling_params import LogprobOptions, SamplingParams

Chunks = Callable[[Generation], list[dict[str, Any]]]
"""The chunks that a piece of one choice brings."""


class Prompt(msgspec.Struct, frozen=True):
    """Token ids (an integer array) and the field they came from, as errors are to name it."""

    ids: Any
    field: str
    num_output: int = 0


class OpenAiCall:
    """The sequences of one call. Choice i is sample i % n of prompt i // n.

    Its name begins those of its sequences and is the id that the client sees, so that aborting the id aborts them all.
    """

    def __init__(
        self,
        state: ServerState,
        body: OpenAiBody,
        kind: str,
        model: str,
        warnings: Sequence[str],
        carriage: Carriage,
    ) -> None:
        self._state = state
        self.body = body
        self.carriage = carriage
        self.request_id = carriage.named(body.rid or body.request_id or f"{kind}-{uuid.uuid4().hex}")
        self.model = model
        self.headers = {"x-headrace-warnings": "; ".join(warnings)} if warnings else {}
        self.created = int(carriage.begun_at)
        self.streams: list[Stream] = []
        self._shown: frozenset[str] = frozenset()
        self._totals: dict[int, tuple[int, int]] = {}
        self._num_tokens: Counter[str] = Counter()
        self._version: str | None = None

    async def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        logprobs: LogprobOptions,
        shown: frozenset[str] = frozenset(),
    ) -> None:
        """Start all sequences, or none. `shown` are special tokens whose text is wanted although others are skipped."""
        self._shown = shown
        check_count(self._state.engine, len(prompts) * params.n, prompts[0].field)
        prompts_asked = ((logprobs, len(prompt.ids), params) for prompt in prompts)
        check_body(prompts_asked, "return_token_ids" if self.body.return_token_ids else "")
        total, first, turn = len(prompts) * params.n, GenerateItem(), Turn()
        key = "extra_key" if self.body.extra_key else "cache_salt"
        with all_or_none(self.streams):
            for number in range(total):
                await turn.give_way()
                position, index = divmod(number, params.n)
                prompt = prompts[position]
                with FieldNames({"input_ids": prompt.field, "extra_key": key}):
                    if index == 0:
                        first = self._state.engine.prepare(self._item(prompt, position, params, logprobs))
                    name = self.request_id if total == 1 else f"{self.request_id}_{number}"
                    item = msgspec.structs.replace(first, index=index, request_id=name)
                    self.streams.append(self._state.submit(self.carriage.item(number, item)))

    async def written(self, make: Callable[[int, Generation], Mapping[str, Any]]) -> list[msgspec.Raw]:
        """All choices as JSON, once they are finished: `make` gives one by its number. Written one by one, and off the
        loop where there is much to write."""
        await self.carriage.follow(lambda: self._state.group(self.streams), self.streams)
        choices: list[msgspec.Raw] = []
        turn = Turn()
        for number, stream in enumerate(self.streams):
            await turn.give_way()
            piece = await stream.result()
            self.count(piece)
            write = functools.partial(_written, make, number, piece)
            choices.append(await run_sized(stream.sample.num_extra_values, write))
        return choices

    async def prompt_scores(self, writer: TokenWriter) -> list[Any] | None:
        """`prompt_logprobs` of a reply to one prompt, once it is finished; None if they are not asked for."""
        count, stream = self.body.prompt_logprobs, self.streams[0]
        if count is None:
            return None
        write = functools.partial(prompt_logprobs, writer, stream, await stream.result(), count)
        return await run_sized(stream.sample.num_extra_values, write)

    def cancel(self) -> None:
        cancel_all(self.streams)

    def event_stream(self, kind: str, begin: Callable[[int], Chunks]) -> EventStream:
        """The streamed answer; `begin` says for each choice, by its number, what a piece of it brings. A client that
        goes away cancels the call."""
        events = self._events(kind, begin)
        return EventStream(events, self.cancel, self._state.metrics.count_disconnect, headers=self.headers)

    async def _events(self, kind: str, begin: Callable[[int], Chunks]) -> AsyncIterator[bytes]:
        group = self.carriage.reading(self._state.group(self.streams), self.streams)
        options = self.body.stream_options
        chunks = {stream.request.request_id: begin(number) for number, stream in enumerate(self.streams)}
        while pieces := await group.next_pieces():
            events: list[bytes] = []
            for piece in pieces:
                self.count(piece)
                events += [event(self._chunk(kind, each, piece)) for each in chunks[piece.request_id](piece)]
            if events:
                yield b"".join(events)
        if options is not None and options.include_usage:
            yield event({**self.envelope(kind, []), "usage": self.usage()})

    def count(self, piece: Generation) -> None:
        """Take a piece into the token counts."""
        self._totals[piece.prompt_index] = (piece.num_prompt_tokens, piece.num_cached_tokens)
        self._num_tokens[piece.request_id] += len(piece.token_ids)
        spans = piece.version_spans or piece.prompt_version_spans
        if spans:
            self._version = spans[-1][0]

    def usage(self) -> dict[str, Any]:
        """Token counts so far; a prompt counts once, however many samples it has."""
        return _usage(self._totals.values(), self._num_tokens.total())

    def _chunk(self, kind: str, choice: Mapping[str, Any], piece: Generation) -> dict[str, Any]:
        """A streamed chunk about one choice, of which `piece` was counted last; with its own counts if asked for."""
        chunk, options = self.envelope(kind, [choice]), self.body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = _usage([self._totals[piece.prompt_index]], self._num_tokens[piece.request_id])
        return chunk

    def envelope(self, kind: str, choices: Sequence[Mapping[str, Any] | msgspec.Raw]) -> dict[str, Any]:
        """What every reply and chunk is wrapped in."""
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "metadata": {"weight_version": self._version or self._state.engine.version},
        }

    def _item(self, prompt: Prompt, position: int, params: SamplingParams, logprobs: LogprobOptions) -> GenerateItem:
        return GenerateItem(
            input_ids=prompt.ids,
            params=params,
            logprobs=logprobs,
            prompt_index=position,
            priority=self.body.priority,
            extra_key=self.body.extra_key or self.body.cache_salt,
            stream=self.body.stream,
            shown_tokens=self._shown,
            num_output_ids_in_prompt=prompt.num_output,
            clip_to_context=self.body.clip_to_context,
        )


def _written(make: Callable[[int, Generation], Mapping[str, Any]], number: int, piece: Generation) -> msgspec.Raw:
    return msgspec.Raw(encode_json(make(number, piece)))


def _usage(prompts: Collection[tuple[int, int]], num_completion_tokens: int) -> dict[str, Any]:
    """`prompts` are numbers of tokens, of all and of the cached ones."""
    num_prompt_tokens = sum(total for total, _ in prompts)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in prompts)},
    }


def choice_extras(call: OpenAiCall, stream: Stream, piece: Generation) -> dict[str, Any]:
    """What a choice says beyond OpenAI's fields, as far as it was asked for."""
    extras: dict[str, Any] = {}
    if call.body.return_token_ids:
        extras["token_ids"] = piece.token_ids
    if call.body.return_meta_info:
        extras["meta_info"] = {
            "id": piece.request_id,
            "version_spans": piece.version_spans,
            "version_epochs": piece.version_epochs,
            "prompt_version_spans": piece.prompt_version_spans,
            "seed": piece.seed,
            "logprob_mode": piece.logprob_mode,
            "cached_tokens": piece.num_cached_tokens,
        }
        if call.carriage.num_moves:
            extras["meta_info"]["num_resumed"] = call.carriage.num_moves
        if not call.body.stream:  # a piece would count from its own first token
            extras["meta_info"]["weight_versions"] = weight_versions(piece.version_spans)
    return extras


def finish_of(piece: Generation, has_tool_calls: bool = False) -> dict[str, Any]:
    """The fields that say why a choice ended; null while it has not."""
    reason = piece.finish_reason
    told = None if reason is None else chat_finish(reason, has_calls=has_tool_calls)
    return {"finish_reason": told, "matched_stop": piece.matched}
