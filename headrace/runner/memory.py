"""How many KV pages a device can hold. Owns the arithmetic and what it measures; allocates nothing that stays.

The budget is a share of what was free before the engine took anything. From it go what has been taken by the time a
full-size step has run (context, weights, tables, kernels, the step's own peak, which the allocator keeps), the same
peak again for captured graphs, which have a pool of their own, and a reserve for what a driver takes per graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.types.errors import ConfigError

GRAPH_RESERVE_BYTES = 384 << 20
_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: free before anything was taken, taken when the step had run, one step's peak, and what pages get."""

    free_at_start: int
    taken: int
    step_peak: int
    pages: int

    def explain(self, fraction: float) -> str:
        """For `headrace check` and the log."""
        return (
            f"{fraction:g} of {self.free_at_start // _MIB} MiB free, less {self.taken // _MIB} MiB taken once a full"
            f" step had run, less {(self.step_peak + GRAPH_RESERVE_BYTES) // _MIB} MiB for graphs"
        )


def free_bytes() -> int:
    """Device memory that nobody holds."""
    return int(torch.cuda.mem_get_info()[0])


class StepPeak:
    """What the allocator took for what runs inside, in bytes: its peak, with the gaps between blocks."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._before = 0

    def __enter__(self) -> StepPeak:
        torch.cuda.synchronize()
        self._before = torch.cuda.memory_reserved()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.num_bytes = torch.cuda.memory_reserved() - self._before


def plan_memory(free_at_start: int, step_peak: int, fraction: float, *, has_graphs: bool) -> MemoryPlan:
    """What is left for pages, measured now. Raises `ConfigError` if nothing is."""
    taken = free_at_start - free_bytes()
    graphs = step_peak + GRAPH_RESERVE_BYTES if has_graphs else 0
    pages = int(fraction * free_at_start) - taken - graphs
    if pages <= 0:
        raise ConfigError(
            f"memory_fraction {fraction:g} of {free_at_start // _MIB} MiB leaves nothing for KV pages: weights and one"
            f" step take {taken // _MIB} MiB, graphs {graphs // _MIB} MiB",
            field="memory_fraction",
        )
    return MemoryPlan(free_at_start, taken, step_peak, pages)


def check_pool(pool_bytes: int, step_peak: int, *, has_graphs: bool) -> None:
    """Raise `ConfigError` if a pool of this size does not fit beside graphs in what is free now."""
    graphs = step_peak + GRAPH_RESERVE_BYTES if has_graphs else 0
    if pool_bytes + graphs > free_bytes():
        raise ConfigError(
            f"a KV pool of {pool_bytes // _MIB} MiB and {graphs // _MIB} MiB of graphs do not fit in"
            f" {free_bytes() // _MIB} MiB of free device memory",
            field="kv_pool_tokens",
        )
