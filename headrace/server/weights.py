"""Weight updates in buckets, SGLang's dialect: `/update_weights_from_tensor`, and the calls that newer releases put
around it.

Owns their bodies and replies. Which update a bucket belongs to is `headrace.engine.joined_update`; what its bytes mean,
`headrace.weights.foreign`.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.engine.control import terms_of_part
from headrace.engine.foreign_update import add_payload
from headrace.engine.groups import load_format_of
from headrace.server.coerce import read_control
from headrace.server.errors import FieldNames, refusal
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.update_body import UPDATE_FIELDS, UpdateBody, check_selector
from headrace.server.wire import json_reply
from headrace.types.errors import HeadraceError, RequestError
from headrace.types.weights import UpdateReport


class TensorBody(UpdateBody, kw_only=True):
    """`serialized_named_tensors` has base64 for each rank. `flush_cache` and `torch_empty_cache` have nothing to do:
    entries of the prefix cache belong to the weights that made them."""

    serialized_named_tensors: list[str]
    load_format: str | None = None
    flush_cache: bool = True
    torch_empty_cache: bool = False
    selector: str | None = None


class SelectorBody(msgspec.Struct):
    """Which model is meant: there is one."""

    selector: str | None = None


class BucketFace:
    """The routes by which a trainer sends an update in buckets."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._engine = state.engine

    def endpoints(self) -> list[Endpoint]:
        table = (
            ("/update_weights_from_tensor", self.update_weights_from_tensor),
            ("/begin_weight_update", self.begin_weight_update),
            ("/end_weight_update", self.end_weight_update),
        )
        return [Endpoint(path, handler, ("POST",), access="admin") for path, handler in table]

    async def begin_weight_update(self, request: Request) -> Response:
        """POST /begin_weight_update: the next bucket begins an update anew, which ends with `/end_weight_update`. A
        client that never calls this does without either."""
        body = await read_control(request, SelectorBody)
        try:
            check_selector(body.selector)
            await self._state.run(request, self._engine.runtime.joined.begin())
        except HeadraceError as error:
            return refusal(error)
        return json_reply({"success": True, "message": "An update may begin."})

    async def end_weight_update(self, request: Request) -> Response:
        """POST /end_weight_update: the update has to be complete, and is live then; else it is over. A second one
        changes nothing, and has the same answer."""
        await read_control(request, dict[str, Any])
        try:
            await self._state.run(request, self._engine.runtime.joined.finish())
        except HeadraceError as error:
            return refusal(error)
        return json_reply({"success": True, "message": "The update is complete."})

    async def update_weights_from_tensor(self, request: Request) -> Response:
        """POST /update_weights_from_tensor: a bucket joins the update that is open, or begins one; the bucket that
        completes it makes it live."""
        try:
            with FieldNames(UPDATE_FIELDS):
                report = await self._state.run(request, await self._joining(request))
        except HeadraceError as error:
            return refusal(error)
        if report is None:
            message = "Bucket taken; weights change with the one that completes them."
            return json_reply({"success": True, "message": message})
        return json_reply({"success": True, "message": "Weights updated.", "report": report})

    async def _joining(self, request: Request) -> Coroutine[Any, Any, UpdateReport | None]:
        """What a bucket asks for."""
        runtime = self._engine.runtime
        try:
            body = await read_control(request, TensorBody)
            payloads = self._payloads(body)
            terms = terms_of_part(body.weight_version, body.mode, body.policy, body.timeout_s)
        except BaseException:  # whatever it is, as in `JoinedUpdate.add`
            await runtime.joined.end()
            raise
        device = self._engine.resolved.device
        return add_payload(runtime.joined, runtime.updater, payloads, body.load_format, terms, device)

    def _payloads(self, body: TensorBody) -> list[str]:
        """One for each of this engine's ranks."""
        load_format_of(body.load_format)
        check_selector(body.selector)
        payloads = body.serialized_named_tensors
        num_ranks = self._engine.resolved.engine.tp_size
        if len(payloads) != num_ranks:
            message = f"serialized_named_tensors has {len(payloads)} entries, this engine has tp_size {num_ranks}"
            raise RequestError(message, field="serialized_named_tensors")
        return payloads
