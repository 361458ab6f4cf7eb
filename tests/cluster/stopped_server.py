"""The end of a server of asyncio's that leaves no connection behind."""

from __future__ import annotations

import asyncio


async def stop_accepting(server: asyncio.Server) -> None:
    """Close it once what it has accepted is in its handlers' hands: a connection that asyncio has accepted, and has no
    transport for when the server is closed, is left open until Python finds it, in the middle of some other test."""
    for each in server.sockets:
        asyncio.get_running_loop().remove_reader(each.fileno())
    for _ in range(20):
        await asyncio.sleep(0)
    server.close()
