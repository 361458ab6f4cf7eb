"""The OpenAPI document of a table of routes. Owns its shape; what is told of a route is `described`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from headrace import __version__
from headrace.server.auth import Access
from headrace.server.described import DIALECTS, JSON, RouteNote, note_of
from headrace.server.native_types import GenerateBody
from headrace.types.http import GenerateAsk
from headrace.types.sampling_params import SamplingParams

_REF = "#/components/schemas/{name}"
_OTHER_BODIES = (dict, bytes)
_ONE_OR_MANY = ("stop", "stop_token_ids")
_DESCRIPTION = (
    "A null counts as a key that is not there. What a key may be beyond its type is checked and named in the refusal. "
    "Security `data` is the key of the server, `admin` that of control calls if there is one; without a key none is "
    "needed."
)
_VARYING = re.compile(r"{(\w+)(?::path)?}")


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`param` is the field at fault, `retryable` whether to ask again may help, `err_type` the class of our error."""

    message: str
    type: str
    param: str | None
    code: int
    retryable: bool
    err_type: str | msgspec.UnsetType = msgspec.UNSET


class ErrorReply(ErrorDetail, frozen=True, kw_only=True):
    """What every refused call is answered, in both shapes that clients know."""

    object: str
    error: ErrorDetail


class RouteFacts(msgspec.Struct, frozen=True):
    """A route as it is. `advice`: where it is known and refused, what to do instead."""

    path: str
    methods: tuple[str, ...]
    access: Access
    advice: str = ""


def document(routes: Iterable[RouteFacts], title: str, more: Mapping[str, RouteNote] | None = None) -> dict[str, Any]:
    """OpenAPI 3.1 of `routes`; `more` is told of those that no server has. One that nobody has described has its path,
    methods and key."""
    facts = list(routes)
    notes = {each.path: (more or {}).get(each.path) or note_of(_plain(each.path)) for each in facts}
    schemas = _Schemas(note for note in notes.values() if note is not None)
    paths: dict[str, Any] = {}
    for each in facts:
        described = notes[each.path] or RouteNote(dialect="Headrace", summary="")
        operations = {method.lower(): _operation(each, method, described, schemas) for method in each.methods}
        paths[_plain(each.path)] = operations
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "description": _DESCRIPTION},
        "tags": [{"name": name, "description": text} for name, text in DIALECTS.items()],
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": {"data": bearer, "admin": bearer}},
    }


def _plain(path: str) -> str:
    return _VARYING.sub(r"{\1}", path)


def _operation(facts: RouteFacts, method: str, note: RouteNote, schemas: _Schemas) -> dict[str, Any]:
    more = [f"Refused: {note.remark}"] if note.remark else []
    if facts.advice:
        more.append(f"501 here: {facts.advice}.")
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', _plain(facts.path)).rstrip('_')}",
        "tags": [note.dialect],
        "summary": note.summary,
        "security": [] if facts.access == "open" else [{facts.access: []}],
        "responses": {"200": _reply(note, schemas), "default": _error()},
    }
    if more:
        operation["description"] = " ".join(more)
    if note.refused:
        operation["x-headrace-refused"] = list(note.refused)
    names = [(name, "path", True) for name in _VARYING.findall(facts.path)]
    names += [(name, "query", False) for name in note.query]
    if names:
        operation["parameters"] = [
            {"name": name, "in": place, "required": is_needed, "schema": {"type": "string"}}
            for name, place, is_needed in names
        ]
    if note.body is not None and method not in ("GET", "DELETE"):
        content = {note.media_type: {"schema": schemas.of(note.body)}}
        operation["requestBody"] = {"required": note.body not in _OTHER_BODIES, "content": content}
    return operation


def _reply(note: RouteNote, schemas: _Schemas) -> dict[str, Any]:
    reply: dict[str, Any] = {"description": note.reply or "its answer"}
    if note.reply_type is not None:
        reply["content"] = {JSON: {"schema": schemas.of(note.reply_type)}}
    return reply


def _error() -> dict[str, Any]:
    schema = {"$ref": _REF.format(name=ErrorReply.__name__)}
    return {"description": "what is wrong", "content": {JSON: {"schema": schema}}}


class _Schemas:
    """The schemas of all types that routes have. Where a dialect leaves the check of a key to `SamplingParams`, its
    schema there is told."""

    def __init__(self, notes: Iterable[RouteNote]) -> None:
        types = {kind for note in notes for kind in (note.body, note.reply_type) if _is_struct(kind)}
        ordered = sorted((*types, SamplingParams, ErrorReply), key=lambda kind: kind.__name__)
        refs, self.components = msgspec.json.schema_components(ordered, ref_template=_REF)
        self._refs: dict[Any, dict[str, Any]] = dict(zip(ordered, refs, strict=True))
        sampling: dict[str, Any] = self.components[SamplingParams.__name__]["properties"]
        for name in _ONE_OR_MANY:
            sampling[name] = {"anyOf": [sampling[name]["items"], {**sampling[name]}]}
        for schema in self.components.values():
            properties = schema.get("properties", {})
            for name, told in properties.items():
                if name in sampling and not told.keys() & {"type", "anyOf", "$ref", "enum"}:
                    properties[name] = sampling[name]
        one = {"$ref": _REF.format(name=SamplingParams.__name__)}
        for kind in types & {GenerateBody, GenerateAsk}:
            many = {"type": "array", "items": one}
            self.components[kind.__name__]["properties"]["sampling_params"] = {"anyOf": [one, many, {"type": "null"}]}

    def of(self, kind: Any) -> dict[str, Any]:
        if kind is dict:
            return {"type": "object"}
        if kind is bytes:
            return {"type": "string", "format": "binary"}
        return self._refs[kind]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
