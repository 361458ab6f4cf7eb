"""What the tests' broken road leaves behind."""

from __future__ import annotations

import asyncio
import gc
import socket

import pytest

from tests.cluster.relay import Relay
from tests.cluster.stopped_server import stop_accepting


@pytest.mark.parametrize("num_turns", range(6))
def test_a_relay_that_is_closed_while_somebody_comes_leaves_no_connection(num_turns: int) -> None:
    """Else another test fails, whenever Python finds it."""

    async def story() -> None:
        target = await asyncio.start_server(lambda _, writer: writer.transport.abort(), "127.0.0.1", 0)
        relay = await Relay(target.sockets[0].getsockname()[1]).start()
        port = int(relay.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            for _ in range(num_turns):
                await asyncio.sleep(0)
            await relay.close()
        await stop_accepting(target)
        transports = (each for each in gc.get_objects() if isinstance(each, asyncio.Transport))
        own = [each for each in transports if (each.get_extra_info("sockname") or (None, None))[1] == port]
        assert all(each.is_closing() for each in own)

    asyncio.run(story())
