"""An engine over HTTP: SGLang's dialect, OpenAI's, control routes and metrics."""

from headrace.server.app import create_app
from headrace.server.options import ServerOptions
from headrace.server.run import RunningServer, serve

__all__ = ["RunningServer", "ServerOptions", "create_app", "serve"]
