"""An engine behind HTTP, with the engine's own surface: `Client`, `AsyncClient`, and `Runtime`, which starts a server.

Torch-free. Knows what crosses the wire (`headrace.types.http`), and nothing of how a server answers.
"""

from headrace.client.async_client import AsyncClient
from headrace.client.client import Client
from headrace.client.runtime import Runtime

__all__ = ["AsyncClient", "Client", "Runtime"]
