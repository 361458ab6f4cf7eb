"""Where sequences enter and leave the front. Owns the live streams by request id, and the deadline of each.

Lives on the engine's loop.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import msgspec

from headrace.engine.client import CoreClient
from headrace.engine.continuing import check_made, ids_of, prompt_of, rest_of
from headrace.engine.lookback import Lookback
from headrace.engine.pacing import Turn
from headrace.engine.requests import GenerateItem, RequestBuilder
from headrace.engine.stream import EndKind, Stream, all_or_none
from headrace.engine.text_feed import TextStart
from headrace.text import Tokenizer
from headrace.types.errors import DeadlineError, HeadraceError, RequestError
from headrace.types.request import Request, unpack_ids


class Intake:
    """Turns items into streams on one core, and finds live ones by request id."""

    def __init__(
        self,
        client: CoreClient,
        builder: RequestBuilder,
        tokenizer: Tokenizer | None,
        request_timeout: float | None,
        lookback: Lookback,
    ) -> None:
        self._client = client
        self._lookback = lookback
        self._builder = builder
        self._tokenizer = tokenizer
        self._request_timeout = request_timeout
        self._live: dict[str, dict[int, Stream]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._last_start: tuple[Request, TextStart] | None = None
        self._end = self._on_end  # one method object for all streams

    def submit(self, item: GenerateItem) -> Stream:
        """Send one sequence. Raises `RequestError` naming the field (with `return_errors` its stream does), or that
        the core is gone."""
        self._client.check_alive()
        if not item.request_id:
            item = msgspec.structs.replace(item, request_id=uuid.uuid4().hex)
        if item.refusal is not None:
            return self._refused(item, item.refusal.to_exception())
        try:
            if item.index in self._live.get(item.request_id, ()):
                raise _name_in_use(item.request_id)
            item = self._builder.prepare(item)
            if item.before is not None:
                check_made(item)
                self._builder.check_before(ids_of(item.before))
                if item.before.finish_reason is not None:
                    return self._ended(item)
            request = self._builder.build(item if item.before is None else rest_of(item), self._client.new_handle())
        except RequestError as error:
            if not item.return_errors:
                raise
            return self._refused(item, error)
        start = None if self._tokenizer is None else self._text_start(self._tokenizer, item, request)
        stream = Stream(item, request, start, self._end)
        self._client.submit(request, stream)
        self._live.setdefault(item.request_id, {})[item.index] = stream
        if self._request_timeout is not None:
            timer = asyncio.get_running_loop().call_later(self._request_timeout, self._expire, stream)
            self._timers[request.handle] = timer
        return stream

    async def submit_all(self, items: Sequence[GenerateItem]) -> list[Stream]:
        """Send many sequences, or none: a name in use is found before the first one goes. Very many leave the loop to
        others now and then."""
        taken = {item.request_id for item in items}.intersection(self._live)
        for item in items:
            if item.request_id in taken and not item.return_errors:
                raise _name_in_use(item.request_id)
        streams, turn = list[Stream](), Turn()
        with all_or_none(streams):
            for item in items:
                await turn.give_way()
                is_taken = item.request_id in taken and item.refusal is None
                streams.append(self._refused(item, _name_in_use(item.request_id)) if is_taken else self.submit(item))
        return streams

    def abort(self, request_id: str | None, *, prefix: bool, everything: bool, message: str) -> int:
        """Ask the core to end the named live sequences now. Returns how many there were."""
        streams = self._named(request_id, prefix, everything)
        for stream in streams:
            stream.abort_message = message
        self._client.abort([stream.request.handle for stream in streams], "")
        return len(streams)

    def _refused(self, item: GenerateItem, error: HeadraceError) -> Stream:
        """A stream that ends with `error` at once, and is never among the live ones."""
        item = msgspec.structs.replace(item, refusal=error.info())
        stream = Stream(item, self._builder.refused(item, self._client.new_handle()), None, lambda *_: None)
        stream.on_failure(error)
        return stream

    def _ended(self, item: GenerateItem) -> Stream:
        """A stream of a sample that had ended before, and is never among the live ones."""
        return Stream(item, self._builder.refused(item, self._client.new_handle()), None, lambda *_: None)

    def _text_start(self, tokenizer: Tokenizer, item: GenerateItem, request: Request) -> TextStart:
        """The samples of one prompt come one after the other and share it."""
        num_resumed, prompt = item.num_output_ids_in_prompt, prompt_of(item, request)
        like: TextStart | None = None
        if self._last_start is not None:
            last, start = self._last_start
            is_same_cut = last.num_output_ids_in_prompt == num_resumed and last.prompt is prompt
            like = start if start.params is item.params else None
            if like is not None and is_same_cut and start.shown == item.shown_tokens:
                return start
        prompt_ids = unpack_ids(prompt)
        cut = len(prompt_ids) - num_resumed
        resumed = prompt_ids[cut:].data
        start = TextStart(tokenizer, item.params, resumed, prompt_ids[:cut], item.shown_tokens, like)
        self._last_start = request, start
        return start

    def _named(self, request_id: str | None, prefix: bool, everything: bool) -> list[Stream]:
        if everything:
            groups = list(self._live.values())
        elif not isinstance(request_id, str) or not request_id:
            raise RequestError("abort needs a request_id, or all=True", field="request_id")
        elif prefix:
            groups = [streams for name, streams in self._live.items() if name.startswith(request_id)]
        else:
            groups = [self._live.get(request_id, {})]
        return [stream for streams in groups for stream in streams.values()]

    def _expire(self, stream: Stream) -> None:
        message = f"the request took longer than request_timeout {self._request_timeout:g} s"
        stream.on_failure(DeadlineError(message, field="request_timeout"))

    def _on_end(self, stream: Stream, kind: EndKind) -> None:
        request = stream.request
        self._client.drop(request.handle, is_answered=kind == "answered")
        self._lookback.note_end(stream)
        streams = self._live.get(request.request_id)
        if streams is not None:
            streams.pop(stream.item.index, None)
            if not streams:
                del self._live[request.request_id]
        timer = self._timers.pop(request.handle, None)
        if timer is not None:
            timer.cancel()


def _name_in_use(request_id: str) -> RequestError:
    return RequestError(f"request_id {request_id!r} is in use by a live request", field="request_id")
