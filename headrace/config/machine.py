"""What this machine has for a process: memory, cores, a working directory. Reads system files; decides nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from headrace.types.errors import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and usage, of version 2 and of version 1."""
_QUOTA_FILES = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Quota of processor time and the period that it is for, in one file of version 2 and in two of version 1."""


def available_memory() -> int:
    """Bytes this process may still take: the cgroup's remainder or the machine's free memory, whichever is less."""
    amounts = [_meminfo_available()]
    for limit, usage in _CGROUP_FILES:
        try:
            bound = (_CGROUPS / limit).read_text().strip()
            used = int((_CGROUPS / usage).read_text())
        except OSError:
            continue
        if bound.isdigit():
            amounts.append(max(0, int(bound) - used + _unused_cache((_CGROUPS / limit).with_name("memory.stat"))))
    return min(amounts)


def _unused_cache(statistics: Path) -> int:
    """Bytes of files read long ago: counted as used, but the kernel drops them before it refuses memory."""
    try:
        values = dict(line.split() for line in statistics.read_text().splitlines())
    except OSError:  # a sandbox that shows the limit alone
        return 0
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def check_working_directory() -> None:
    """Raise `ConfigError` where there is none any more: torch ends the process that imports it there."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working directory is gone ({error.strerror}); change to another one") from None


def available_cores() -> int:
    """Cores this process may run on: at most as many as the quota of its cgroup keeps busy, a part of one being one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *_quotas()])


def _quotas() -> Iterator[int]:
    """What each version's quota amounts to, in cores."""
    for names in _QUOTA_FILES:
        try:
            words = " ".join((_CGROUPS / name).read_text() for name in names).split()
        except OSError:
            continue
        if len(words) == 2 and words[0].isdigit():  # not "max", and not -1
            yield max(1, -(-int(words[0]) // int(words[1])))


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
