"""Control calls as SGLang takes them: a JSON object is needed, values are coerced, unknown keys are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from headrace.server.wire import convert, decode_object, read_object

Body = TypeVar("Body")


async def read_control(request: Request, kind: type[Body]) -> Body:
    """The body as `kind`; a GET may put it in the query instead. Raises `RequestError` naming the field."""
    if request.method == "GET":
        raw = await request.body()
        values: Mapping[str, Any] = decode_object(raw) if raw.strip() else dict(request.query_params)
    else:
        values = await read_object(request)
    return convert(values, kind, strict=False)
