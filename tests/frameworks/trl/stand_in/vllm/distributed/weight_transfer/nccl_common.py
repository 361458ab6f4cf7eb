"""See the package: the trainer's end, over gloo."""

from __future__ import annotations

from typing import Any

import torch

from tests.server.vllm_client import broadcast_root, stateless_group


class TrainerEnd:
    """Rank 0 of a group. `group` has what TRL lets go of at the end."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.group = self
        self.store: Any = None
        self.socket: Any = None
        self._group = stateless_group(info["master_port"], info["world_size"])

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._group.broadcast([tensor], broadcast_root()).wait()


def trainer_init(init_info: dict[str, Any]) -> TrainerEnd:
    return TrainerEnd(init_info)
