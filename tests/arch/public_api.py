"""The public surface as text: every name of `headrace.__all__`, fields of values, signatures of functions and methods.

After a deliberate change: `python -m tests.arch.public_api > tests/arch/public_api.txt`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import msgspec

import headrace


def public_api() -> str:
    """One line per name."""
    return "\n".join(line for name in headrace.__all__ for line in _lines(name, getattr(headrace, name))) + "\n"


def _lines(name: str, value: object) -> Iterator[str]:
    if inspect.isfunction(value):
        yield f"{name}{_parameters(value)}"
    elif not isinstance(value, type):
        yield name
    elif issubclass(value, BaseException):
        yield f"{name}({', '.join(base.__name__ for base in value.__bases__)})"
    elif issubclass(value, msgspec.Struct):
        yield f"{name}: {', '.join(value.__struct_fields__)}"
    else:
        for method, function in sorted(inspect.getmembers(value)):
            if method == "__init__" or not method.startswith("_"):
                yield f"{name}.{method}{_parameters(function)}"


def _parameters(function: object) -> str:
    if isinstance(function, property):
        return ""
    if not callable(function):
        return f" = {function!r}"
    parameters = inspect.signature(function).parameters.values()
    return f"({', '.join(_parameter(p) for p in parameters if p.name != 'self')})"


def _parameter(parameter: inspect.Parameter) -> str:
    kind = parameter.kind
    stars = {kind.VAR_POSITIONAL: "*", kind.VAR_KEYWORD: "**"}.get(kind, "")
    default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
    return f"{stars}{parameter.name}{default}"


if __name__ == "__main__":
    print(public_api(), end="")
