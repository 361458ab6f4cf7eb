"""Weight updates seen from the front. Owns the upload buffers, which are shared memory: they carry tensors to the core,
large ones in pieces. There are NUM_BUFFERS of at most BUFFER_BYTES, whatever is sent. Whoever fills one for a session
that is over loses it to the next session.

The caller's iterator of tensors runs wherever the caller is, on a loop of his or on none. So what reads it is told how
to `run` a coroutine on the engine's loop, and awaits nothing else: with a `run` that blocks it never waits, and can be
stepped without a loop (`run_here`). A tensor has been copied before the next one is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from itertools import islice
from types import NoneType
from typing import Any, TypeVar

import msgspec

from headrace.engine.calls import outlast
from headrace.engine.client import CoreClient
from headrace.engine.control import UpdateTerms
from headrace.engine.tensors import HeldTensors, NamedTensors, TensorBytes, describe, named_pairs
from headrace.engine.upload_buffers import Filling, UploadBuffer, aligned
from headrace.ipc import SharedBuffer
from headrace.types.errors import DeadlineError, HeadraceError, InternalError, UnavailableError, WeightUpdateError
from headrace.types.messages import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    ExtendUpdate,
    Stage,
    UpdateBegun,
    UpdateExtended,
)
from headrace.types.plain_values import as_list, plain_text
from headrace.types.weights import MAX_DIMENSIONS, MAX_TENSOR_NAME, MAX_TENSORS, TensorInfo, UpdateReport, shape_problem
from headrace.weights.weight_map import is_recomputed

logger = logging.getLogger(__name__)

BUFFER_BYTES = 64 << 20
NUM_BUFFERS = 2

Result = TypeVar("Result")
Run = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
Manifest = Iterable[TensorInfo | tuple[str, Iterable[int], str]]


class UpdateSession:
    """An open update. `mode` is what "auto" became; `manifest` is what may be staged, each entry once.

    One that is open-ended grows by `Updater.extend`, and `num_missing` tensors of the model are in no part of it yet.
    """

    def __init__(
        self,
        session_id: int,
        version: str,
        mode: str,
        manifest: tuple[TensorInfo, ...],
        timeout_s: float,
        is_partial: bool = False,
    ) -> None:
        self.session_id = session_id
        self.version = version
        self.mode = mode
        self.manifest: list[TensorInfo] = []
        self.timeout_s = timeout_s
        self.is_partial = is_partial
        self.num_missing = 0
        self.num_bytes_staged = 0
        self.max_part_bytes = 0  # in upload buffers
        self._indices: dict[str, int] = {}
        self._sent: set[int] = set()
        self._settled: set[int] = set()
        self.grow(manifest)

    def grow(self, manifest: tuple[TensorInfo, ...]) -> None:
        """These are in the manifest as well."""
        first = len(self.manifest)
        self._indices.update((info.name, index) for index, info in enumerate(manifest, first))
        self.manifest += manifest
        self.max_part_bytes = max(self.max_part_bytes, sum(aligned(info.num_bytes) for info in manifest))

    def __contains__(self, name: object) -> bool:
        """A tensor of that name is in the manifest."""
        return name in self._indices

    def replaces(self, index: int) -> bool:
        """The tensor may have been staged, by a call that has not succeeded."""
        return index in self._sent and index not in self._settled

    def note_sent(self, indices: set[int], *, is_settled: bool) -> None:
        """These were sent by a call that is over; `is_settled` if it succeeded, and they are staged for good."""
        self._sent |= indices
        if is_settled:
            self._settled |= indices

    def info_of(self, name: str) -> TensorInfo:
        """The manifest's entry of that name. Raises `WeightUpdateError` if there is none."""
        index = self._indices.get(name)
        if index is None:
            raise WeightUpdateError(f"{name} is not in this update's manifest", field=name)
        return self.manifest[index]

    def unsettle(self, indices: Iterable[int]) -> None:
        """These come again, and replace what has come."""
        self._settled.difference_update(indices)

    @property
    def is_staged(self) -> bool:
        """All of the manifest has been staged for good."""
        return len(self._settled) == len(self.manifest)

    def index_of(self, info: TensorInfo) -> int:
        """The manifest's index of a tensor. Raises `WeightUpdateError` if it is not there as described."""
        meant = self.info_of(info.name)
        if (meant.shape, meant.dtype) != (info.shape, info.dtype):
            got, announced = f"{info.dtype} {list(info.shape)}", f"{meant.dtype} {list(meant.shape)}"
            raise WeightUpdateError(f"{info.name} is {got}, announced as {announced}", field=info.name)
        return self._indices[info.name]


