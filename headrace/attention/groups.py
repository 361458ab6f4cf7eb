"""The device backends of several KV groups, as one: each prepares a step in its own part of the metadata.

A model of one group has its backend as it is. Must not know plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.attention.base import AttentionStep, Bucket, DeviceAttention, DeviceTables, StepRows
from headrace.types.request import Int32Array

_ALIGN = 64


class GroupedAttention:
    """As `DeviceAttention`, of backends by KV group. A page has one number in all of their pools."""

    def __init__(self, backends: Sequence[DeviceAttention]) -> None:
        self._backends = backends
        self._starts = [0]
        for backend in backends:
            self._starts.append(self._starts[-1] + -(-backend.metadata_size // _ALIGN) * _ALIGN)
        self.metadata_size = self._starts[-1]
        self.captures = all(backend.captures for backend in backends)

    def fill(self, metadata: Int32Array, rows: StepRows, bucket: Bucket) -> int:
        """As `DeviceAttention.fill`."""
        in_use = 0
        for start, backend in zip(self._starts, self._backends, strict=False):
            in_use = start + backend.fill(metadata[start : start + backend.metadata_size], rows, bucket)
        return in_use

    def steps(self, tables: DeviceTables, bucket: Bucket) -> list[AttentionStep]:
        """As `DeviceAttention.steps`."""
        return [
            step
            for start, backend in zip(self._starts, self._backends, strict=False)
            for step in backend.steps(replace(tables, metadata=tables.metadata[start:]), bucket)
        ]
