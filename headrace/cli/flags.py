"""Command-line flags made from the fields of a struct, so that a setting has one name, one default and one meaning.

Owns the mapping field -> flag: underscores become dashes; a bool becomes `--x / --no-x`, a literal
its choices, a tuple a flag that may be repeated, a dict a JSON object. Only flags that were given
end up in the dict handed to the struct, which does the checking. Must not know what any setting does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

_SCALARS = (int, float, str)


def add_flags(
    parser: argparse.ArgumentParser,
    struct: type[msgspec.Struct],
    *,
    title: str,
    skip: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
) -> None:
    """Add one flag per field of `struct`, except `skip`. `rename` maps a field to another flag name (underscores).

    A flag that is not given leaves no attribute behind: see `given`.
    """
    group = parser.add_argument_group(title)
    meanings = _meanings(struct.__doc__ or "")
    for field in msgspec.structs.fields(struct):
        if field.name in skip:
            continue
        name = (rename or {}).get(field.name, field.name)
        text = " ".join(filter(None, (meanings.get(field.name, ""), _default_note(field)))).replace("%", "%%")
        options = _options(field, name)
        group.add_argument("--" + name.replace("_", "-"), dest=name, default=argparse.SUPPRESS, help=text, **options)


def given(
    arguments: argparse.Namespace,
    struct: type[msgspec.Struct],
    *,
    skip: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of `struct`, except `skip`, that were given as flags."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        name = (rename or {}).get(field.name, field.name)
        if name in arguments and field.name not in skip:
            value = getattr(arguments, name)
            is_tuple = isinstance(value, list) and get_origin(_without_none(field.type)) is tuple
            found[field.name] = tuple(value) if is_tuple else value
    return found


def flag_names(
    struct: type[msgspec.Struct], *, skip: Collection[str] = (), rename: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The fields of `struct`, except `skip`, by the names of their flags, with underscores."""
    return {(rename or {}).get(name, name): name for name in struct.__struct_fields__ if name not in skip}


def with_keys(options: dict[str, Any], names: Sequence[str] = ("api_key", "admin_api_key")) -> dict[str, Any]:
    """`options`, and the keys of these `names` in the environment (HEADRACE_API_KEY, HEADRACE_ADMIN_API_KEY) that no
    flag gives.

    They are taken out of the environment that the processes started here inherit.
    """
    for name in names:
        key = os.environ.pop(f"HEADRACE_{name.upper()}", None)
        if key is not None and not options.keys() & {name, f"{name}_file"}:
            options[name] = key.strip()
    return options


def _options(field: msgspec.structs.FieldInfo, name: str) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for a field of this type."""
    kind = _without_none(field.type)
    metavar = name.rsplit("_", 1)[-1].upper()
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) in (tuple, list, Sequence):
        return {"action": "append", "type": get_args(kind)[0], "metavar": metavar}
    if get_origin(kind) in (dict, Mapping):
        return {"type": _json_object, "metavar": "JSON"}
    if kind in _SCALARS:
        return {"type": kind, "metavar": metavar}
    raise TypeError(f"no flag can be made for {name}: {field.type!r}")


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _default_note(field: msgspec.structs.FieldInfo) -> str:
    if field.default in (msgspec.NODEFAULT, None, "", ()) or field.default is False:
        return ""
    return f"(default: {field.default})"


def _meanings(docstring: str) -> dict[str, str]:
    """Field meanings from a docstring table: `name   text`, continued by deeper lines."""
    found: dict[str, str] = {}
    current = ""
    for line in docstring.splitlines():
        row = re.match(r"^ {4}([a-z_]+) {2,}(\S.*)$", line)
        if row:
            current = row[1]
            found[current] = row[2].strip()
        elif current and line.startswith("     ") and line.strip():
            found[current] += " " + line.strip()
        else:
            current = ""
    return found
