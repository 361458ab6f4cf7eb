"""See the package: what vLLM's producer broadcasts, by its rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.server.vllm_client import DEFAULT_PACKED_BYTES, packed


def packed_nccl_broadcast_producer(
    iterator: Iterator[tuple[str, torch.Tensor]], group: Any, src: int, post_iter_func: Callable[[Any], torch.Tensor]
) -> None:
    assert src == 0
    for buffer in packed([post_iter_func(item) for item in iterator], DEFAULT_PACKED_BYTES):
        group.broadcast(buffer)
