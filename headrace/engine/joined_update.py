"""The implicit update of an engine: calls that bring some of its tensors each, as SGLang's weight calls do, join it.

Owns which session that is, its label, and whose it is. It is opened by the first call, and committed by the one after
which the model lacks nothing, or where it was begun by name, when it is finished so. An error in one, and the session's
deadline, end it, and the next call begins another. So does a call of another sender (`headrace.engine.sender`): half an
update whose sender died is never completed by the next one. Who finishes it again hears the same
(`headrace.engine.update_outcome`). Must not know tensors or HTTP: the caller stages them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from headrace.engine.client import CoreClient
from headrace.engine.control import DEFAULT_UPDATE_TIMEOUT, UpdateTerms
from headrace.engine.sender import HERE, Sender, why_another
from headrace.engine.update import Run, Updater
from headrace.engine.update_outcome import UpdateOutcome
from headrace.engine.update_session import UpdateSession
from headrace.types.errors import HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.request import DEFAULT_VERSION
from headrace.types.weights import TensorInfo, UpdateReport
from headrace.weights.weight_map import TIED_HEAD

logger = logging.getLogger(__name__)

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
        self._committing = asyncio.Lock()
        self._last = UpdateOutcome(client)
        self._is_begun = False  # by name, and not finished
        self._held_until = -math.inf  # while no session is open
        self._version = ""  # that a call has given
        self._sender = HERE  # of the last session's first call
        self._groups: set[str] = set()  # that have brought tensors of the session
        self._young_groups: set[str] = set()  # joined since it was opened

    async def add(
        self,
        infos: Iterable[TensorInfo],
        terms: UpdateTerms,
        stage: StagePart,
        run: Run = _here,
        sender: Sender = HERE,
    ) -> UpdateReport | None:
        """Have these tensors checked, staged by `stage`, and committed with all before them if that makes a model.
        None: it does not yet.

        A tensor that came before is replaced. `terms.version` may be "": the last one that was given counts at the
        commit, and if none was, the weights keep their label. One that differs from that of the calls before begins
        the update anew, and so does another sender: no weights are mixed of two. Groups may bring one together, if all
        were joined before it. Where nobody can tell senders apart, a tensor that came already is of another update.
        The other terms are those of the first call. Parts may be staged
        at the same time. A tied head that comes when its update is live, since nothing else was missing, is compared
        with what is live; no tensors at all begin no update.

        Where the caller is not on the engine's loop, `run` runs coroutines there, and `stage` is awaited where he is.
        """
        joined: list[UpdateSession] = []
        try:
            indices: Sequence[int] = await run(self._join(tuple(infos), terms, joined, sender))
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

    async def join(
        self, infos: Iterable[TensorInfo], terms: UpdateTerms, sender: Sender
    ) -> tuple[UpdateSession, Sequence[int]] | None:
        """The first half of `add`, for one who stages what he brings in calls of his own and ends with `settle`, or
        aborts the session where that fails. None: it is no tensor."""
        joined: list[UpdateSession] = []
        try:
            indices = await self._join(tuple(infos), terms, joined, sender)
        except BaseException:  # whatever it is, as in `add`
            await self._drop(joined)
            raise
        for session in joined:
            session.num_calls -= 1  # it comes in calls of its own, which are counted
        return (joined[0], indices) if joined else None

    async def settle(self, session: UpdateSession, indices: Sequence[int]) -> UpdateReport | None:
        """The second half: these were staged."""
        try:
            session.num_calls += 1
            return await self._finish(session, indices)
        except BaseException:  # whatever it is, as in `add`
            await self._drop([session])
            raise

    async def make_way(self, reason: str) -> None:
        """Drop the update, if no call of it is in progress, for this reason: its sender may be gone, and a whole update
        by another road or a release does not wait for its deadline."""
        async with self._joining:
            if self._session is not None and not self._session.num_calls:
                await self._supersede(reason)

    async def begin_other(
        self, manifest: tuple[TensorInfo, ...] | None, terms: UpdateTerms, *, follows_up: bool = False
    ) -> UpdateSession:
        """A session of its own, that whoever asks for it ends; for a complete one what is open makes way."""
        if not terms.partial:
            await self.make_way(f"another one was begun, to {terms.version!r}")
        return await self._updater.begin(manifest, terms, follows_up=follows_up)

    async def note_joined(self, group: str) -> None:
        """A trainer's group was joined, by a sender that has no part in what is open."""
        self._young_groups.add(group)
        await self.make_way(f"weight group {group!r} was joined")

    async def note_left(self, group: str) -> None:
        """It was left: what it has brought is nothing that others may complete."""
        async with self._joining:
            if group in self._groups:
                await self._supersede(f"weight group {group!r} was left")

    async def begin(self) -> None:
        """The next call begins an update anew, which is not committed before `finish`. Once that update is over, by an
        error, its deadline or `abort_update`, or if it never comes, whoever began it may be gone: then others are not
        held up by it."""
        await self.end()
        self._is_begun = True
        self._last.begin()
        self._held_until = asyncio.get_running_loop().time() + DEFAULT_UPDATE_TIMEOUT

    def let_go(self) -> None:
        """Whatever was begun by name, another update is committed when it is complete."""
        self._held_until = -math.inf

    @property
    def _is_held(self) -> bool:
        held_until = math.inf if self._session is not None else self._held_until
        return self._is_begun and self._held_until > -math.inf and asyncio.get_running_loop().time() < held_until

    async def finish(self, version: str = "") -> UpdateReport:
        """No call brings more of the update that is open: commit it, under this label if there is one. With
        nothing open it is what came of the last one, until another is begun or a call brings tensors: its report while
        it is live, or its error. The first finish of one that was committed with its last tensor may bring the label.
        `WeightUpdateError` names what the update lacks; `UpdateConflictError` if it is over or live no more."""
        session, was_begun, self._is_begun = self._session, self._is_begun, False
        if session is None:
            async with self._committing:  # a call that commits it has its verdict first
                if was_begun and not self._last.is_known:
                    self._last.fail("nothing of it came")
                return await self._last.repeat(version)
        self._version = version or self._version
        self._last.note_finish()
        try:
            return await self._commit(session)
        except BaseException:  # whatever it is, as in `add`
            await self._drop([session])
            raise

    async def check_label(self) -> None:
        """As `UpdateOutcome.check_label`. One that is committed at the moment has its verdict first."""
        async with self._committing:
            self._last.check_label()

    async def end(self) -> None:
        """Drop the update, if there is one: a call that could not even say its tensors is an error in it as well."""
        await self._drop([] if self._session is None else [self._session])

    async def _join(
        self, manifest: tuple[TensorInfo, ...], terms: UpdateTerms, joined: list[UpdateSession], sender: Sender
    ) -> list[int]:
        """The places of the tensors in the session, of which `joined` hears at once. It has one call more then."""
        async with self._joining:
            if terms.version and self._version and terms.version != self._version:
                await self._supersede(f"{terms.version!r} is another label than {self._version!r}")
            known = self._session or ()
            reason = why_another(sender, manifest, self._sender, self._young_groups, known)
            if reason:
                await self._supersede(reason)
            if self._session is None and not reason and self._is_late_head(manifest, terms):
                return await self._compare_head(manifest, terms, joined)
            if not manifest:  # nothing whose end could be the end of an update that is committed meanwhile
                self._version = (self._session and terms.version) or self._version
                return []
            if self._session is not None:
                joined[:] = [self._session]
                try:
                    return await self._extend(self._session, manifest, terms, sender)
                except HeadraceError as error:
                    if error.field != "session_id":
                        raise
                self._session = None  # it has ended meanwhile, by its deadline or by `abort_update`
                self.let_go()
            await self._open(terms, joined, sender)
            return await self._extend(joined[0], manifest, terms, sender)

    def _is_late_head(self, manifest: tuple[TensorInfo, ...], terms: UpdateTerms) -> bool:
        """The last update was live before its sender came to the head: then the model has none of its own. Where other
        weights came since, or these were lost, it is the first of another update."""
        status, last = self._client.status, self._last.headless
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
        joined[0].num_calls += 1
        return list(await self._updater.extend(joined[0], manifest))

    async def _open(self, terms: UpdateTerms, joined: list[UpdateSession], sender: Sender) -> None:
        if not self._is_held:
            self.let_go()
        self._last.begin()
        labelled = msgspec.structs.replace(terms, version=terms.version or self._last_label())
        session = await self._updater.begin((), labelled, is_open=True)
        self._session, self._version, self._last.headless = session, "", None
        self._sender = sender
        self._groups.clear()
        self._young_groups.clear()
        joined[:] = [session]

    def _last_label(self) -> str:
        status = self._client.status
        return DEFAULT_VERSION if status is None else status.last_version

    async def _extend(
        self, session: UpdateSession, manifest: tuple[TensorInfo, ...], terms: UpdateTerms, sender: Sender
    ) -> list[int]:
        for name, count in Counter(info.name for info in manifest).most_common(1):
            if count > 1:
                raise WeightUpdateError(f"{name} is named twice", field=name)
        known = {info.name: session.index_of(info) for info in manifest if info.name in session}
        await self._updater.extend(session, tuple(info for info in manifest if info.name not in known))
        session.unsettle(known.values())
        self._version = terms.version or self._version
        self._groups |= {sender.name} if sender.road == "group" else set()
        session.num_calls += 1
        return [session.index_of(info) for info in manifest]

    async def _finish(self, session: UpdateSession, indices: Sequence[int]) -> UpdateReport | None:
        """Commit the session if nothing is to come."""
        session.num_calls -= 1
        session.note_sent(set(indices), is_settled=True)
        if session.is_partial:
            await self._updater.abort(session)
            return self._last.headless
        if session is self._last.committed:  # by another call, which found all of it staged before this one came here
            return None
        if self._session is not session:
            raise UpdateConflictError(f"session {session.session_id} was aborted", field="session_id")
        if session.num_missing or not session.is_staged or self._is_held:
            return None
        return await self._commit(session)

    async def _commit(self, session: UpdateSession) -> UpdateReport:
        self._is_begun = False
        self._session = None
        self._last.note_commit(session)
        try:
            async with self._committing:
                report = await self._updater.commit(session, self._version or self._last_label())
        except BaseException as error:  # whatever it is, who asks again hears the same
            self._last.note_no_commit(session, error)
            raise
        self._last.note_live(session, report)
        return report

    async def _supersede(self, reason: str) -> None:
        """Drop the update for something else, if there is one, and have whoever runs the engine know."""
        session = self._session
        if session is None:
            return
        self.let_go()
        self._last.fail(reason)
        if await self._updater.abort_at_last(session):
            poisoned = ". It was in place: live weights are no version until a complete update lands"
            logger.warning(
                "an update that was not complete (session %d, %d tensors) is dropped: %s%s",
                *(session.session_id, len(session.manifest), reason, poisoned if session.mode == "inplace" else ""),
            )
        self._session = None if self._session is session else self._session

    async def _drop(self, joined: Sequence[UpdateSession]) -> None:
        self._leave(joined)
        for session in joined:
            await self._updater.abort_quietly(session)

    def _forget(self, joined: Sequence[UpdateSession]) -> None:
        """As `_drop`, without waiting."""
        self._leave(joined)
        self._updater.start_aborts(joined)

    def _leave(self, joined: Sequence[UpdateSession]) -> None:
        """A call has failed that had joined one of these, or none yet. What has another session now goes on."""
        self.let_go()
        if self._session in joined or not (joined or self._session) or any(each.is_partial for each in joined):
            self._last.fail("an error in one of its calls has ended it")
        self._session = None if self._session in joined else self._session
