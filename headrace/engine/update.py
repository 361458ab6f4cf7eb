"""Weight updates seen from the front. Owns the upload buffers, which are shared memory: they carry tensors to the core,
large ones in pieces; those of tensors on devices are `DeviceRoad`'s. There are NUM_BUFFERS of each kind and a limit to
their size, whatever is sent. Whoever fills one for a session that is over loses it to the next session.

The caller's iterator of tensors runs wherever the caller is, on a loop of his or on none. So what reads it is told how
to `run` a coroutine on the engine's loop, and awaits nothing else: with a `run` that blocks it never waits, and can be
stepped without a loop (`run_here`). What his code yields has been copied before the next is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Sequence
from types import NoneType
from typing import Any, Protocol, TypeVar

from headrace.engine.calls import outlast
from headrace.engine.client import CoreClient
from headrace.engine.control import UpdateTerms
from headrace.engine.device_export import DeviceExport
from headrace.engine.device_road import DeviceRoad
from headrace.engine.held_tensors import HeldTensors, Listing, are_at_hand
from headrace.engine.lookback import Lookback
from headrace.engine.memory_copy import CopyingThreads
from headrace.engine.tensors import DeviceBytes, NamedTensors, TensorBytes
from headrace.engine.update_log import note_update
from headrace.engine.update_session import UpdateSession, check_session
from headrace.engine.upload_buffers import BufferPool, Fill, Filling, HostMemory, UploadBuffer, in_parts
from headrace.types.errors import DeadlineError, HeadraceError, UnavailableError, WeightUpdateError
from headrace.types.foreign import Payload
from headrace.types.http import TensorPiece
from headrace.types.messages import AbortUpdate, BeginUpdate, CommitUpdate, ExtendUpdate, Stage, StagePayload
from headrace.types.weights import (
    BufferEntry,
    BufferRef,
    DeviceRef,
    TensorInfo,
    UpdateBegun,
    UpdateExtended,
    UpdateReport,
)

logger = logging.getLogger(__name__)

BUFFER_BYTES = 256 << 20
_HOST_ROAD, _DEVICE_ROAD = "shared memory", "device memory"

Result = TypeVar("Result")
Run = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]


class Begin(Protocol):
    """As `Updater.begin`, after what else is open has made way."""

    def __call__(
        self, manifest: tuple[TensorInfo, ...], terms: UpdateTerms, *, follows_up: bool
    ) -> Awaitable[UpdateSession]: ...


class Updater:
    """Opens, fills and ends update sessions on one core. Its coroutines run on the engine's loop."""

    def __init__(
        self,
        client: CoreClient,
        loop: asyncio.AbstractEventLoop,
        lookback: Lookback,
        *,
        shares_process: bool,
        dtype: str = "",
        num_ranks: int = 1,
    ) -> None:
        """`shares_process`: the core is a thread of this process. `dtype` and `num_ranks` are the engine's."""
        self._dtype, self._num_ranks = dtype, num_ranks
        self._client = client
        self._loop = loop
        self._lookback = lookback
        self._threads = CopyingThreads()
        self._host = BufferPool(HostMemory, BUFFER_BYTES)
        self._road = DeviceRoad(client, shares_process=shares_process)
        self._tasks: set[asyncio.Task[Any]] = set()  # uploads, and aborts that nobody awaits
        self._begun: UpdateSession | None = None  # the last one; whichever is open is this one
        self._begun_in: asyncio.Task[Any] | None = None
        self._listed: Listing | None = None  # of the last whole update
        self._freed = asyncio.Event()
        self._fillings: set[Filling] = set()

    async def begin(
        self,
        manifest: tuple[TensorInfo, ...] | None,
        terms: UpdateTerms,
        *,
        is_open: bool = False,
        follows_up: bool = False,
    ) -> UpdateSession:
        """Have the whole manifest checked and a session opened; one that `is_open` is open-ended. None: `stage` lists
        what comes. Every other session is over then. Who `follows_up` at once has the status from what comes next."""
        entries, is_listed = manifest or (), manifest is not None

        def command(call_id: int) -> BeginUpdate:
            policies = terms.mode, terms.in_flight, terms.partial, terms.timeout_s
            return BeginUpdate(call_id, terms.version, entries, *policies, is_open=is_open or not is_listed)

        begun = await (self._client.call if follows_up else self._client.change)(command, UpdateBegun)
        for filling in tuple(self._fillings):
            self._end(filling)
        given = begun.session_id, terms.version, begun.mode, entries, terms.timeout_s, terms.partial
        of_engine: Any = {"dtype": self._dtype, "num_ranks": self._num_ranks}
        self._begun = UpdateSession(*given, is_open=not is_listed, **of_engine)
        self._begun_in = asyncio.current_task()
        return self._begun

    async def extend(self, session: UpdateSession, manifest: tuple[TensorInfo, ...]) -> range:
        """Have more tensors of an open-ended session checked; returns their indices. After one that was cancelled the
        session is of no use: nobody knows whether it has them."""
        extended = await self._client.call(
            lambda call_id: ExtendUpdate(call_id, session.session_id, manifest), UpdateExtended
        )
        session.grow(manifest)
        session.num_missing = extended.num_missing
        return range(extended.first_index, extended.first_index + len(manifest))

    async def commit(self, session: UpdateSession, version: str = "") -> UpdateReport:
        """Make the staged weights live, under the session's label unless another is given. One that is not done in
        time is aborted with its session."""
        check_session(session)
        report = await self._client.change_for_good(
            lambda call_id: CommitUpdate(call_id, session.session_id, version=version), UpdateReport
        )
        note_update(report, session.roads, time.monotonic() - session.begun_at, self._lookback)
        return report

    async def abort(self, session: UpdateSession | None) -> None:
        """Drop the session; None: whichever is open, if one is."""
        if session is not None:
            check_session(session)
        session_id = None if session is None else session.session_id
        await self._client.change(lambda call_id: AbortUpdate(call_id, session_id), NoneType)

    async def abort_quietly(self, session: UpdateSession) -> None:
        """Drop a session after an error, which its caller gets. Neither cancelled nor late: it must not stay open."""
        await outlast(self.abort_at_last(session))

    async def abort_begun_in(self, tasks: Container[asyncio.Task[Any]]) -> None:
        """Drop the session, if it was begun in one of these: nobody brings the rest of it."""
        if self._begun is not None and self._begun_in in tasks:
            await self.abort_quietly(self._begun)

    async def stage(self, run: Run, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """Copy tensors into buffers and send them; ends when the core has copied all of them. What a call sends that
        fails may be sent again, and replaces what came of it: so is it here, where the core cannot map a device's."""
        check_session(session)
        was_closed = self._road.is_closed
        try:
            await self._stage(run, session, named_tensors)
        except UnavailableError:
            if was_closed or not self._road.is_closed or not are_at_hand(named_tensors):
                raise
            await self._stage(run, session, named_tensors)

    async def _stage(self, run: Run, session: UpdateSession, named_tensors: NamedTensors) -> None:
        filling, sent, num_bytes, is_settled = Filling(session.session_id, self._threads), set[int](), 0, False
        is_at_hand = are_at_hand(named_tensors)
        exports = [self._road.export()] if is_at_hand and self._road.device_ids else []
        try:
            self._fillings.add(filling)
            for index, name, tensor in session.indexed(named_tensors):
                if index in sent:
                    raise WeightUpdateError(f"{name} was staged twice", field=name)
                sent.add(index)
                if exports and exports[-1].add(index, name, tensor, replaces=session.replaces(index)):
                    num_bytes += tensor.nbytes
                    session.roads.add(_DEVICE_ROAD)
                    if exports[-1].num_bytes >= self._road.bytes_ahead(len(exports)):
                        await run(self._send_export(session, filling, exports[-1].settle()))
                        exports.append(self._road.export())
                    continue
                pool, data = self._way_of(session, name, tensor)
                session.roads.add(_HOST_ROAD if pool is self._host else _DEVICE_ROAD)
                for start in range(0, max(1, len(data)), pool.max_bytes):
                    piece = data[start : start + pool.max_bytes]
                    while not filling.write(pool, index, start, piece, replaces=session.replaces(index)):
                        filling.flush()
                        await run(self._send(session, filling))
                        await run(self._take_buffer(session, pool, len(piece), filling))
                if not is_at_hand:
                    filling.flush()  # before code of the caller runs again
                num_bytes += len(data)
            filling.flush()
            await run(self._send_last(session, filling, *(export.settle() for export in exports[-1:])))
            for export in exports:
                export.check()
            is_settled = True
            session.num_bytes_staged += num_bytes
            if isinstance(named_tensors, HeldTensors):
                self._road.note(named_tensors, exports)
        except GeneratorExit:
            raise
        except BaseException:  # whatever it is, nothing more is staged when the caller hears of it
            await run(filling.call_off())
            raise
        finally:
            try:
                filling.leave()  # the caller may free what he gave as soon as he hears of it
            finally:
                session.note_sent(sent, is_settled=is_settled)
                self._fillings.discard(filling)  # here: the loop may be closed
                self.call_soon(lambda: self._end(filling))

    async def _stage_export(self, session: UpdateSession, export: DeviceExport) -> bool:
        """As `stage`, of all that an update brings. False where the core cannot map it: all of it may come again."""
        filling, is_settled = Filling(session.session_id, self._threads), False
        session.roads.add(_DEVICE_ROAD)
        self._fillings.add(filling)
        try:
            await self._send_export(session, filling, export)
            await filling.drain()
            export.check()
            is_settled = True
            session.num_bytes_staged += export.num_bytes
        except UnavailableError:  # of the one upload, which is over then
            if not self._road.is_closed:
                raise
        except BaseException:  # whatever it is, nothing more is staged when the caller hears of it
            await outlast(filling.call_off())
            raise
        finally:
            session.note_sent({entry.index for entry in export.entries}, is_settled=is_settled)
            self._fillings.discard(filling)
            self._end(filling)
        return is_settled

    async def stage_pieces(self, session: UpdateSession, pieces: Iterable[TensorPiece], fill: Fill) -> None:
        """As `stage`, of pieces of tensors in the order in which `fill` brings their bytes."""
        filling = Filling(session.session_id, self._threads)
        session.roads.add("HTTP")
        self._fillings.add(filling)
        try:
            for piece in in_parts(pieces, BUFFER_BYTES):
                while not await filling.fill(piece, fill):
                    await self._send(session, filling)
                    await self._take_buffer(session, self._host, piece.num_bytes, filling)
            await self._send(session, filling)
            await filling.drain()
        except BaseException:  # whatever it is, nothing more is staged when the caller hears of it
            await outlast(filling.call_off())
            raise
        finally:
            self._fillings.discard(filling)
            self._end(filling)

    async def stage_buffer(self, session: UpdateSession, ref: BufferRef, entries: tuple[BufferEntry, ...]) -> None:
        """Stage what lies in a buffer of somebody else's. It is read no more when this ends."""
        session.roads.add(_HOST_ROAD)
        await self._client.bring(lambda call_id: Stage(call_id, session.session_id, ref, entries), session.mode)

    async def stage_payload(self, session: UpdateSession, payload: Payload, indices: Sequence[int]) -> None:
        """Have what another engine's client shares copied, to these places of the manifest."""
        session.roads.add("another engine's handles")
        replaced = tuple(index for index in indices if session.replaces(index))

        def command(call_id: int) -> StagePayload:
            return StagePayload(call_id, session.session_id, payload, tuple(indices), replaced)

        await self._client.bring(command, session.mode, session.timeout_s)

    async def update_from_tensors(
        self, run: Run, named_tensors: NamedTensors, terms: UpdateTerms, begin_with: Begin
    ) -> UpdateReport:
        """A whole update. The pairs are read once, before anything is sent, since the manifest comes first."""
        held = HeldTensors(named_tensors, self._listed)
        self._listed = held.listing
        again = self._road.again(held)
        opened: list[UpdateSession] = []  # also where this is cancelled before it hears of it

        async def begin(again: DeviceExport | None) -> UpdateReport | None:
            """What goes as it went last is committed too, without one turn for each."""
            opened.append(await begin_with(held.manifest, terms, follows_up=again is not None))
            is_staged = again is not None and await self._stage_export(opened[0], again)
            return await self.commit(opened[0]) if is_staged else None

        try:
            report: UpdateReport | None = await run(begin(again and again.settle()))
            (session,) = opened
            if report is None:
                await self.stage(run, session, held)
                report = await run(self.commit(session))
        except GeneratorExit:  # dropped by whoever ran it: nothing can be awaited any more
            self.call_soon(lambda: self.start_aborts(opened))
            raise
        except BaseException:  # whatever it is, the session is over before the caller hears of it
            if opened:
                await run(self.abort_quietly(opened[0]))
            raise
        return report

    async def close(self) -> None:
        """Give the buffers back."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for filling in tuple(self._fillings):
            self._end(filling)
        self._host.close()
        self._road.close()
        self._threads.close()

    def call_soon(self, action: Callable[[], None]) -> None:
        """Call `action` on the engine's loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the core and its session are gone too
            self._loop.call_soon_threadsafe(action)

    def start_aborts(self, sessions: Iterable[UpdateSession]) -> None:
        """Drop these without waiting for it."""
        for session in sessions:
            task = self._loop.create_task(self.abort_at_last(session))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def abort_at_last(self, session: UpdateSession) -> bool:
        """Drop the session, however long that takes. False if it was over."""
        try:
            await self._client.change(
                lambda call_id: AbortUpdate(call_id, session.session_id), NoneType, timeout=math.inf
            )
        except HeadraceError as error:
            logger.debug("session %d was over: %s", session.session_id, error)
            return False
        return True

    def _way_of(self, session: UpdateSession, name: str, tensor: Any) -> tuple[BufferPool, TensorBytes]:
        """Which buffers carry a tensor, and its bytes for them."""
        pool = self._road.pool_for(session, tensor)
        return (self._host, TensorBytes(name, tensor)) if pool is None else (pool, DeviceBytes(name, tensor))

    async def _take_buffer(self, session: UpdateSession, pool: BufferPool, num_bytes: int, filling: Filling) -> None:
        """A buffer with room for `num_bytes`, waiting for the core to free one if need be."""
        filling.put(await self._free_buffer(session, pool, num_bytes, filling))
        if filling.is_over:
            self._end(filling)

    def _end(self, filling: Filling) -> None:
        """Leave nothing of a call that is over, or whose session is. One that writes at this moment has its buffer:
        it finds out after that, and ends."""
        filling.is_over = True
        for upload in filling.uploads:
            upload.cancel()
        buffer = filling.take()
        if buffer is not None:
            filling.settle()
            self._give_back(buffer)
        self._freed.set()  # one that waits for a buffer finds out

    async def _free_buffer(
        self, session: UpdateSession, pool: BufferPool, num_bytes: int, filling: Filling
    ) -> UploadBuffer:
        filling.raise_failures()
        if pool is self._host:
            self._threads.start()
        pool.fit(max(min(session.max_part_bytes, pool.max_bytes), num_bytes))
        try:
            async with asyncio.timeout(session.timeout_s):
                while pool.is_exhausted or (buffer := pool.take()) is None:
                    self._freed.clear()
                    await self._freed.wait()
                    filling.raise_failures()
                return buffer
        except TimeoutError:
            message = f"other tensors of session {session.session_id} hold every buffer for its {session.timeout_s:g} s"
            raise DeadlineError(message, field="timeout") from None
        except OSError as error:
            raise UnavailableError(f"no shared memory to send tensors in: {error}", field="named_tensors") from None

    async def _send(self, session: UpdateSession, filling: Filling) -> None:
        """Make an upload of what has been filled, if anything has."""
        filling.raise_failures()
        if session.unannounced():
            await self._announce(session)
        buffer = filling.take()
        if buffer is not None:
            self._begin_upload(session, filling, buffer, lambda: self._give_back(buffer))

    async def _send_last(self, session: UpdateSession, filling: Filling, *exports: DeviceExport) -> None:
        """`_send`, and wait until the core has copied all that this call has sent."""
        await self._send(session, filling)
        for export in exports:
            await self._send_export(session, filling, export)
        await filling.drain()

    async def _announce(self, session: UpdateSession) -> None:
        """Have checked what was staged and not listed."""
        part = session.unannounced()
        first: int | None = None
        try:
            extended = await self._client.call(
                lambda call_id: ExtendUpdate(call_id, session.session_id, part), UpdateExtended
            )
            first = extended.first_index
        finally:
            session.settle_announced(first)

    async def _upload(self, session: UpdateSession, buffer: UploadBuffer | DeviceExport) -> None:
        session_id, ref, entries = session.session_id, buffer.ref, tuple(buffer.entries)
        try:
            await self._client.bring(lambda call_id: Stage(call_id, session_id, ref, entries), session.mode)
        except UnavailableError as error:
            if isinstance(ref, DeviceRef) and error.field == "buffer":
                self._road.refuse(error)
            raise

    async def _send_export(self, session: UpdateSession, filling: Filling, export: DeviceExport) -> None:
        """Make an upload of tensors that stay where they are, if there are any. It holds them until it is over."""
        filling.raise_failures()
        if session.unannounced():
            await self._announce(session)
        if export.entries:
            self._begin_upload(session, filling, export, lambda: None)

    def _begin_upload(
        self, session: UpdateSession, filling: Filling, source: UploadBuffer | DeviceExport, then: Callable[[], None]
    ) -> None:
        """Whatever comes of it, also if it is cancelled before it begins, the core reads the source no more `then`."""

        def end(upload: asyncio.Task[None]) -> None:
            self._tasks.discard(upload)
            if not upload.cancelled():
                upload.exception()  # looked at: of an upload that is over nobody else does
            then()

        upload = asyncio.create_task(self._upload(session, source))
        upload.add_done_callback(end)
        self._tasks.add(upload)
        filling.uploads.append(upload)

    def _give_back(self, buffer: UploadBuffer) -> None:
        buffer.pool.give_back(buffer)
        self._freed.set()
