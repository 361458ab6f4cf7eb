"""One sequence on its way to a caller. Owns its accumulated sample, its text and its stop strings, and decides when a
stop string ended it; knows nothing of how deltas arrive. Lives on the engine's loop, as all its methods must.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from headrace.engine.continuing import joined, num_before, prompt_of
from headrace.engine.pacing import Pacer, Turn
from headrace.engine.requests import GenerateItem
from headrace.engine.sample import Sample
from headrace.engine.text_feed import TextFeed, TextStart
from headrace.text import INLINE_CHARACTERS, run_sized
from headrace.types.errors import HeadraceError, InternalError
from headrace.types.generation import Generation, times_of
from headrace.types.request import Delta, Finish, Request, unpack_ids

logger = logging.getLogger(__name__)

EndKind = Literal["answered", "dropped"]
"""Whether the core has ended the sequence itself, or must be told that the front did."""

_OUR_BUGS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class Stream:
    """An async iterator of what is new about one sequence since the last piece; or, by `result()`, the whole of it.

    A consumer that is slower than the engine gets fewer, larger pieces. Errors of the request raise from both. A
    consumer that stops early must call `cancel()`, which frees the sequence's memory.
    """

    def __init__(
        self,
        item: GenerateItem,
        request: Request,
        text_start: TextStart | None,
        on_end: Callable[[Stream, EndKind], None],
    ) -> None:
        """`text_start` is None for an engine without a tokenizer, whose samples have no text."""
        self.item = item
        self.request = request
        self.listener: Callable[[Stream], None] | None = None
        self.is_done = False
        self.queued_at = time.monotonic()
        self.ended_at = 0.0
        self._text_start = text_start
        self._on_end = on_end
        self.sample = Sample(request)
        self._feed = text_start.feed() if text_start is not None and request.deliver_every else None
        self.abort_message = ""
        """What to say once the core ends it for an abort of ours: it need not travel there and back for each."""
        self._finish: Finish | None = None
        self._matched: str | None = None
        self._error: HeadraceError | None = None
        self._waiters: tuple[asyncio.Future[None], ...] = ()
        self._num_taken_tokens = 0
        self._has_taken_end = False
        self._num_before = num_before(item)
        self._asks_more = item.before is not None or request.logprobs.wants_output_extras
        if item.before is not None:
            self._go_on_from(item.before)

    @property
    def finish_type(self) -> str:
        """Why it has ended; "" while it has not."""
        return "" if self._finish is None else self._finish.type

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's ids, as they went to the core."""
        ids: list[int] = unpack_ids(prompt_of(self.item, self.request)).tolist()
        return ids

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Generation:
        while True:
            piece = self.take()
            if piece is not None:
                return piece
            if self.is_done:
                raise StopAsyncIteration
            await self._wait()

    async def result(self) -> Generation:
        """The finished sample, whatever pieces were taken before."""
        while not self.is_done:
            await self._wait()
        if self._error is not None and not self.item.return_errors:
            raise self._error
        size = self.sample.num_extra_values
        return self._whole() if size <= INLINE_CHARACTERS else await run_sized(size, self._whole)

    def take(self) -> Generation | None:
        """What is new since the last piece, or None. Raises the request's error."""
        if self._error is not None and not self.item.return_errors:
            raise self._error
        start = self._num_taken_tokens
        ends_now = self.is_done and not self._has_taken_end
        if not ends_now and start == len(self.sample.token_ids):
            return None
        self._num_taken_tokens = len(self.sample.token_ids)
        self._has_taken_end = ends_now
        return self._generation(start, self._feed.take() if self._feed else "")

    def cancel(self) -> None:
        """Drop the sequence: nothing more is wanted. Does nothing once it has ended."""
        if not self.is_done:
            self._end("dropped", Finish("abort", message="Cancelled"))

    def on_delta(self, delta: Delta) -> None:
        """What the core sent about this sequence."""
        if self.is_done:
            return
        finish = delta.finish
        if finish is not None and finish.error is not None:
            self._fail(finish.error.to_exception(), "answered")
            return
        try:
            start = len(self.sample.token_ids)
            num_new = self.sample.append(delta)
            if self._feed is not None and self._match(self._feed, start, start + num_new, finish):
                return
            if finish is not None:
                self._end("answered", finish)
            elif num_new:
                self._notify()
        except HeadraceError as error:  # of the tokenizer: these ids have no text
            self._fail(error, "answered" if finish else "dropped")
        except _OUR_BUGS as error:  # must not reach the link: the other sequences go on
            logger.exception("sequence %s failed in the front", self.request.request_id)
            message = f"the front failed on this sequence: {type(error).__name__}: {error}"
            self._fail(InternalError(message), "answered" if finish else "dropped")

    def on_failure(self, error: HeadraceError) -> None:
        """The core is gone or the deadline has passed."""
        self._fail(error, "dropped")

    def _match(self, feed: TextFeed, start: int, stop: int, finish: Finish | None) -> bool:
        """Turn new ids into text; True when a stop string ended the sequence."""
        hides_last = finish is not None and finish.matched is not None and not self.item.params.no_stop_trim
        for position in range(start, stop - 1 if hides_last else stop):
            self._matched = feed.push(self.sample.token_ids[position], self._num_before + position + 1)
            if self._matched is not None:
                self._truncate(feed, position + 1)
                self._end("dropped" if finish is None else "answered", Finish("stop"))
                return True
        if finish is not None:
            self._matched = feed.finish(self._num_before + len(self.sample.token_ids))
            if self._matched is not None:
                self._truncate(feed, len(self.sample.token_ids))
                finish = Finish("stop")
            self._end("answered", finish)
        return finish is not None

    def _truncate(self, feed: TextFeed, num_tokens: int) -> None:
        """A stop string ended with token number `num_tokens` of this engine, or with one before it."""
        num_kept = feed.completing_length(self._ids(num_tokens)) - self._num_before
        self.sample.truncate(max(0, num_kept))  # what was told before stays

    def _ids(self, num_tokens: int) -> array[int]:
        """Those of before, and the first of this engine."""
        ids = self.sample.token_ids[:num_tokens]
        return ids if self.item.before is None else array("i", self.item.before.token_ids) + ids

    def _go_on_from(self, before: Generation) -> None:
        """As if these tokens had come here. Their text has been shown."""
        if self._feed is not None:
            for position, token_id in enumerate(before.token_ids):
                self._feed.push(token_id, position + 1)
            self._feed.take()
        if before.finish_reason is not None:
            self.is_done, self._finish = True, Finish(before.finish_reason)

    def take_before(self) -> Generation | None:
        """What there was before this engine, if anything. It is no part of what `take` gives."""
        self._has_taken_end = self._has_taken_end or self._has_ended_before
        return self.item.before

    @property
    def _has_ended_before(self) -> bool:
        return self.item.before is not None and self.item.before.finish_reason is not None

    def _whole(self) -> Generation:
        """The sample, once it has ended."""
        before = self.item.before
        if before is None:
            return self._generation(0, self._whole_text())
        if self._has_ended_before:
            return before
        return msgspec.structs.replace(joined([before, self._generation(0, "")]), text=self._whole_text())

    def _whole_text(self) -> str:
        text = "" if self._feed is None else self._feed.text
        if self._feed is None and self._text_start is not None and self._finish is not None:
            ids = self._ids(len(self.sample.token_ids))
            is_trimmed = self._finish.matched is not None and not self.item.params.no_stop_trim
            text = self._text_start.whole_text(ids[:-1] if is_trimmed else ids)
        return text

    def _generation(self, start: int, text: str) -> Generation:
        """What there is of the tokens from `start` on, and how it ended if it has."""
        item, request, sample = self.item, self.request, self.sample
        spans, epochs = sample.spans_from(start)
        piece = Generation(  # by keywords that stand here: out of a dictionary it costs three times as much
            request_id=request.request_id,
            index=item.index,
            prompt_index=item.prompt_index,
            token_ids=sample.token_ids[start:].tolist(),
            text=text,
            logprobs=sample.logprobs[start:].tolist(),
            logprob_mode=request.logprobs.output_mode,
            prompt_logprob_mode=request.logprobs.prompt_mode,
            version_spans=spans,
            version_epochs=epochs,
            num_prompt_tokens=sample.num_prompt_tokens,
            num_cached_tokens=sample.num_cached_tokens,
            num_preemptions=sample.num_preemptions,
            seed=request.seed,
        )
        if start and self._finish is None and not self._asks_more:
            return piece
        return msgspec.structs.replace(piece, **self._more_from(start))

    def _more_from(self, start: int) -> dict[str, Any]:
        """The fields that not every piece has."""
        fields = self.sample.more_from(start)
        if (before := self.item.before) is not None:
            fields |= {name: getattr(before, name) for name in ("num_prompt_tokens", "num_cached_tokens")}
        if self.item.refusal is not None:
            fields["seed"] = None
        finish = self._finish
        if finish is not None:
            fields["times"] = times_of(self.queued_at, self.sample.times, self.ended_at)
            fields["finish_reason"], fields["error"] = finish.type, finish.error
            fields["routed_experts"] = self.sample.routed_experts()
            fields["matched"] = finish.matched if self._matched is None else self._matched
            fields["finish_message"] = finish.message or (self.abort_message if finish.type == "abort" else "")
        return fields

    def _fail(self, error: HeadraceError, kind: EndKind) -> None:
        if not self.is_done:
            self._error = error
            self._end(kind, Finish("error", message=error.message, error=error.info()))

    def _end(self, kind: EndKind, finish: Finish) -> None:
        self.is_done = True
        self.ended_at = time.monotonic()
        self._finish = finish
        self._on_end(self, kind)
        self._notify()

    def _notify(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, ()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if self.listener is not None:
            self.listener(self)

    async def _wait(self) -> None:
        """Until there is news. Each caller has a future of its own: one that is cancelled takes no other with it."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters += (waiter,)
        try:
            await waiter
        except asyncio.CancelledError:
            self._waiters = tuple(each for each in self._waiters if each is not waiter)
            raise


def cancel_all(streams: Iterable[Stream]) -> None:
    """Free sequences whose answer nobody reads; those that have ended are left alone."""
    for stream in streams:
        stream.cancel()


@contextlib.contextmanager
def all_or_none(streams: Iterable[Stream]) -> Iterator[None]:
    """The block starts `streams`; when it fails, or is cancelled, none of them goes on."""
    with contextlib.ExitStack() as undoing:
        undoing.callback(cancel_all, streams)
        yield
        undoing.pop_all()


async def whole_samples(streams: Sequence[Stream], note_end: Callable[[], None] | None = None) -> list[Generation]:
    """The finished samples, in the order of `streams`; the first error raises. `note_end` is called for each.

    Each is made as soon as it ends, while others still run: made at the end, all of them keep the caller waiting.
    """
    ended = asyncio.Queue[Stream]()

    def listen(stream: Stream) -> None:
        if stream.is_done:
            ended.put_nowait(stream)

    for stream in streams:
        stream.listener = listen
        listen(stream)
    found: dict[Stream, Generation] = {}
    turn = Turn()
    while len(found) < len(streams):
        await turn.give_way()
        stream = await ended.get()
        found[stream] = await stream.result()
        if note_end is not None:
            note_end()
    return [found[stream] for stream in streams]


class StreamGroup:
    """Many streams read as one, each piece as soon as it is there. For one consumer, which `pacer` wakes if there is
    one."""

    def __init__(self, streams: Iterable[Stream], pacer: Pacer | None = None) -> None:
        self._pacer = pacer
        streams = list(streams)
        self._before = [piece for stream in streams if (piece := stream.take_before()) is not None]
        self._live = set(streams)
        self._ready = OrderedDict((stream, None) for stream in self._live if stream.is_done)  # in order of their news
        self._is_behind = False
        self._waiter: asyncio.Future[None] | None = None
        note = self._note  # one for all
        for stream in self._live:
            stream.listener = note

    async def next_pieces(self) -> list[Generation]:
        """The pieces that are there, waiting for one if there is none; [] once all streams have ended. Of very many
        those of one `Turn`. First comes what there was before this engine, all at once."""
        if self._before:
            before, self._before = self._before, []
            return before
        while self._live:
            if self._is_behind:
                await asyncio.sleep(0)
            if self._ready and (pieces := self._take_some()):
                return pieces
            if self._is_behind or not self._live:
                continue
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return []

    @property
    def has_before(self) -> bool:
        """True when what `next_pieces` gives next was there before this engine."""
        return bool(self._before)

    def rest(self) -> list[Generation]:
        """As `next_pieces`, once every stream has ended and the engine's loop too: in any thread, without waiting."""
        while self._ready:
            pieces = self._take_some()
            if pieces:
                return pieces
        return []

    def cancel(self) -> None:
        """Drop every stream that has not ended."""
        cancel_all(list(self._live))

    def _take_some(self) -> list[Generation]:
        pieces: list[Generation] = []
        turn: Turn | None = None  # of more than one
        while self._ready:
            stream, _ = self._ready.popitem(last=False)
            self._is_behind = bool(self._ready)  # here: `take` may raise
            if stream not in self._live:
                continue
            if stream.is_done:
                self._live.discard(stream)
            piece = stream.take()
            if piece is not None:
                pieces.append(piece)
            if self._is_behind:
                turn = turn or Turn()
                if pieces and turn.is_over:
                    break
        return pieces

    def _note(self, stream: Stream) -> None:
        self._ready[stream] = None
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            return
        if self._pacer is not None:
            self._pacer.wake(waiter)
        else:
            waiter.set_result(None)
