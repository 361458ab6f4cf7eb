"""A trace of what this process computes, by torch's profiler. Owns nothing but the profiler that runs."""

from __future__ import annotations

import torch
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

from headrace.types.errors import RequestError, UnavailableError
from headrace.types.profile import ProfileTerms

_KINDS = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}


class Trace:
    """What the thread that made it computes from then on, and all that a device does."""

    def __init__(self, terms: ProfileTerms) -> None:
        """Raises `RequestError` for activities that there are none of, and `UnavailableError` if this process is traced
        already, by whoever."""
        there = ("CPU", "GPU") if torch.cuda.is_available() else ("CPU",)
        kinds = [_KINDS[name] for name in there if name in (terms.activities or there)]
        if not kinds:
            raise RequestError(f"activities: this engine has {', '.join(there)} only", field="activities")
        if profiler._is_profiler_enabled:  # a second one would end the first
            raise UnavailableError("torch's profiler is at work in this process already", field="profile")
        self._profile = profile(activities=kinds, with_stack=terms.with_stack, record_shapes=terms.record_shapes)
        self._profile.start()

    def stop(self) -> None:
        """Trace no more."""
        self._profile.stop()

    def write(self, path: str) -> None:
        """Write what was traced, in Chrome's format, compressed if the name ends so. Once it is stopped."""
        self._profile.export_chrome_trace(path)
