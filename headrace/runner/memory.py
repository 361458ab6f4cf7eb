"""How many KV pages a device can hold. Owns the arithmetic and what it measures; allocates nothing that stays.

The budget is a share of what was free before the engine took anything. From it go what has been taken by the time a
full-size step has run (context, weights, tables, kernels, the step's own memory, which the allocator keeps), and what
captured graphs take: their common pool, measured by capturing the greatest, and what the driver takes for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headrace.parallel import Mesh
from headrace.types.errors import ConfigError

_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: free before anything was taken, taken once a full step had run, what graphs will take, what is kept for
    single requests' results and gaps between blocks. The rest is for pages of `page_bytes`, up to `fraction` of all.
    `whose` says of several ranks which one this is of."""

    free_at_start: int
    taken: int
    graphs: int
    spare: int
    fraction: float
    page_bytes: int = 1
    whose: str = ""

    @property
    def pages(self) -> int:
        """For KV pages."""
        return int(self.fraction * self.free_at_start) - self.taken - self.graphs - self.spare

    def tightest(self, mesh: Mesh, device: torch.device) -> MemoryPlan:
        """That of the rank that has room for the fewest pages, the same on all ranks."""
        if mesh.num_ranks * mesh.num_stages == 1:
            return self
        sizes = self.free_at_start, self.taken, self.graphs, self.spare, self.page_bytes
        found = mesh.of_all.all_gather(torch.tensor(sizes, dtype=torch.int64, device=device))
        plans = [
            replace(self, free_at_start=free, taken=taken, graphs=graphs, spare=spare, page_bytes=page_bytes)
            for free, taken, graphs, spare, page_bytes in (each.tolist() for each in found)
        ]
        least, most = (choose(plans, key=lambda plan: plan.pages // plan.page_bytes) for choose in (min, max))
        has, others = least.pages // _MIB, most.pages // _MIB
        whose = f" on rank {plans.index(least)}, which has {has} MiB for pages (others have up to {others} MiB)"
        return replace(least, whose=whose)

    def explain(self) -> str:
        """For `headrace check` and the log."""
        return (
            f"{self.fraction:g} of {self.free_at_start // _MIB} MiB free, less {self.taken // _MIB} MiB taken once a"
            f" full step had run, less {self.graphs // _MIB} MiB for graphs and"
            f" {self.spare // _MIB} MiB to spare{self.whose}"
        )

    def check(self, pool_bytes: int, least: int) -> None:
        """Raise `ConfigError` if a pool of this size does not fit in what is free; 0: if not even `least` bytes do."""
        if pool_bytes == 0 and self.pages < least:
            raise ConfigError(
                f"memory_fraction {self.fraction:g} of {self.free_at_start // _MIB} MiB leaves no room for KV pages:"
                f" weights and one step take {self.taken // _MIB} MiB, graphs {self.graphs // _MIB} MiB{self.whose}",
                field="memory_fraction",
            )
        left = self.free_at_start - self.taken - self.graphs - self.spare
        if pool_bytes > left:
            raise ConfigError(
                f"a KV pool of {pool_bytes // _MIB} MiB does not fit in the {left // _MIB} MiB that are left"
                f"{self.whose}",
                field="kv_pool_tokens",
            )


def free_bytes() -> int:
    """Device memory that nobody holds."""
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])
