"""Data calls: one replica answers, and its answer is passed on as it comes. Owns what is tried again, and where.

A call that broke off before its client had a byte of the answer is asked of another replica: whole answers are held
until they are whole, streams until their first part. After that a call goes on elsewhere from the tokens that there
are (`resumption`), or ends with a typed, retryable error. The connection to a replica that is given up is closed, which
aborts what it still computes: no client gets two answers.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from headrace.cluster.exchange import Exchange
from headrace.cluster.http_parts import Head
from headrace.cluster.messages import REPLICA_HEADER, RequestParts, instance_of, lines_back
from headrace.cluster.metrics import RouterMetrics
from headrace.cluster.options import RouterOptions
from headrace.cluster.policies import Ask
from headrace.cluster.prompts import read_ask, routing_key
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.cluster.resumption import (
    Resumption,
    is_carried,
    is_whole,
)
from headrace.cluster.upstream import BrokenAnswerError, LeftRotationError, UpstreamConnection
from headrace.ipc.codec import DECODE_ERRORS
from headrace.server.errors import event_body
from headrace.types.errors import DeadlineError, HeadraceError, NeedsWeightsError, PauseTimeoutError, UnreachableError
from headrace.types.http import MESSAGE_TYPE, StreamPart, framed

MAX_HELD_BYTES = 256 << 20
"""A larger answer is passed on as it comes."""
_OK, _UNAVAILABLE = 200, 503
_ANY = Ask()
_TYPE = b"content-type"
_SSE_TYPE = b"text/event-stream"
_SSE_GAP = b"\n\n"


class Proxy:
    """Asks replicas until one has answered."""

    def __init__(self, replicas: Replicas, options: RouterOptions, metrics: RouterMetrics) -> None:
        self._replicas = replicas
        self._options = options
        self._data_key = options.data_key
        self._metrics = metrics

    async def pass_on(self, head: Head, body: bytes, exchange: Exchange, *, generates: bool) -> None:
        """Have a call answered. Raises `UnreachableError` when no replica did, `NeedsWeightsError` when none could with
        current weights, `DeadlineError` when one was silent."""
        ask = read_ask(body, head.derived(routing_key)) if generates else _ANY
        mode = self._options.resume
        resumption = Resumption(body, mode, self._options.max_body_bytes) if generates and mode != "off" else None
        try:
            await self._try_each(head, body, exchange, ask, resumption, generates=generates)
        except (UnreachableError, NeedsWeightsError, DeadlineError) as error:
            if not exchange.has_begun or resumption is None:
                raise
            self._metrics.broken_streams.inc()
            await _end_broken(exchange, b"", error)  # the client has some of it

    async def _try_each(
        self,
        head: Head,
        body: bytes,
        exchange: Exchange,
        ask: Ask,
        resumption: Resumption | None,
        *,
        generates: bool,
    ) -> None:
        avoided: set[int] = set()
        reason = ""
        for left in reversed(range(self._options.max_attempts)):
            replica, choice = await self._replicas.choose(ask, avoided)
            if generates:
                self._metrics.count_choice(choice, ask)
            added, sent = ([], body) if resumption is None else resumption.request()
            parts = RequestParts(head, sent, self._data_key, added)
            self._replicas.note_sent(replica, choice)
            try:
                if await self._ask(replica, parts, exchange, resumption, is_last=not left):
                    return
                reason = f"{replica.id} refused it"
            except BrokenAnswerError as error:
                reason = f"{replica.id}: {error.message}"
                self._note_broken(replica, error)
            finally:
                self._replicas.note_answered(replica, choice)
            avoided.add(replica.number)
            self._metrics.retries.inc(min(left, 1))
            if resumption is not None:
                if exchange.has_begun and resumption.is_over:
                    raise UnreachableError(f"the answer is too long to go on elsewhere: {reason}")
                resumption.move()
                self._metrics.resumptions.inc(left > 0 and resumption.has_begun)
        raise UnreachableError(f"no replica answered in {self._options.max_attempts} attempts; the last one: {reason}")

    async def _ask(
        self,
        replica: RemoteReplica,
        parts: RequestParts,
        exchange: Exchange,
        resumption: Resumption | None,
        *,
        is_last: bool,
    ) -> bool:
        """Whether the client has its answer; raises `BrokenAnswerError` if it has nothing of one, or what it has can go
        on elsewhere."""
        try:
            return await self._ask_once(replica, parts, exchange, resumption, fresh=False, is_last=is_last)
        except BrokenAnswerError as error:
            if error.had_begun or not error.was_idle:
                raise
        return await self._ask_once(replica, parts, exchange, resumption, fresh=True, is_last=is_last)

    async def _ask_once(
        self,
        replica: RemoteReplica,
        parts: RequestParts,
        exchange: Exchange,
        resumption: Resumption | None,
        *,
        fresh: bool,
        is_last: bool,
    ) -> bool:
        connection = await replica.upstream.lend(fresh=fresh)
        try:
            if not replica.is_current:  # while it connected
                raise LeftRotationError("it has left the rotation")
            connection.send(parts.head_for(replica), parts.body)
            answer = await connection.read_head()
            if replica.instance and answer.derived(instance_of) not in (b"", replica.instance):
                raise BrokenAnswerError("another process answers there, whose weights are not known", had_begun=True)
            is_stream = answer.body_size is None or answer.body_size > MAX_HELD_BYTES
            if resumption is not None and answer.derived(is_carried):
                return await self._carry(replica, answer, connection, exchange, resumption, is_last=is_last)
            if exchange.has_begun and answer.status == _OK:
                raise BrokenAnswerError("it does not go on with what another one began", had_begun=True)
            if is_stream and not exchange.has_begun:
                await self._stream(replica, answer, connection, exchange)
                return True
            whole = await connection.read_whole()
            if answer.status == _UNAVAILABLE and not is_last and _may_go_elsewhere(whole):
                return False
            if exchange.has_begun:
                raise UnreachableError(f"{replica.id} does not go on with it: it answers {answer.status}")
            exchange.reply(answer.status, [], whole, lines_back(answer, replica))
            return True
        finally:
            replica.upstream.give_back(connection)

    async def _carry(
        self,
        replica: RemoteReplica,
        answer: Head,
        connection: UpstreamConnection,
        exchange: Exchange,
        resumption: Resumption,
        *,
        is_last: bool,
    ) -> bool:
        """Pass on what is told. `BrokenAnswerError` if the replica, or the engine in it, dies: it can go on elsewhere.
        False as of `_ask`."""
        lines, holds = lines_back(answer, replica), is_whole(answer)
        is_complete = False
        with contextlib.ExitStack() as suppressing:
            while part := await connection.read_part():
                told, is_complete, problem = resumption.take(part, is_whole=holds)
                if not holds and not exchange.has_begun and (told or is_complete):
                    exchange.begin(answer.status, answer.header(_TYPE), lines)
                if told:
                    await exchange.send(told)
                if problem:
                    raise BrokenAnswerError(problem, had_begun=True)
                if is_complete:  # that the connection ends now loses nothing
                    suppressing.enter_context(contextlib.suppress(BrokenAnswerError))
        if not is_complete:
            raise BrokenAnswerError("its answer has no end", had_begun=True)
        if not holds:
            exchange.end()
            return True
        status, own, body = resumption.whole()
        if status == _UNAVAILABLE and not is_last and _may_go_elsewhere(body):
            return False
        exchange.reply(status, [*own, (REPLICA_HEADER, replica.id.encode())], body)
        return True

    async def _stream(
        self, replica: RemoteReplica, answer: Head, connection: UpstreamConnection, exchange: Exchange
    ) -> None:
        part = await connection.read_part()
        exchange.begin(answer.status, answer.header(_TYPE), lines_back(answer, replica))
        last = part
        try:
            while part:
                await exchange.send(part)
                last = part
                part = await connection.read_part()
        except (BrokenAnswerError, DeadlineError) as error:
            self._metrics.broken_streams.inc()
            self._note_broken(replica, error)
            told = UnreachableError(f"{replica.id} broke off in the middle of its answer: {error.message}")
            await _end_broken(exchange, last, told)
            return
        exchange.end()

    def _note_broken(self, replica: RemoteReplica, error: HeadraceError) -> None:
        """A connection that breaks puts a replica out of rotation until it is seen healthy."""
        if isinstance(error, BrokenAnswerError) and not isinstance(error, LeftRotationError):
            self._replicas.set_unhealthy(replica, error.message, asyncio.get_running_loop().time())


class _Refusal(msgspec.Struct):
    retryable: bool = False
    err_type: str = ""


def _may_go_elsewhere(body: bytes) -> bool:
    """Whether a 503 is of this replica, as when its engine died or it shuts down. Behind a pause all wait alike."""
    try:
        told = msgspec.json.decode(body, type=_Refusal)
    except DECODE_ERRORS:
        return False
    return told.retryable and told.err_type != PauseTimeoutError.__name__


async def _end_broken(exchange: Exchange, last: bytes, error: HeadraceError) -> None:
    """End a stream, of which `last` came last, with an error, if its type can say that it broke; else the exchange is
    not complete, and the client sees a broken transfer."""
    end = _end_of_broken(exchange.media_type, last, error)
    if end is not None:
        await exchange.send(end)
        exchange.end()


def _end_of_sse(error: HeadraceError) -> bytes:
    return b"data: " + msgspec.json.encode(event_body(error)) + b"\n\ndata: [DONE]\n\n"


def _end_of_broken(media_type: bytes, last: bytes, error: HeadraceError) -> bytes | None:
    """How a stream of this type says that it broke; None for one that cannot."""
    if media_type.startswith(_SSE_TYPE):
        return (b"" if not last or last.endswith(_SSE_GAP) else _SSE_GAP) + _end_of_sse(error)
    if media_type == MESSAGE_TYPE.encode():
        parts = StreamPart(error=error.info()), StreamPart(is_last=True)
        return b"".join(framed(msgspec.msgpack.encode(part)) for part in parts)
    return None
