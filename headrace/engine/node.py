"""A node of an engine over several hosts, kept by a process that is somebody else's: a trainer's. Owns the thread in
which that goes on. `headrace serve --node-rank` is a process for it."""

from __future__ import annotations

import logging
from typing import Any

from headrace.config import EngineConfig
from headrace.engine.core_host import resolve_settings
from headrace.ipc.own_threads import OwnThreads
from headrace.types.errors import HeadraceError

END_SECONDS = 10.0
logger = logging.getLogger(__name__)


class KeptNode:
    """Node `node_rank` of these settings, whose ranks are processes of its own, until node 0 has ended."""

    def __init__(self, **settings: Any) -> None:
        """Returns at once; node 0 waits for it. Raises `ConfigError` for what is wrong with settings here."""
        from headrace.core.rank_node import NodeKeeper

        config = EngineConfig.from_dict(settings)
        self._seconds = config.control_timeout
        self._keeper = NodeKeeper(resolve_settings(config))
        self._threads = OwnThreads()
        self._threads.start("headrace-node", self._run)

    def close(self) -> None:
        """Wait for node 0 to end, `control_timeout` at most; then leave it, which ends the engine. Idempotent."""
        self._threads.join(self._seconds)
        self.leave()

    def leave(self) -> None:
        """End what is here, whatever node 0 does. Idempotent."""
        self._keeper.stop()
        self._threads.join(END_SECONDS)

    def _run(self) -> None:
        try:
            self._keeper.run()
        except HeadraceError as error:  # node 0 says it to its callers
            logger.error("this node has left the engine: %s", error)
