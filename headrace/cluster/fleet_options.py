"""Settings of replicas that are processes of this host. Owns their names, defaults and bounds; every field is a flag of
`headrace serve`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.server.options import from_keywords
from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_seconds

MAX_FLEET = 256


class FleetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas there are, and what becomes of one that ends.

    dp_size                 replicas of the model, each a process of this host with ranks of its own, behind one address
    max_replica_restarts    times a replica that ended is started again within replica_restart_window
    replica_restart_window  seconds
    hang_timeout            seconds a replica may answer nothing before it is ended and started again
    """

    dp_size: int = 1
    max_replica_restarts: int = 3
    replica_restart_window: float = 600.0
    hang_timeout: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.dp_size <= MAX_FLEET:
            raise ConfigError(f"dp_size must be in [1, {MAX_FLEET}], got {self.dp_size}", field="dp_size")
        if self.max_replica_restarts < 0:
            raise ConfigError("max_replica_restarts must be at least 0", field="max_replica_restarts")
        for name in ("replica_restart_window", "hang_timeout"):
            as_seconds(getattr(self, name), name, ConfigError)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FleetOptions:
        """Build from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
        return from_keywords(cls, values, "a setting of replicas")
