"""An engine over HTTP: SGLang's dialect, OpenAI's, control routes and metrics.

Names are imported when they are first used: settings are read by command lines that never serve.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.server.app import create_app
    from headrace.server.options import ServerOptions
    from headrace.server.run import RunningServer, serve

__all__ = ["RunningServer", "ServerOptions", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    module = {"create_app": "app", "ServerOptions": "options", "RunningServer": "run", "serve": "run"}.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
