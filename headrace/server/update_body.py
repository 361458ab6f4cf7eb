"""What bodies that bring weights have in common. Owns how the dialect spells the terms of an update."""

from __future__ import annotations

import msgspec

from headrace.engine import DEFAULT_UPDATE_TIMEOUT
from headrace.types.errors import RequestError
from headrace.types.weights import InFlight, UpdateMode

UPDATE_FIELDS = {"timeout": "timeout_s", "version": "weight_version"}
"""What the dialect calls the terms of an update; for `FieldNames`."""


class UpdateBody(msgspec.Struct, kw_only=True):
    """`mode`, `in_flight` and `timeout_s` are ours."""

    weight_version: str | int | None = None
    abort_all_requests: bool = False
    mode: UpdateMode = "auto"
    in_flight: InFlight | None = None
    timeout_s: float = DEFAULT_UPDATE_TIMEOUT

    @property
    def policy(self) -> InFlight:
        """What becomes of requests in flight."""
        return self.in_flight or ("abort" if self.abort_all_requests else "drain")


def check_selector(selector: str | None) -> None:
    """Refuse what means a draft model."""
    if selector not in (None, "target", "all"):
        raise RequestError(f"selector {selector!r}: this engine has no draft model", field="selector")
