"""A replica of a rollout, as verl launches one: where its server runs, on which devices, under which name."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.workers.rollout.replica import RolloutReplica

from headrace.rl.verl_plugin.actor import RolloutServer
from headrace.rl.verl_plugin.translation import launch_of, server_name
from headrace.types.errors import ConfigError

MAX_RESTARTS = 3


class HeadraceReplica(RolloutReplica):  # type: ignore[misc]
    """A server on one host, over the devices of the replica's workers."""

    async def launch_servers(self) -> None:
        """Start the server, and wait until it answers. Raises `ConfigError` for what it cannot be."""
        if self.nnodes > 1:
            message = f"a replica of {self.world_size} devices does not fit a host of {self.gpus_per_node}"
            raise ConfigError(f"{message}; replicas on several hosts do", field="tensor_model_parallel_size")
        hosts = await asyncio.gather(*(worker.__ray_call__.remote(_place) for worker in self.workers))
        mode, suffix = self.rollout_mode.value, self.name_suffix
        role = "reward" if self.is_reward_model else "teacher" if self.is_teacher_model else ""
        launch = launch_of(self.config, self.model_config.path, mode, self.replica_rank)
        server = (
            ray.remote(RolloutServer)
            .options(
                name=server_name(self.replica_rank, role, suffix),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                max_restarts=MAX_RESTARTS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(hosts[0][0], soft=False),
                runtime_env={"env_vars": self._environment([visible for _, visible in hosts])},
            )
            .remote(launch)
        )
        self._server_address = await server.address.remote()
        self._server_handle = server
        self.servers = [server]

    def _environment(self, visible: list[str]) -> dict[str, str]:
        """The server sees the devices of its workers, and Ray changes nothing about that."""
        platform = get_platform()
        seen = list(dict.fromkeys(device for each in visible for device in each.split(",") if device))
        if len(seen) > self.world_size:  # every worker sees all devices of the host
            first = self.replica_rank * self.world_size % self.gpus_per_node
            seen = seen[first : first + self.world_size]
        return {
            **dict.fromkeys(platform.ray_noset_envvars(), "1"),
            **platform.rollout_env_vars(),
            platform.visible_devices_envvar(): ",".join(seen),
        }


def _place(_: Any) -> tuple[str, str]:
    """Asked of a worker: its host, and the devices that it sees."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id, os.environ.get(get_platform().visible_devices_envvar(), "")
