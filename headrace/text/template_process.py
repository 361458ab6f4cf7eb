"""The process in which chat templates are rendered: `python -P template_process.py DESCRIPTOR SECONDS BYTES`.

A template is a program of whoever made the model's folder, and messages are what it computes with. Owns what it may
use: jinja's immutable sandbox, `BYTES` of memory, `SECONDS` for one rendering (then the process ends itself, whatever
becomes of its parent). Reads and writes frames (four bytes of length, JSON) on the inherited socket until it is closed.
Imports nothing of the package, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.debug  # not in the middle of an error, when there may be no memory for it
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_CHARACTERS = 1 << 26
MAX_REASON = 1000
READY = b"+"
_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning; templates read the first or, rarely, the second."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The statements inside, with names of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` without the attributes of the class."""

    def __call__(self, *args: Any, **more: Any) -> dict[Any, Any]:
        return dict(*args, **more)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that stores no attribute by which one gets at the interpreter."""

    def __init__(*args: Any, **more: Any) -> None:
        values = dict(*args[1:], **more)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def serve(link: socket.socket, seconds: float) -> None:
    """Render until the other end is closed."""
    link.sendall(READY)
    while frame := _receive(link):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles the signal: it ends the process
        text, reason = "", ""
        try:
            text = render(**json.loads(frame))
        except (jinja2.TemplateError, *_FAULTS) as error:
            reason = str(error)[:MAX_REASON] or type(error).__name__
        signal.setitimer(signal.ITIMER_REAL, 0)
        del frame
        reply = json.dumps({"text": text, "reason": reason}).encode()
        link.sendall(len(reply).to_bytes(4, "big") + reply)


def render(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """The text of a conversation. Raises what the template raises, and `ValueError` for a text without end."""
    pieces: list[str] = []
    num_characters = 0
    for piece in _compiled(template).generate({**variables, "messages": [_with_reasoning(each) for each in messages]}):
        pieces.append(piece)
        num_characters += len(piece)
        if num_characters > MAX_CHARACTERS:
            raise ValueError(f"the text has over {MAX_CHARACTERS} characters")
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        {"raise_exception": _raise, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": _Namespace}
    )
    return environment.from_string(template)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    message = {name: value for name, value in message.items() if value is not None}
    found = [message[name] for name in _REASONING if name in message]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Not jinja's own filter, which writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _check_name(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace stores no name that begins with _: {name!r}")


def _receive(link: socket.socket) -> bytes:
    """The next frame; b"" when the other end is closed."""
    size = int.from_bytes(link.recv(4, socket.MSG_WAITALL), "big")
    return link.recv(size, socket.MSG_WAITALL) if size else b""


if __name__ == "__main__":
    descriptor, limit, num_bytes = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (int(num_bytes), int(num_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(socket.socket(fileno=int(descriptor)), float(limit))
