"""See the package."""

from __future__ import annotations

from tests.free_ports import free_port


def get_ip() -> str:
    return "127.0.0.1"


def get_open_port() -> int:
    return free_port()
