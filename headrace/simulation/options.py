"""Settings of a simulation. Owns their names, defaults and bounds; every field is a flag of `headrace simulate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from headrace.cluster.policies import POLICY_NAMES, PolicyName
from headrace.cluster.replicas import MAX_REPLICAS
from headrace.server.options import from_keywords
from headrace.simulation.step_times import DeviceProfile, read_profile
from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_choice

UpdateRoad = Literal["broadcast", "store"]
MAX_SIMULATED = 1 << 14
GRAINS = (1, 2, 4, 8, 16, 32, 64)

_BOUNDS: dict[str, tuple[float, float]] = {
    "fronts": (1, 1024),
    "groups_per_replica": (1, 1 << 16),
    "group_size": (1, 1 << 16),
    "prompt_tokens": (1, 1 << 20),
    "shared_tokens": (0, 1 << 20),
    "median_output_tokens": (1, 1 << 20),
    "output_sigma": (0, 5),
    "max_output_tokens": (1, 1 << 20),
    "steps": (1, 10_000),
    "staleness": (0, 100),
    "train_seconds": (0, 1e6),
    "network_bytes": (1e3, 1e15),
    "store_bytes": (1e3, 1e15),
    "seed": (0, 2**63),
}


class SimulationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated. Raises `ConfigError` naming the field.

    profile               model and device of one replica: a name, or a JSON file of its numbers
    policy                which replica a request goes to
    fronts                routers, each one core, that divide replicas and groups among them
    groups_per_replica    groups of a batch, for each replica
    groups                groups of a batch in all (None: by replica)
    group_size            samples of one prompt, each a request of its own
    prompt_tokens         tokens of each prompt
    shared_tokens         of these, the first ones that all prompts begin with
    median_output_tokens  outputs have log-normal lengths with this median
    output_sigma          and this standard deviation of their logarithm
    max_output_tokens     and end here at the latest
    known_ends            the engine knows where each output ends (as with ignore_eos); else it samples an end
    steps                 training steps
    staleness             batches that may be sent ahead of training (0: generate, train and update take turns)
    train_seconds         a training step takes
    mtbf_hours            mean time between failures of one replica (None: none fails)
    resume                a failed replica's requests go on elsewhere from their tokens; else from their prompts
    restart_seconds       until a replica that failed may load weights (None: the profile's start)
    update_road           weights reach all replicas in one broadcast, or each reads them from one store
    network_bytes         bytes per second into each replica from another host
    store_bytes           bytes per second of the store, for all replicas together
    grain                 real tokens of one simulated one (1: every step is simulated)
    seed                  of lengths, prompts and failures
    """

    profile: str = "qwen3-8b-h200"
    policy: PolicyName = "cache_aware"
    fronts: int = 1
    groups_per_replica: int = 8
    groups: int | None = None
    group_size: int = 8
    prompt_tokens: int = 512
    shared_tokens: int = 0
    median_output_tokens: int = 512
    output_sigma: float = 0.8
    max_output_tokens: int = 2048
    known_ends: bool = False
    steps: int = 2
    staleness: int = 0
    train_seconds: float = 0.0
    mtbf_hours: float | None = None
    resume: bool = False
    restart_seconds: float | None = None
    update_road: UpdateRoad = "broadcast"
    network_bytes: float = 50e9
    store_bytes: float = 100e9
    grain: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        as_choice(self.policy, POLICY_NAMES, "policy", ConfigError)
        as_choice(self.update_road, ("broadcast", "store"), "update_road", ConfigError)
        for name, (least, most) in _BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be in [{least:g}, {most:g}], got {getattr(self, name)}", field=name)
        if self.groups is not None and not 1 <= self.groups <= 1 << 24:
            raise ConfigError(f"groups must be in [1, {1 << 24}]", field="groups")
        if self.mtbf_hours is not None and not 0 < self.mtbf_hours <= 1e9:
            raise ConfigError("mtbf_hours must be more than 0, and at most 1e9", field="mtbf_hours")
        if self.restart_seconds is not None and not 0 <= self.restart_seconds <= 1e6:
            raise ConfigError("restart_seconds must be in [0, 1e6]", field="restart_seconds")
        if self.shared_tokens > self.prompt_tokens:
            raise ConfigError("shared_tokens are part of prompt_tokens, and may not be more", field="shared_tokens")
        if self.grain not in GRAINS:
            raise ConfigError(f"grain must be one of {', '.join(map(str, GRAINS))}", field="grain")
        most, pool = self.prompt_tokens + self.max_output_tokens, read_profile(self.profile).kv_pool_tokens
        if most > pool:
            message = f"prompt_tokens and max_output_tokens are {most} together; the profile's KV pool holds {pool}"
            raise ConfigError(message, field="max_output_tokens")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SimulationOptions:
        """Build from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
        return from_keywords(cls, values, "a setting of a simulation")

    @property
    def device(self) -> DeviceProfile:
        return read_profile(self.profile)

    @property
    def page_tokens(self) -> int:
        """Real tokens of a simulated page: it has at least one simulated token."""
        return max(self.device.page_size, self.grain)

    def num_groups(self, num_replicas: int) -> int:
        """Of one batch."""
        return self.groups_per_replica * num_replicas if self.groups is None else self.groups


def check_replicas(num_replicas: int, options: SimulationOptions) -> None:
    """Raise `ConfigError` for a number of replicas that cannot be simulated so."""
    if not 1 <= num_replicas <= MAX_SIMULATED:
        raise ConfigError(f"replicas must be in [1, {MAX_SIMULATED}], got {num_replicas}", field="replicas")
    if options.fronts > num_replicas:
        raise ConfigError(f"{options.fronts} fronts have nothing to divide of {num_replicas} replicas", field="fronts")
    if -(-num_replicas // options.fronts) > MAX_REPLICAS:
        raise ConfigError(f"a front has at most {MAX_REPLICAS} replicas: give more fronts", field="fronts")
    page_size = options.device.page_size
    if max(page_size, options.grain) % min(page_size, options.grain):
        raise ConfigError(f"grain must divide the page size of {page_size}, or be a multiple of it", field="grain")
