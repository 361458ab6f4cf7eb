"""Memory that may be given back, as values: its tags, and how its contents and the requests in flight are treated."""

from __future__ import annotations

from typing import Literal, get_args

MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
MEMORY_TAGS: tuple[MemoryTag, ...] = get_args(MemoryTag)

OnRelease = Literal["abort", "recompute"]
"""Requests in flight are answered with what they have, or kept and computed again after the resume."""

Restore = Literal["auto", "copy", "disk", "await"]
"""Where weights come from: the host's copy, the folder of the start, or a complete update to come. "auto": the copy if
one was kept, else the update."""