class Updater:
    """Opens, fills and ends update sessions on one core. Its coroutines run on the engine's loop."""

    def __init__(self, client: CoreClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._free: list[UploadBuffer] = []
        self._num_buffers = 0
        self._buffer_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()  # uploads, and aborts that nobody awaits
        self._freed = asyncio.Event()
        self._fillings: set[Filling] = set()

    async def begin(
        self, manifest: tuple[TensorInfo, ...], terms: UpdateTerms, *, is_open: bool = False
    ) -> UpdateSession:
        """Have the whole manifest checked and a session opened; one that `is_open` is open-ended. Every other session
        is over then."""

        def command(call_id: int) -> BeginUpdate:
            policies = terms.mode, terms.in_flight, terms.partial, terms.timeout_s
            return BeginUpdate(call_id, terms.version, manifest, *policies, is_open=is_open)

        begun = await self._client.change(command, UpdateBegun)
        for filling in tuple(self._fillings):
            self._end(filling)
        return UpdateSession(begun.session_id, terms.version, begun.mode, manifest, terms.timeout_s, terms.partial)

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
        return await self._client.change(
            lambda call_id: CommitUpdate(call_id, session.session_id, version=version), UpdateReport
        )

    async def abort(self, session: UpdateSession | None) -> None:
        """Drop the session; None: whichever is open, if one is."""
        if session is not None:
            check_session(session)
        session_id = None if session is None else session.session_id
        await self._client.change(lambda call_id: AbortUpdate(call_id, session_id), NoneType)

    async def abort_quietly(self, session: UpdateSession) -> None:
        """Drop a session after an error, which its caller gets. Neither cancelled nor late: it must not stay open."""
        await outlast(self._abort_at_last(session))

    async def stage(self, run: Run, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """Copy tensors into buffers and send them; ends when the core has copied all of them. What a call sends that
        fails may be sent again, and replaces what came of it."""
        check_session(session)
        filling, sent, num_bytes, is_settled = Filling(session.session_id), set[int](), 0, False
        try:
            self._fillings.add(filling)
            for name, tensor in named_pairs(named_tensors):
                index = session.index_of(describe(name, tensor))
                if index in sent:
                    raise WeightUpdateError(f"{name} was staged twice", field=name)
                sent.add(index)
                data = TensorBytes(name, tensor)
                for start in range(0, max(1, len(data)), BUFFER_BYTES):
                    piece = data[start : start + BUFFER_BYTES]
                    while not filling.write(index, start, piece, replaces=session.replaces(index)):
                        await run(self._send(session, filling))
                        await run(self._take_buffer(session, len(piece), filling))
                num_bytes += len(data)
            await run(self._send(session, filling))
            await run(self._drain(filling))
            is_settled = True
            session.num_bytes_staged += num_bytes
        except GeneratorExit:
            raise
        except BaseException:  # whatever it is, nothing more is staged when the caller hears of it
            await run(self._call_off(filling))
            raise
        finally:
            session.note_sent(sent, is_settled=is_settled)
            self._fillings.discard(filling)  # here: the loop may be closed
            self.call_soon(lambda: self._end(filling))

    async def update_from_tensors(self, run: Run, named_tensors: NamedTensors, terms: UpdateTerms) -> UpdateReport:
        """A whole update. The pairs are read once, before anything is sent, since the manifest comes first."""
        held = HeldTensors(named_tensors)
        opened: list[UpdateSession] = []  # also where this is cancelled before it hears of it

        async def begin() -> None:
            opened.append(await self.begin(held.manifest, terms))

        try:
            await run(begin())
            (session,) = opened
            await self.stage(run, session, held)
            report: UpdateReport = await run(self.commit(session))
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
        for buffer in self._free:
            buffer.memory.close()
        self._free.clear()

    def call_soon(self, action: Callable[[], None]) -> None:
        """Call `action` on the engine's loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the core and its session are gone too
            self._loop.call_soon_threadsafe(action)

    def start_aborts(self, sessions: Iterable[UpdateSession]) -> None:
        """Drop these without waiting for it."""
        for session in sessions:
            task = self._loop.create_task(self._abort_at_last(session))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _abort_at_last(self, session: UpdateSession) -> None:
        try:
            await self._client.change(
                lambda call_id: AbortUpdate(call_id, session.session_id), NoneType, timeout=math.inf
            )
        except HeadraceError as error:
            logger.debug("session %d was over: %s", session.session_id, error)

    async def _take_buffer(self, session: UpdateSession, num_bytes: int, filling: Filling) -> None:
        """A buffer with room for `num_bytes`, waiting for the core to free one if need be."""
        filling.put(await self._free_buffer(session, num_bytes, filling))
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
            self._give_back(buffer)
        self._freed.set()  # one that waits for a buffer finds out

    async def _free_buffer(self, session: UpdateSession, num_bytes: int, filling: Filling) -> UploadBuffer:
        self._raise_failures(filling)
        self._fit_buffers(session, num_bytes)
        try:
            async with asyncio.timeout(session.timeout_s):
                await self._wait_for_buffer(filling)
        except TimeoutError:
            message = f"other tensors of session {session.session_id} hold every buffer for its {session.timeout_s:g} s"
            raise DeadlineError(message, field="timeout") from None
        if self._free:
            return self._free.pop()
        try:
            buffer = UploadBuffer(SharedBuffer.create(self._buffer_bytes))
        except OSError as error:
            raise UnavailableError(f"no shared memory to send tensors in: {error}", field="named_tensors") from None
        self._num_buffers += 1
        return buffer

    async def _wait_for_buffer(self, filling: Filling) -> None:
        while not self._free and self._num_buffers >= NUM_BUFFERS:
            self._freed.clear()
            await self._freed.wait()
            self._raise_failures(filling)

    def _fit_buffers(self, session: UpdateSession, num_bytes: int) -> None:
        """Buffers are as large as the largest update so far needs, up to BUFFER_BYTES."""
        wanted = max(min(session.max_part_bytes, BUFFER_BYTES), num_bytes, 1)
        if wanted > self._buffer_bytes:
            self._buffer_bytes = wanted
        for buffer in [b for b in self._free if b.memory.ref.size < self._buffer_bytes]:
            self._free.remove(buffer)
            self._num_buffers -= 1
            buffer.memory.close()

    async def _send(self, session: UpdateSession, filling: Filling) -> None:
        """Make an upload of what has been filled, if anything has."""
        self._raise_failures(filling)
        buffer = filling.take()
        if buffer is not None:
            upload = asyncio.create_task(self._upload(session, buffer))
            upload.add_done_callback(lambda _: self._uploaded(upload, buffer))
            self._tasks.add(upload)
            filling.uploads.append(upload)

    async def _upload(self, session: UpdateSession, buffer: UploadBuffer) -> None:
        session_id, ref, entries = session.session_id, buffer.memory.ref, tuple(buffer.entries)
        await self._client.call(lambda call_id: Stage(call_id, session_id, ref, entries), NoneType)

    async def _call_off(self, filling: Filling) -> None:
        """Give up the uploads of a call that is over."""
        pending = [upload for upload in filling.uploads if upload.cancel()]
        if pending:
            await asyncio.wait(pending)

    async def _drain(self, filling: Filling) -> None:
        if filling.uploads:
            await asyncio.wait(filling.uploads)
        self._raise_failures(filling)

    def _raise_failures(self, filling: Filling) -> None:
        """Raise the first error among the uploads of a call, and `UpdateConflictError` once it is over."""
        for upload in filling.uploads:
            error = upload.exception() if upload.done() and not upload.cancelled() else None
            if error is not None:
                raise error
        filling.check()

    def _uploaded(self, upload: asyncio.Task[None], buffer: UploadBuffer) -> None:
        """Whatever came of it, also if it was cancelled before it began, the core reads the buffer no more."""
        self._tasks.discard(upload)
        if not upload.cancelled():
            upload.exception()  # looked at: of an upload that is over nobody else does
        self._give_back(buffer)

    def _give_back(self, buffer: UploadBuffer) -> None:
        buffer.clear()
        if buffer.memory.ref.size >= self._buffer_bytes:
            self._free.append(buffer)
        else:
            self._num_buffers -= 1
            buffer.memory.close()
        self._freed.set()


def check_session(session: Any) -> None:
    """Refuse what `begin_update` did not return."""
    if not isinstance(session, UpdateSession):
        message = f"session must be what begin_update returned, not {type(session).__name__}"
        raise WeightUpdateError(message, field="session")


def manifest_of(entries: Manifest) -> tuple[TensorInfo, ...]:
    """A manifest from `TensorInfo`s or (name, shape, dtype name) triples. Raises `WeightUpdateError` for the rest.
    Buffers that every engine recomputes are left out, as `stage` leaves them out."""
    what = "a list of TensorInfo or (name, shape, dtype) entries"
    manifest: list[TensorInfo] = []
    for entry in as_list(entries, "manifest", what, MAX_TENSORS, refusal=WeightUpdateError, takes_sets=True):
        try:
            fields = msgspec.structs.astuple(entry) if isinstance(entry, TensorInfo) else (*entry, "")
            name, shape, dtype, digest = fields
            sizes = tuple(int(size) for size in islice(shape, MAX_DIMENSIONS + 1))
            name, dtype, digest = map(plain_text, (name, dtype, digest))
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor without a value
            raise WeightUpdateError(f"manifest must be {what}", field="manifest") from None
        info = TensorInfo(str(name), sizes, str(dtype).removeprefix("torch."), str(digest))
        if max(map(len, (info.name, info.dtype, info.digest))) > MAX_TENSOR_NAME:
            message = f"manifest: entry {len(manifest)} has a name of over {MAX_TENSOR_NAME} characters"
            raise WeightUpdateError(message, field="manifest")
        problem = shape_problem(sizes)
        if problem:
            raise WeightUpdateError(f"manifest: {info.name} {problem}", field=info.name)
        manifest.append(info)
    return tuple(info for info in manifest if not is_recomputed(info.name))


def run_here(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """What comes of a coroutine that awaits nothing that waits, in this thread, with or without a loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        coroutine.close()
    raise InternalError(f"{coroutine} waits, and nobody would wake it")
