"""The implicit update of an engine: calls that bring some of its tensors each, as SGLang's weight calls do, join it.

Owns which session that is, and its label. It is opened by the first call, and committed by the one after which the
model lacks nothing, or where it was begun by name, when it is finished so. An error in one, and the session's deadline,
end it, and the next call begins another. Must not know tensors or HTTP, nor by which road tensors come: the caller
stages them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from headrace.engine.client import CoreClient
from headrace.engine.control import UpdateTerms
from headrace.engine.update import Run, Updater
from headrace.engine.update_session import UpdateSession
from headrace.types.errors import HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.request import DEFAULT_VERSION
from headrace.types.weights import TensorInfo, UpdateReport
from headrace.weights.weight_map import TIED_HEAD

StagePart = Callable[[UpdateSession, Sequence[int]], Awaitable[None]]
"""Brings the tensors of one call: those at these places of the session's manifest. One that `replaces` there has been
staged before."""

Result = TypeVar("Result")


async def _here(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return await coroutine


class JoinedUpdate:
    """At most one update that is joined from calls. Its coroutines run on the engine's loop; see `add` for `run`."""

    def __init__(self, updater: Updater, client: CoreClient) -> None:
        self._updater = updater
        self._client = client
        self._joining = asyncio.Lock()
        self._session: UpdateSession | None = None
        self._committed: UpdateSession | None = None  # the last of which the commit was asked for
        self._is_held = False
        self._version = ""  # that a call has given
        self._last: UpdateReport | None = None  # of an update without a head, which may come late

    async def add(
        self, infos: Iterable[TensorInfo], terms: UpdateTerms, stage: StagePart, run: Run = _here
    ) -> UpdateReport | None:
        """Have these tensors checked, staged by `stage`, and committed with all before them if that makes a model.
        None: it does not yet.

        A tensor that came before is replaced. `terms.version` may be "": the last one that was given counts at the
        commit, and if none was, the weights keep their label. One that differs from that of the calls before begins
        the update anew: no weights are mixed of two. The other terms are those of the first call. Parts may be staged
        at the same time. A tied head that comes when its update is live, since nothing else was missing, is compared
        with what is live; no tensors at all begin no update.

        Where the caller is not on the engine's loop, `run` runs coroutines there, and `stage` is awaited where he is.
        """
        joined: list[UpdateSession] = []
        try:
            indices: Sequence[int] = await run(self._join(tuple(infos), terms, joined))
            if not joined:
                return None
            await stage(joined[0], indices)
            report: UpdateReport | None = await run(self._finish(joined[0], indices))
        except GeneratorExit:  # dropped by whoever ran it: nothing can be awaited any more
            self._updater.call_soon(lambda: self._forget(joined))
            raise
        except BaseException:  # whatever it is, the update is over before the caller hears of it
            await run(self._drop(joined))
            raise
        return report

    async def join(self, infos: Iterable[TensorInfo], terms: UpdateTerms) -> tuple[UpdateSession, Sequence[int]] | None:
        """The first half of `add`, for one who stages what he brings in calls of his own and ends with `settle`, or
        aborts the session where that fails. None: it is no tensor."""
        joined: list[UpdateSession] = []
        try:
            indices = await self._join(tuple(infos), terms, joined)
        except BaseException:  # whatever it is, as in `add`
            await self._drop(joined)
            raise
        return (joined[0], indices) if joined else None

    async def settle(self, session: UpdateSession, indices: Sequence[int]) -> UpdateReport | None:
        """The second half: these were staged."""
        try:
            return await self._finish(session, indices)
        except BaseException:  # whatever it is, as in `add`
            await self._drop([session])
            raise

    async def begin(self) -> None:
        """The next call begins an update anew, which is not committed before `finish`."""
        await self.end()
        self._is_held = True

    async def finish(self, version: str = "") -> UpdateReport | None:
        """No call brings more of the update that is open: commit it, under this label if there is one. None: there is
        nothing to commit, or it is committed. `WeightUpdateError` names what it lacks; `UpdateConflictError` if one was
        begun, and is over."""
        session, was_begun, self._is_held = self._session, self._is_held, False
        if session is None:
            if was_begun:
                message = "the update that was begun is over: an error has ended it, or nothing of it came"
                raise UpdateConflictError(message, field="session_id")
            return None
        self._version = version or self._version
        try:
            return await self._commit(session)
        except BaseException:  # whatever it is, as in `add`
            await self._drop([session])
            raise

    async def end(self) -> None:
        """Drop the update, if there is one: a call that could not even say its tensors is an error in it as well."""
        if self._session is not None:
            await self._drop([self._session])

    async def _join(
        self, manifest: tuple[TensorInfo, ...], terms: UpdateTerms, joined: list[UpdateSession]
    ) -> list[int]:
        """The places of the tensors in the session, of which `joined` hears at once."""
        async with self._joining:
            is_another = terms.version and self._version and terms.version != self._version
            if is_another:
                await self.end()
            if self._session is None and self._is_late_head(manifest, terms):
                return await self._compare_head(manifest, terms, joined)
            if not manifest:  # nothing whose end could be the end of an update that is committed meanwhile
                self._version = (self._session and terms.version) or self._version
                return []
            if self._session is not None:
                joined[:] = [self._session]
                try:
                    return await self._extend(self._session, manifest, terms)
                except HeadraceError as error:
                    if error.field != "session_id":
                        raise
                self._session = None  # it has ended meanwhile, by its deadline or by `abort_update`
            await self._open(terms, joined)
            return await self._extend(joined[0], manifest, terms)

    def _is_late_head(self, manifest: tuple[TensorInfo, ...], terms: UpdateTerms) -> bool:
        """The last update was live before its sender came to the head: then the model has none of its own. Where other
        weights came since, or these were lost, it is the first of another update."""
        status, last = self._client.status, self._last
        is_live = last is not None and status is not None and status.epoch == last.epoch and self._client.is_whole
        is_same = not terms.version or terms.version == self._version
        return is_live and is_same and not self._is_held and [info.name for info in manifest] == [TIED_HEAD]

    async def _compare_head(
        self, manifest: tuple[TensorInfo, ...], terms: UpdateTerms, joined: list[UpdateSession]
    ) -> list[int]:
        """Have the head held against live weights, in an update of nothing else that is never committed."""
        label = terms.version or self._last_label()
        partial = msgspec.structs.replace(terms, version=label, mode="shadow", partial=True)
        joined[:] = [await self._updater.begin((), partial, is_open=True)]
        return list(await self._updater.extend(joined[0], manifest))

    async def _open(self, terms: UpdateTerms, joined: list[UpdateSession]) -> None:
        labelled = msgspec.structs.replace(terms, version=terms.version or self._last_label())
        session = await self._updater.begin((), labelled, is_open=True)
        self._session, self._version, self._last = session, "", None
        joined[:] = [session]

    def _last_label(self) -> str:
        status = self._client.status
        return DEFAULT_VERSION if status is None else status.last_version

    async def _extend(self, session: UpdateSession, manifest: tuple[TensorInfo, ...], terms: UpdateTerms) -> list[int]:
        for name, count in Counter(info.name for info in manifest).most_common(1):
            if count > 1:
                raise WeightUpdateError(f"{name} is named twice", field=name)
        known = {info.name: session.index_of(info) for info in manifest if info.name in session}
        await self._updater.extend(session, tuple(info for info in manifest if info.name not in known))
        session.unsettle(known.values())
        self._version = terms.version or self._version
        return [session.index_of(info) for info in manifest]

    async def _finish(self, session: UpdateSession, indices: Sequence[int]) -> UpdateReport | None:
        """Commit the session if nothing is to come."""
        session.note_sent(set(indices), is_settled=True)
        if session.is_partial:
            await self._updater.abort(session)
            return self._last
        if session is self._committed:  # by another call, which found all of it staged before this one came here
            return None
        if self._session is not session:
            raise UpdateConflictError(f"session {session.session_id} was aborted", field="session_id")
        if session.num_missing or not session.is_staged or self._is_held:
            return None
        return await self._commit(session)

    async def _commit(self, session: UpdateSession) -> UpdateReport:
        self._session, self._committed = None, session
        report = await self._updater.commit(session, self._version or self._last_label())
        self._last = None if TIED_HEAD in session else report
        return report

    async def _drop(self, joined: Sequence[UpdateSession]) -> None:
        for session in joined:
            self._session = None if self._session is session else self._session
            await self._updater.abort_quietly(session)

    def _forget(self, joined: Sequence[UpdateSession]) -> None:
        """As `_drop`, without waiting."""
        self._session = None if self._session in joined else self._session
        self._updater.start_aborts(joined)
