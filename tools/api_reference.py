"""docs/api.md from the docstrings of the public names: `python -m tools.api_reference > docs/api.md`.

A class has its own section; a method that says the same as another class's is named there and written once.
`tests/arch/test_api_reference.py` holds the page to the source.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec

INTRODUCTION = """\
# API reference

Made from the docstrings by `tools/api_reference.py`; do not edit. What these names do together is in the README and the
other pages here.
"""
SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Engines", "headrace", ("Engine", "AsyncEngine", "UpdateSession", "serve")),
    ("Clients", "headrace", ("Client", "AsyncClient", "Runtime")),
    ("Values", "headrace", ("SamplingParams", "Generation", "ChatReply", "TensorInfo", "UpdateReport", "SaveReport")),
    ("Values of calls", "headrace.engine", ("GenerateOptions",)),
    ("Settings", "headrace", ("EngineConfig",)),
    ("Settings of a server", "headrace.server.options", ("ServerOptions",)),
    ("Saved models", "headrace", ("check_saved_model",)),
    ("Trainers", "headrace.rl", ("push_weights", "WeightPusher", "PushReport", "hf_named_tensors", "VerlEngine")),
    (
        "Conversations with tools",
        "headrace.rl.rollout",
        ("RolloutLoop", "RolloutLimits", "new_group", "Conversation", "FunctionTool"),
    ),
)
_SEE = re.compile(r"^See `[\w.]+`\.?$")
_ROW = re.compile(r"^(\w[\w, /]*?) {2,}(\S.*)$")


def api_reference() -> str:
    """The page."""
    parts, written = [INTRODUCTION], dict[str, str]()
    for title, module, names in SECTIONS:
        parts.append(f"\n## {title}\n")
        home = importlib.import_module(module)
        parts += [_entry(module, name, getattr(home, name), written) for name in names]
    parts.append(f"\n## Errors\n\n{_errors()}")
    return "".join(parts)


def _entry(module: str, name: str, value: Any, written: dict[str, str]) -> str:
    """The section of a public name; methods whose text is in `written`, by their names, are only named."""
    head = f"\n### `{module}.{name}`\n\n"
    if inspect.isfunction(value):
        return f"{head}{_call(name, value)}\n{_text(inspect.getdoc(value) or '')}\n"
    text = _text(inspect.getdoc(value) or "")
    if not inspect.isclass(value) or issubclass(value, dict):
        return head + text
    if issubclass(value, msgspec.Struct):
        fields = "".join(f"    {line}\n" for line in _fields(value))
        return f"{head}{text}\n```text\n{fields}```\n" + "".join(_methods(name, value, written))
    return f"{head}{_call(name, value.__init__)}\n{text}" + "".join(_methods(name, value, written))


def _fields(value: type[msgspec.Struct]) -> Iterator[str]:
    """`name: type = default` of each field."""
    for field in msgspec.structs.fields(value):
        kind = value.__annotations__.get(field.name) or str(field.type)
        default = "" if field.default is msgspec.NODEFAULT else f" = {field.default!r}"
        if field.default_factory is not msgspec.NODEFAULT:
            default = f" = {field.default_factory()!r}"
        yield f"{field.name}: {kind}{default}"


def _methods(name: str, value: type, written: dict[str, str]) -> Iterator[str]:
    same: list[str] = []
    for method, member in sorted(inspect.getmembers(value)):
        if method.startswith("_") or not (callable(member) or isinstance(member, property)):
            continue
        if issubclass(value, msgspec.Struct) and method in value.__struct_fields__:
            continue
        text = inspect.getdoc(member) or ""
        text = _original(text) if _SEE.match(text.partition("\n")[0]) else text
        if written.get(method) == text or (not text and method in written):
            same.append(method)
            continue
        written.setdefault(method, text)
        if isinstance(member, property):
            yield f"\n`{name}.{method}`" + (f": {_text(text)}" if text else "\n")
        else:
            yield f"\n{_call(f'{name}.{method}', member)}\n{_text(text)}"
    if same:
        yield f"\nAs above: {', '.join(f'`{method}`' for method in same)}.\n"


def _original(text: str) -> str:
    """The docstring that another one refers to, and what that one adds."""
    first, _, rest = text.partition("\n")
    path = first.removeprefix("See `").rstrip("`.").split(".")
    found = getattr(importlib.import_module("headrace"), path[0])
    for part in path[1:]:
        found = getattr(found, part)
    return f"{inspect.getdoc(found) or ''}{rest and chr(10) + rest}"


def _call(name: str, function: Any) -> str:
    """A signature as a block of Python, a parameter to a line where it is long."""
    signature = inspect.signature(function)
    taken = [each for each in signature.parameters.values() if each.name != "self"]
    parameters, kinds = [_parameter(each) for each in taken], [each.kind for each in taken]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = signature.return_annotation
    end = "" if result in (inspect.Signature.empty, "None", None) else f" -> {result}"
    prefix = "async " if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function) else ""
    line = f"{prefix}{name}({', '.join(parameters)}){end}"
    if len(line) > 110:
        line = f"{prefix}{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){end}"
    return f"```text\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    is_rest, is_named_rest = (parameter.kind is each for each in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD))
    stars = "*" if is_rest else "**" if is_named_rest else ""
    default, kind = "", parameter.annotation
    if parameter.default is not inspect.Parameter.empty:
        default = f" = {parameter.default!r}"
    annotation = "" if kind is inspect.Parameter.empty else f": {kind if isinstance(kind, str) else kind.__name__}"
    return f"{stars}{parameter.name}{annotation}{default}"


def _text(docstring: str) -> str:
    """A docstring as Markdown: its tables of names become tables."""
    parts = [_table(block) or " ".join(block.split()) for block in docstring.split("\n\n") if block.strip()]
    return "\n\n".join(parts) + "\n"


def _table(block: str) -> str:
    """A block of `name   meaning` lines, continued by deeper ones; "" for any other."""
    rows: list[list[str]] = []
    column = min((found.start(2) for line in block.splitlines() if (found := _ROW.match(line))), default=0)
    for line in block.splitlines():
        name, meaning = line[:column].strip(), line[column:]
        if column and not line.startswith(" ") and line[column - 1 : column] == " " and meaning[:1].strip():
            rows.append([name, meaning])
        elif rows and line.startswith("  "):
            rows[-1][1] += " " + line.strip()
        else:
            return ""
    escaped = ((name, meaning.replace("|", "\\|")) for name, meaning in rows)
    return "| | |\n|---|---|\n" + "\n".join(f"| `{name}` | {meaning} |" for name, meaning in escaped)


def _errors() -> str:
    """The tree of errors, as its module draws it."""
    text = inspect.getdoc(importlib.import_module("headrace.types.errors")) or ""
    tree = re.search(r"^ {4}HeadraceError\n(?: {4}.*\n)+", text, re.MULTILINE)
    assert tree is not None
    return f"All are names of `headrace`, and a `field` says what was wrong.\n\n```text\n{tree[0]}```\n"


if __name__ == "__main__":
    print(api_reference(), end="")
