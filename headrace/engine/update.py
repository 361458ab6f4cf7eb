"""Weight updates seen from the front. Owns the buckets: shared buffers that carry whole tensors to the core.

An update is a *script*: a generator that yields coroutines for the engine's loop and gets their results. Its own code,
and with it the caller's iterator of tensors, runs wherever the caller is: `drive` runs a script in a plain thread,
`drive_async` inside any event loop. A tensor has been copied before the next one is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from types import NoneType
from typing import Any, TypeVar

from headrace.engine.client import CoreClient
from headrace.engine.tensors import HeldTensors, NamedTensors, TensorBytes, describe, named_pairs
from headrace.ipc import SharedBuffer
from headrace.types.errors import DeadlineError, HeadraceError, WeightUpdateError
from headrace.types.messages import AbortUpdate, BeginUpdate, CommitUpdate, Stage, UpdateBegun
from headrace.types.weights import BufferEntry, InFlight, TensorInfo, UpdateMode, UpdateReport
from headrace.weights.weight_map import is_derived

BUCKET_BYTES = 64 << 20
NUM_BUCKETS = 2
_ALIGNMENT = 64

Result = TypeVar("Result")
Script = Generator[Coroutine[Any, Any, Any], Any, Result]
Manifest = Iterable[TensorInfo | tuple[str, Iterable[int], str]]


class UpdateSession:
    """An open update. `mode` is what "auto" became; `manifest` is what may be staged, each entry once."""

    def __init__(self, session_id: int, version: str, mode: str, manifest: tuple[TensorInfo, ...]) -> None:
        self.session_id = session_id
        self.version = version
        self.mode = mode
        self.manifest = manifest
        self._indices = {info.name: index for index, info in enumerate(manifest)}
        self.num_bytes_staged = 0

    def index_of(self, info: TensorInfo) -> int:
        """The manifest's index of a tensor. Raises `WeightUpdateError` if it is not there as described."""
        index = self._indices.get(info.name)
        if index is None:
            raise WeightUpdateError(f"{info.name} is not in this update's manifest", field=info.name)
        meant = self.manifest[index]
        if (meant.shape, meant.dtype) != (info.shape, info.dtype):
            got, announced = f"{info.dtype} {list(info.shape)}", f"{meant.dtype} {list(meant.shape)}"
            raise WeightUpdateError(f"{info.name} is {got}, announced as {announced}", field=info.name)
        return index


class Bucket:
    """A shared buffer being filled with whole tensors."""

    def __init__(self, buffer: SharedBuffer, *, is_reusable: bool) -> None:
        self.buffer = buffer
        self.is_reusable = is_reusable
        self.entries: list[BufferEntry] = []
        self._num_used = 0

    def fits(self, num_bytes: int) -> bool:
        """True when a tensor of that size has room."""
        return _aligned(self._num_used) + num_bytes <= self.buffer.ref.size

    def write(self, index: int, data: TensorBytes) -> None:
        """Copy a tensor in. `WeightUpdateError` if it was freed or written to meanwhile."""
        offset = _aligned(self._num_used)
        data.copy_into(self.buffer.view[offset : offset + len(data)])
        self.entries.append(BufferEntry(index, offset))
        self._num_used = offset + len(data)

    def clear(self) -> None:
        """Forget the contents: the buffer may be filled again."""
        self.entries = []
        self._num_used = 0


class _Filling:
    """The bucket that one running script fills, until it is an upload. A step of a script that was cancelled may still
    run: it then finds that the script is over."""

    def __init__(self) -> None:
        self.bucket: Bucket | None = None
        self.is_over = False

    def has_room(self, num_bytes: int) -> bool:
        """True when there is a bucket, and a tensor of that size has room in it."""
        return self.bucket is not None and self.bucket.fits(num_bytes)


