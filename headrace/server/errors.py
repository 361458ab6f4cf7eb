"""Errors as HTTP answers. Owns the bodies of all error replies; knows nothing of routes.

A body can be read in both shapes that clients of the dialects know: flat (`message`, `type`, `code`, `param`) and under
`error`.
"""

from __future__ import annotations

import http
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from headrace.types.errors import ErrorInfo, HeadraceError, InternalError, RequestError

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
_INTERNAL = "internal error; the server's log has the details"


class MethodError(RequestError):
    """The call changes something, and was made by a method that only reads: it needs a POST."""

    status = 405


def error_body(
    status: int, message: str, *, param: str = "", kind: str = "", retryable: bool = False, err_type: str = ""
) -> dict[str, Any]:
    """The JSON object that describes an error. `param` is the field at fault, `err_type` the class of `types/errors`
    that a client of ours raises again."""
    detail = {
        "message": message,
        "type": kind or http.HTTPStatus(status).phrase,
        "param": param or None,
        "code": status,
        "retryable": retryable,
    }
    if err_type:
        detail["err_type"] = err_type
    return {"object": "error", **detail, "error": detail}


def body_of(error: HeadraceError, kind: str = "") -> dict[str, Any]:
    """As `error_body`, of one of our errors; what an internal error says stays in the log."""
    told = shown(error.info())
    return error_body(
        error.status, told.message, param=error.field, kind=kind, retryable=error.retryable, err_type=told.code
    )


def shown(error: ErrorInfo) -> ErrorInfo:
    """What a client is told of an error."""
    return ErrorInfo(error.code, _INTERNAL, error.field) if error.code == InternalError.__name__ else error


def event_body(error: HeadraceError) -> dict[str, Any]:
    """The object sent inside a stream that has already begun."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": body_of(error, kind)["error"]}


def respond(body: Mapping[str, Any], allowed: str = "") -> Response:
    """An error body as a response, which has the status that it says. `allowed`: of a 405, the methods that are."""
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if body["retryable"] else {}
    if allowed:
        headers["allow"] = allowed
    return Response(msgspec.json.encode(body), body["code"], headers, "application/json")


def refusal(error: HeadraceError, **more: Any) -> Response:
    """What a control call of the dialect answers with that was refused."""
    return respond({**body_of(error), "success": False, **more})


async def on_headrace_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)
    return respond(body_of(error), "POST" if isinstance(error, MethodError) else "")


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler for what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    status, what = error.status_code, f"{request.method} {request.url.path}"
    return respond(
        error_body(status, f"{error.detail}: {what}", kind=str(status)), (error.headers or {}).get("Allow", "")
    )


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Exception handler for a client that went away in the middle of its body: nobody reads what is answered."""
    logger.debug("a client left while it sent its body: %s %s", request.method, request.url.path)
    return Response(status_code=400)


async def on_unexpected(request: Request, error: Exception) -> Response:
    """Exception handler for our own bugs: the log has the traceback, the client a plain 500."""
    return respond(error_body(500, _INTERNAL))


class FieldNames(AbstractContextManager[None]):
    """Inside, errors name fields as our code does; outside, as the dialect does: `names` maps the first to the second.

    A key names a field with everything below it; the longest key that fits counts. A field mapped to "" leaves its
    parts at the top.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, HeadraceError) and (told := renamed(error, self._names)) is not error:
            raise told from None


def renamed(error: HeadraceError, names: Mapping[str, str]) -> HeadraceError:
    """The same error in the dialect's words; see `FieldNames`."""
    ours = max((name for name in names if _is_below(error.field, name)), key=len, default=None)
    if ours is None:
        return error
    theirs, rest = names[ours], error.field[len(ours) :]
    field = theirs + rest if theirs else rest.lstrip(".")
    return error if field == error.field else type(error)(error.message.replace(error.field, field, 1), field=field)


def _is_below(field: str, name: str) -> bool:
    return field == name or field.startswith((f"{name}.", f"{name}["))
