"""An update that comes in buckets, each a call of its own without begin and commit: as an engine has it, over HTTP.

Owns the session that a client's buckets have joined, as far as a client has to know it. The server says of each bucket
which session it belongs to, and commits that when the model lacks nothing.
"""

from __future__ import annotations

import secrets
from typing import cast

import msgspec

from headrace.client.asks import message_body
from headrace.client.uploads import Ask, Uploads
from headrace.engine.control import UpdateTerms
from headrace.engine.held_tensors import HeldTensors
from headrace.engine.update_session import UpdateSession
from headrace.types.errors import UpdateConflictError
from headrace.types.http import BEGIN_TOKEN_BYTES, MESSAGE_TYPE, AbortAsk, JoinAsk, PartJoined, SettleAsk
from headrace.types.weights import TensorInfo, UpdateReport

_JOINED = msgspec.msgpack.Decoder(cast("type[PartJoined | None]", PartJoined | None))
_REPORT = msgspec.msgpack.Decoder(cast("type[UpdateReport | None]", UpdateReport | None))


class BucketUploads:
    """The buckets of one client."""

    def __init__(self, ask: Ask, uploads: Uploads) -> None:
        self._ask = ask
        self._uploads = uploads
        self._session: UpdateSession | None = None  # the last that was joined
        self._token = b""  # of an ask to join that has no answer
        self._sender = secrets.token_hex(BEGIN_TOKEN_BYTES)

    async def add(self, held: HeldTensors, terms: UpdateTerms) -> UpdateReport | None:
        """Bring these tensors. The report, if they were the last that the model lacked."""
        ask = JoinAsk(
            manifest=held.manifest,
            version=terms.version or None,
            mode=terms.mode,
            in_flight=terms.in_flight,
            timeout=terms.timeout_s,
            token=secrets.token_bytes(BEGIN_TOKEN_BYTES),
            sender=self._sender,
        )
        self._token = ask.token
        part = _JOINED.decode(await self._ask("join_update", message_body(ask), MESSAGE_TYPE))
        if part is None:
            return None
        session = self._session = _joined(self._session, part, held.manifest, terms.timeout_s)
        self._token = b""
        self._uploads.open(part.begun)
        await self._uploads.stage(session, held)
        settle = SettleAsk(session.session_id, part.indices)
        return _REPORT.decode(await self._ask("settle_part", message_body(settle), MESSAGE_TYPE))

    def forget(self) -> AbortAsk | None:
        """What ends the update, after an error. A session of which nobody heard is known by the ask that opened it."""
        session, token = self._session, self._token
        self._session, self._token = None, b""
        if session is not None:
            return AbortAsk(session.session_id)
        return AbortAsk(token=token) if token else None


def _joined(
    session: UpdateSession | None, part: PartJoined, manifest: tuple[TensorInfo, ...], timeout: float
) -> UpdateSession:
    """The session as the server has it; `session` is that of the bucket before. `UpdateConflictError` if others bring
    tensors too."""
    begun = part.begun
    if session is None or session.session_id != begun.session_id:
        session = UpdateSession(begun.session_id, "", begun.mode, (), timeout, dtype=begun.dtype)
    session.unsettle([session.index_of(info) for info in manifest if info.name in session])
    session.grow(tuple(info for info in manifest if info.name not in session))
    if tuple(map(session.index_of, manifest)) != part.indices:
        message = f"session {session.session_id} was extended by others, too"
        raise UpdateConflictError(message, field="session_id")
    return session
