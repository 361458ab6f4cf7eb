"""Ports for what has to be told one before it listens, as frameworks have their trainers do."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000  # above those that services have


def free_port() -> int:
    """One that nobody listens at, outside the range of which the host gives one to whoever connects or does not care:
    else it is somebody's by the time that it is used. Tests that look at once begin in different places."""
    first, last = (int(each) for each in (_RANGE.read_text() if _RANGE.exists() else "32768 60999").split())
    ports = list(range(_LOWEST, first)) + list(range(last + 1, 1 << 16))
    start = random.SystemRandom().randrange(len(ports))
    for port in ports[start:] + ports[:start]:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise AssertionError("every port is taken")