class Updater:
    """Opens, fills and ends update sessions on one core. Its coroutines run on the engine's loop."""

    def __init__(self, client: CoreClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._free: list[Bucket] = []
        self._unanswered: list[Bucket] = []
        self._num_buckets = 0
        self._bucket_bytes = 0
        self._uploads: dict[asyncio.Task[None], int] = {}
        self._freed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._inplace_session: int | None = None

    @property
    def holds_generation(self) -> bool:
        """True while an in-place session of ours is open: no request would start."""
        status = self._client.status
        return self._inplace_session is not None and status is not None and status.updating

    async def begin(
        self,
        version: str,
        manifest: tuple[TensorInfo, ...],
        mode: UpdateMode,
        in_flight: InFlight,
        partial: bool,
        timeout_s: float,
    ) -> UpdateSession:
        """Have the whole manifest checked and a session opened. One that opens when nobody waits is aborted."""
        limit = self._client.control_timeout
        opening = asyncio.ensure_future(
            self._client.change(
                lambda call_id: BeginUpdate(call_id, version, manifest, mode, in_flight, partial, timeout_s),
                UpdateBegun,
                limit + timeout_s,  # then the core has aborted it by itself
            )
        )
        try:
            begun = await asyncio.wait_for(asyncio.shield(opening), limit)
        except TimeoutError:
            opening.add_done_callback(self._abort_unclaimed)
            raise DeadlineError(f"BeginUpdate had no answer within {limit:g} s", field="control_timeout") from None
        except asyncio.CancelledError:
            opening.add_done_callback(self._abort_unclaimed)
            raise
        self._inplace_session = begun.session_id if begun.mode == "inplace" else None
        self._close_unanswered()  # of a session that was open before: it is over
        return UpdateSession(begun.session_id, version, begun.mode, manifest)

    async def commit(self, session: UpdateSession) -> UpdateReport:
        """Make the staged weights live. One that has no answer in time is aborted, so that it does not land later."""
        try:
            report = await self._client.change(lambda call_id: CommitUpdate(call_id, session.session_id), UpdateReport)
        except DeadlineError:
            self._start_abort(session)
            await asyncio.sleep(0)  # sent before whatever the caller asks for next
            raise
        self._close_unanswered()
        return report

    async def abort(self, session: UpdateSession) -> None:
        """Drop the session."""
        await self._client.change(lambda call_id: AbortUpdate(call_id, session.session_id), NoneType)
        self._close_unanswered()

    def abort_soon(self, session: UpdateSession) -> None:
        """Drop the session without waiting, from any thread; commands given later find it dropped."""
        self._call_soon(lambda: self._start_abort(session))

    def stage(self, session: UpdateSession, named_tensors: NamedTensors) -> Script[None]:
        """Copy tensors into buckets and send them; ends when the core has copied all of them."""
        filling = _Filling()
        try:
            for name, tensor in named_pairs(named_tensors):
                index = session.index_of(describe(name, tensor))
                data = TensorBytes(name, tensor)
                if not filling.has_room(len(data)):
                    yield self._send(session, filling)
                    yield self._take_bucket(session, len(data), filling)
                assert filling.bucket is not None
                filling.bucket.write(index, data)
                session.num_bytes_staged += len(data)
            yield self._send(session, filling)
            yield self._drain(session)
        finally:
            self._call_soon(lambda: self._end(filling))

    def update_from_tensors(
        self,
        named_tensors: NamedTensors,
        version: str,
        mode: UpdateMode,
        in_flight: InFlight,
        partial: bool,
        timeout_s: float,
    ) -> Script[UpdateReport]:
        """A whole update. The pairs are read once, before anything is sent, since the manifest comes first."""
        held = HeldTensors(named_tensors)
        opened: list[UpdateSession] = []  # also where this script is cancelled before it hears of it
        is_committed = False

        async def begin() -> None:
            opened.append(await self.begin(version, held.manifest, mode, in_flight, partial, timeout_s))

        try:
            yield begin()
            (session,) = opened
            yield from self.stage(session, held)
            report: UpdateReport = yield self.commit(session)
            is_committed = True
        finally:
            if opened and not is_committed:
                self.abort_soon(opened[0])
        return report

    async def close(self) -> None:
        """Give the buffers back."""
        for task in self._uploads:
            task.cancel()
        if self._uploads:
            await asyncio.wait(self._uploads)
        for bucket in self._free:
            bucket.buffer.close()
        self._free.clear()
        self._close_unanswered()

    def _call_soon(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the core and its session are gone too
            self._loop.call_soon_threadsafe(action)

    def _start_abort(self, session: UpdateSession) -> None:
        self._tasks.add(self._loop.create_task(self._abort_quietly(session)))

    def _abort_unclaimed(self, opening: asyncio.Task[UpdateBegun]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            begun = opening.result()
            self._start_abort(UpdateSession(begun.session_id, "", begun.mode, ()))

    async def _abort_quietly(self, session: UpdateSession) -> None:
        with contextlib.suppress(HeadraceError):  # the session or the core is over: the caller has the first error
            await self.abort(session)
        self._tasks = {task for task in self._tasks if not task.done()}

    async def _take_bucket(self, session: UpdateSession, num_bytes: int, filling: _Filling) -> None:
        """A bucket with room for one tensor of `num_bytes`, waiting for the core to free one if need be."""
        filling.bucket = await self._free_bucket(session, num_bytes)
        if filling.is_over:
            self._end(filling)

    def _end(self, filling: _Filling) -> None:
        filling.is_over = True
        bucket, filling.bucket = filling.bucket, None
        if bucket is not None:
            self._give_back(bucket)

    async def _free_bucket(self, session: UpdateSession, num_bytes: int) -> Bucket:
        self._raise_failures(session)
        if num_bytes > BUCKET_BYTES:
            return Bucket(SharedBuffer.create(num_bytes), is_reusable=False)
        self._fit_buckets(session, num_bytes)
        while not self._free and self._num_buckets >= NUM_BUCKETS:
            self._freed.clear()
            await self._freed.wait()
            self._raise_failures(session)
        if self._free:
            return self._free.pop()
        self._num_buckets += 1
        return Bucket(SharedBuffer.create(self._bucket_bytes), is_reusable=True)

    def _fit_buckets(self, session: UpdateSession, num_bytes: int) -> None:
        """Buckets are as large as the largest update so far needs, up to BUCKET_BYTES."""
        total = sum(_aligned(_num_bytes(info)) for info in session.manifest)
        wanted = max(min(total, BUCKET_BYTES), num_bytes, 1)
        if wanted > self._bucket_bytes:
            self._bucket_bytes = wanted
        for bucket in [b for b in self._free if b.buffer.ref.size < self._bucket_bytes]:
            self._free.remove(bucket)
            self._num_buckets -= 1
            bucket.buffer.close()

    async def _send(self, session: UpdateSession, filling: _Filling) -> None:
        """Make an upload of what has been filled, if anything has."""
        self._raise_failures(session)
        bucket, filling.bucket = filling.bucket, None
        if bucket is not None:
            self._uploads[asyncio.create_task(self._upload(session, bucket))] = session.session_id

    async def _upload(self, session: UpdateSession, bucket: Bucket) -> None:
        session_id, ref, entries = session.session_id, bucket.buffer.ref, tuple(bucket.entries)
        try:
            await self._client.call(lambda call_id: Stage(call_id, session_id, ref, entries), NoneType)
        except (DeadlineError, asyncio.CancelledError):
            self._set_aside(bucket)
            raise
        except HeadraceError:
            self._give_back(bucket)
            raise
        self._give_back(bucket)

    async def _drain(self, session: UpdateSession) -> None:
        mine = [task for task, session_id in self._uploads.items() if session_id == session.session_id]
        if mine:
            await asyncio.wait(mine)
        self._raise_failures(session)

    def _raise_failures(self, session: UpdateSession) -> None:
        """Forget uploads that are done; raise the first error among this session's."""
        failures: list[BaseException] = []
        for task in [task for task in self._uploads if task.done()]:
            is_mine = self._uploads.pop(task) == session.session_id
            error = None if task.cancelled() else task.exception()
            if error is not None and is_mine:
                failures.append(error)
        if failures:
            raise failures[0]

    def _set_aside(self, bucket: Bucket) -> None:
        """The core may still read it, until the session is over: it is neither filled again nor closed before."""
        self._num_buckets -= bucket.is_reusable
        self._unanswered.append(bucket)
        self._freed.set()

    def _close_unanswered(self) -> None:
        while self._unanswered:
            self._unanswered.pop().buffer.close()

    def _give_back(self, bucket: Bucket) -> None:
        bucket.clear()
        if bucket.is_reusable and bucket.buffer.ref.size >= self._bucket_bytes:
            self._free.append(bucket)
        else:
            self._num_buckets -= bucket.is_reusable
            bucket.buffer.close()
        self._freed.set()


def manifest_of(entries: Manifest) -> tuple[TensorInfo, ...]:
    """A manifest from `TensorInfo`s or (name, shape, dtype name) triples. Raises `WeightUpdateError` for the rest.
    Buffers that every engine recomputes are left out, as `stage` leaves them out."""
    manifest: list[TensorInfo] = []
    for entry in entries:
        if isinstance(entry, TensorInfo):
            manifest.append(entry)
            continue
        try:
            name, shape, dtype = entry
            sizes = tuple(int(size) for size in shape)
        except (TypeError, ValueError):
            message = "manifest must hold TensorInfo or (name, shape, dtype) entries"
            raise WeightUpdateError(message, field="manifest") from None
        manifest.append(TensorInfo(str(name), sizes, str(dtype).removeprefix("torch.")))
    return tuple(info for info in manifest if not is_derived(info.name))


def drive(script: Script[Result], run: Callable[[Coroutine[Any, Any, Any]], Any]) -> Result:
    """Run a script here; `run` runs a coroutine on the engine's loop and waits for it."""
    try:
        step = next(script)
        while True:
            try:
                value = run(step)
            except BaseException as error:
                step = script.throw(error)
            else:
                step = script.send(value)
    except StopIteration as end:
        result: Result = end.value
        return result


async def drive_async(script: Script[Result], run: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]) -> Result:
    """As `drive`, inside an event loop."""
    try:
        step = next(script)
        while True:
            try:
                value = await run(step)
            except BaseException as error:
                step = script.throw(error)
            else:
                step = script.send(value)
    except StopIteration as end:
        result: Result = end.value
        return result


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _num_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor; dtype names say their width in bits (bfloat16, float32, ...)."""
    width = re.search(r"\d+", info.dtype)
    return math.prod(info.shape) * (int(width.group()) // 8 if width else 1)
