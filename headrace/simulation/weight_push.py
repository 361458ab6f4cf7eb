"""When new weights are live on each replica: told one after the other by their front, then sent by one of two roads."""

from __future__ import annotations

import math

from headrace.simulation.front_model import FrontModel
from headrace.simulation.options import SimulationOptions

HOP_SECONDS = 10e-6
"""Of one hop of a broadcast's tree."""


def commit_delays(front: FrontModel, numbers: list[int], num_replicas: int, options: SimulationOptions) -> list[float]:
    """Seconds from the push's begin to the commit, for each of these replicas of a front, of `num_replicas` in all."""
    profile = options.device
    if options.update_road == "broadcast":
        hops = math.ceil(math.log2(num_replicas + 1))
        transfer = profile.weight_bytes / options.network_bytes + hops * HOP_SECONDS
    else:
        share = min(options.network_bytes, options.store_bytes / max(1, num_replicas))
        transfer = profile.weight_bytes / share
    share_of_core = max(0.1, 1.0 - front.look_share)
    return [
        (place + 1) * front.costs.request / share_of_core + transfer + profile.update for place, _ in enumerate(numbers)
    ]


def restart_seconds(options: SimulationOptions) -> float:
    """From a replica's death until its successor serves: it starts, and takes the weights of a peer."""
    profile = options.device
    start = profile.start if options.restart_seconds is None else options.restart_seconds
    return start + profile.weight_bytes / options.network_bytes
