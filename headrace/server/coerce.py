"""Control calls as SGLang takes them: a JSON object is needed, values are coerced, unknown keys are ignored.

A page of anybody's can make a browser send a GET, or a POST of plain text or of a form, but none of JSON: what changes
something is therefore neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from headrace.server.errors import MethodError
from headrace.server.wire import convert, decode_object, read_body
from headrace.types.errors import RequestError, RequestTooLargeError

Body = TypeVar("Body")
READING_METHODS = ("GET", "HEAD")
MAX_READING_BYTES = 8 << 10


class MediaTypeError(RequestError):
    """The body is not announced as JSON."""

    status = 415


async def read_control(request: Request, kind: type[Body], query: Mapping[str, Any] | None = None) -> Body:
    """The body as `kind`; a GET may put it in the query instead. Raises `RequestError` naming the field.

    With `query` a POST needs no body: what it has counts before what is there.
    """
    if request.method in READING_METHODS:
        raw = await _small_body(request)
        return convert(decode_object(raw) if raw.strip() else dict(request.query_params), kind, strict=False)
    _check_media_type(request)
    if query is not None and not _has_body(request):
        return convert(query, kind, strict=False)
    return await read_body(request, lambda values: convert({**(query or {}), **values}, kind, strict=False))


async def _small_body(request: Request) -> bytes:
    """The body of a call that only reads: a few fields, as a query would have them."""
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_READING_BYTES:
            message = f"the body of a {request.method} must have at most {MAX_READING_BYTES} bytes"
            raise RequestTooLargeError(message, field="body")
    return raw


def check_changes(request: Request, what: str, field: str) -> None:
    """Raise `MethodError` if a request that changes something is a GET."""
    if request.method in READING_METHODS:
        raise MethodError(f"{what} changes the engine and needs a POST", field=field)


def _check_media_type(request: Request) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if _has_body(request) and not (
        given == "application/json" or given.startswith("application/") and given.endswith("+json")
    ):
        raise MediaTypeError("content-type must be application/json", field="content-type")


def _has_body(request: Request) -> bool:
    """One of no announced length has none."""
    return bool(request.headers.get("content-length", "").strip("0")) or "transfer-encoding" in request.headers
