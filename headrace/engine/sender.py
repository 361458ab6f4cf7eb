"""Who brings the tensors of a joined update, as far as one can be told, and when a call is of another update."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from headrace.types.weights import TensorInfo


class Sender(msgspec.Struct, frozen=True):
    """Whoever calls this engine here, a client of that `name`, a group, whose one generation is another sender than
    the next, or of a "payload" the process that made it. An update has payloads of several, and that process may not
    be seen from here."""

    road: Literal["here", "client", "group", "payload"]
    name: str = ""


HERE = Sender("here")


def why_another(
    sender: Sender, tensors: Iterable[TensorInfo], first: Sender, young_groups: Collection[str], known: Container[str]
) -> str:
    """Why a call is no part of an update that `first` had begun; "" where it may be. `young_groups` were joined since;
    tensors that are `known` have come."""
    if sender.road != first.road:
        return f"tensors come by another road ({sender.road}, not {first.road})"
    if sender.road == "group":
        is_young = sender.name in young_groups
        return f"weight group {sender.name!r} was joined after it had begun" if is_young else ""
    if sender.road != "payload":
        return "" if sender == first else "another client sends tensors"
    if sender != first and _is_seen(sender.name) and not _is_seen(first.name):
        return f"process {first.name}, which had begun it, has ended"
    return next((f"{info.name} comes again, as of another update" for info in tensors if info.name in known), "")


def _is_seen(process: str) -> bool:
    """A process of that number lives on this host."""
    return bool(process) and Path("/proc", process).exists()
