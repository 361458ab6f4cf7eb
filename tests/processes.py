"""What tests ask the system about processes, any of which may end meanwhile."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]


def children_of(pid: int, *, word: str = "", everything_below: bool = False) -> list[int]:
    """The processes that this one has started and that are not gone, by id: with `word` among their arguments, if one
    is given. Those that they started too, with `everything_below`. None, if there is no such process."""
    try:
        started = psutil.Process(pid).children(recursive=everything_below)
    except psutil.NoSuchProcess:
        return []
    return sorted(each.pid for each in started if not word or word in _arguments(each))


def runs(pid: int) -> bool:
    """Whether there is such a process; one that has ended and was not waited for runs no more."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []
