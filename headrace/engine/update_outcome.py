"""What came of the last joined update, for whoever finishes it, or finishes it again.

Owns that outcome until another update begins, and the label that a first finish may still bring: none is given to
weights that it was not meant for. Must not know calls, senders or what is open.
"""

from __future__ import annotations

from types import NoneType

import msgspec

from headrace.engine.client import CoreClient
from headrace.engine.ledger import Landed
from headrace.engine.update_session import UpdateSession
from headrace.types.errors import ErrorInfo, HeadraceError, UpdateConflictError
from headrace.types.messages import CoreStatus, GetStatus, SetVersion
from headrace.types.weights import UpdateReport
from headrace.weights.weight_map import TIED_HEAD


class UpdateOutcome:
    """Nothing yet, or the session that is being committed, its report, or its error."""

    def __init__(self, client: CoreClient) -> None:
        self.committed: UpdateSession | None = None
        """The last of which the commit was asked for."""
        self.headless: UpdateReport | None = None
        """Of the last update, if it had no head, which may come late."""
        self._client = client
        self._found: UpdateReport | ErrorInfo | UpdateSession | None = None
        self._landed_before: Landed | None = None  # the last update of any road when it became an error
        self._is_finished = False  # a finish was answered by it, so that its label stays

    @property
    def is_known(self) -> bool:
        """An update was committed, or has failed, since one was begun last."""
        return self._found is not None

    def begin(self) -> None:
        """Another update begins."""
        self._found, self._is_finished = None, False

    def note_finish(self) -> None:
        """Its label is what the finish said."""
        self._is_finished = True

    def note_commit(self, session: UpdateSession) -> None:
        """It is asked for."""
        self.committed = self._found = session

    def note_live(self, session: UpdateSession, report: UpdateReport) -> None:
        """A commit has succeeded."""
        self.headless = None if TIED_HEAD in session else report
        if self._found is session:  # else another has begun
            self._found = report

    def note_no_commit(self, session: UpdateSession, error: BaseException) -> None:
        """Nobody has heard of its commit, for this reason: it may have landed before it was given up."""
        landed = self._client.ledger.landed
        if landed is not None and landed.session_id == session.session_id:
            self.note_live(session, landed.report)
        elif self._found is session:
            known = error.info() if isinstance(error, HeadraceError) else None
            self.fail("its commit was given up, since who asked for it went away", known)

    def fail(self, reason: str, known: ErrorInfo | None = None) -> None:
        """The update is none, for this reason if not by a `known` error."""
        error = UpdateConflictError(f"the update is over: {reason}; begin another", field="session_id")
        self._found, self._landed_before = known or error.info(), self._client.ledger.landed

    def check_label(self) -> None:
        """Raise the error of an update that has failed, if no weights came since: a label that comes without weights is
        the one that these were to have."""
        if isinstance(self._found, ErrorInfo) and self._client.ledger.landed is self._landed_before:
            raise self._found.to_exception()

    async def repeat(self, version: str) -> UpdateReport:
        """What a finish comes to that has nothing to commit: the report while the weights are live, or the error. The
        first may bring their label. `UpdateConflictError` if they are live no more, or there were none."""
        found = self._found
        if isinstance(found, ErrorInfo):
            raise found.to_exception()
        status = await self._client.ask(GetStatus, CoreStatus)
        if not isinstance(found, UpdateReport) or (found.epoch, bool(status.version)) != (status.epoch, True):
            what = "the last one is live no more" if found else "none was begun"
            raise UpdateConflictError(f"there is no update to finish: {what}", field="session_id")
        if version not in ("", found.version):
            if self._is_finished:
                message = f"the last update was finished as {found.version!r}; another label is one of another update"
                raise UpdateConflictError(message, field="version")
            epoch = found.epoch
            await self._client.change(lambda call_id: SetVersion(call_id, version, epoch=epoch), NoneType)
            self._found = found = msgspec.structs.replace(found, version=version)
        self._is_finished = True
        return found
