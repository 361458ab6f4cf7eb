"""What verl's entry point group `verl.plugins` loads, in the driver and in every Ray worker: says where the backend is.

Owns nothing. It loads what `import verl` has to load for any rollout, and none of Headrace's engine.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplicaRegistry

NAME = "headrace"


def load_replica() -> Any:
    """The class of `rollout.name=headrace`, loaded where servers are launched."""
    from headrace.rl.verl_plugin.replica import HeadraceReplica

    return HeadraceReplica


base._ROLLOUT_REGISTRY[(NAME, "async")] = "headrace.rl.verl_plugin.adapter.ServerAdapter"
RolloutReplicaRegistry.register(NAME, load_replica)
