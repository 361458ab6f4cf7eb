"""Float32 products stay float32 products while a step is computed, whatever this process has asked torch for.

A core in the caller's process shares torch's global settings with a trainer, who may allow shorter products (TF32,
bfloat16) at any moment and from any thread. Owns the one setting that changes what a step computes; it is as it was
when a step is over. Default dtype and device are of no matter: every tensor here is made with both.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from headrace.types.plan import StepDisturbed

_SHORT = ("tf32", "bf16")
_EXACT = "ieee"


class ExactProducts:
    """A context around a step. Raises `StepDisturbed` at its end if the setting was changed meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        backend: Any = (
            torch.backends.cuda if self._is_cuda else torch.backends.mkldnn
        )  # torch types only one of the two
        self._matmul = backend.matmul
        self._name = ""
        self._precision = _EXACT

    def __enter__(self) -> None:
        self._name = name = _name()
        if self._is_cuda and name == "highest":
            return  # says it all there, and is quick to ask
        self._precision = self._matmul.fp32_precision
        if self._precision not in _SHORT:
            return
        if self._is_cuda and name:
            torch.set_float32_matmul_precision("highest")  # the two ways to ask must not contradict each other
        else:
            self._matmul.fp32_precision = _EXACT

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        name = _name()
        if self._is_cuda and name == self._name == "highest":
            return
        former, self._precision = self._precision, _EXACT
        if self._matmul.fp32_precision in _SHORT:
            if kind is None:
                raise StepDisturbed("the precision of float32 products was changed while a step was computed")
        elif former in _SHORT and self._is_cuda and self._name:
            torch.set_float32_matmul_precision(self._name)
        elif former in _SHORT and (not self._name or name == self._name):  # else somebody has set it anew
            self._matmul.fp32_precision = former


def _name() -> str:
    """The setting's name for all devices; "" where they differ."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""
