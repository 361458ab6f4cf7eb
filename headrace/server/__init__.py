"""An engine over HTTP: SGLang's dialect, OpenAI's, control routes and metrics.

Names are imported when they are first used: settings are read by command lines that never serve.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.server.app import create_app
    from headrace.server.blocking import ServerHandle
    from headrace.server.options import ServerOptions
    from headrace.server.run import RunningServer, serve

__all__ = ["RunningServer", "ServerHandle", "ServerOptions", "create_app", "serve"]

_HOMES = {
    "RunningServer": "run",
    "ServerHandle": "blocking",
    "ServerOptions": "options",
    "create_app": "app",
    "serve": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
