"""Float32 products stay float32 products while a step is computed, whatever this process has asked torch for.

A core in the caller's process shares torch's global settings with a trainer, who may allow shorter products (TF32,
bfloat16) at any moment and from any thread. Owns the one setting that changes what a step computes; it is as it was
when a step is over. Default dtype and device are of no matter: every tensor here is made with both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.products import PLAIN, Products, WideProducts, direct_products
from headrace.types.plan import StepDisturbed

_SHORT = ("tf32", "bf16")
_EXACT = "ieee"
_MAX_TRIES = 100


class ExactProducts:
    """A context around a step, its `guard`, which makes products exact from its beginning on.

    Without `has_float32` there are no such products, and the setting is left alone. In a process that is shared
    (`is_shared`) it may change at any moment. `products` are then such as do not ask for it; where there are none, on a
    device above all, `WatchedProducts`.
    """

    def __init__(self, device: torch.device, *, is_shared: bool = False, has_float32: bool = True) -> None:
        self._is_cuda = device.type == "cuda"
        backend: Any = (
            torch.backends.cuda if self._is_cuda else torch.backends.mkldnn
        )  # torch types only one of the two
        self._matmul = backend.matmul
        self._name = ""
        self._former = ""  # what `make_exact` found, until it is put back
        self._is_asked = has_float32  # whether any product asks for the setting
        self.products = self._shared_products() if is_shared and has_float32 else PLAIN
        self.guard: AbstractContextManager[None] = self if self._is_asked else nullcontext()
        """What a step is computed within: nothing where its products do not ask for the setting."""

    def _shared_products(self) -> Products:
        if not self._is_cuda:
            with self:
                direct = direct_products()
            if direct is not None:
                self._is_asked = False
                return direct
        return WatchedProducts(self, is_repeatable=not self._is_cuda)

    def __enter__(self) -> None:
        self.make_exact()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        former, self._former = self._former, ""
        if not former or self.is_short():
            return  # nothing was changed, or somebody has set it anew
        name = _name()
        if self._is_cuda and self._name:
            if name == "highest":
                torch.set_float32_matmul_precision(self._name)
        elif self._matmul.fp32_precision == _EXACT and (not self._name or name == self._name):
            self._matmul.fp32_precision = former

    def is_short(self) -> bool:
        """True if a product that began now would be shorter than float32. Takes some 0.3 us."""
        if self._is_cuda and _name() == "highest":
            return False  # says it all there, and is quick to ask
        return self._matmul.fp32_precision in _SHORT

    def make_exact(self) -> None:
        """From now on products are exact, until somebody sets it anew."""
        if not self.is_short():
            return
        self._name, self._former = _name(), self._matmul.fp32_precision
        if self._is_cuda and self._name:
            torch.set_float32_matmul_precision("highest")  # the two ways to ask must not contradict each other
        else:
            self._matmul.fp32_precision = _EXACT


class WatchedProducts(WideProducts):
    """Products beside threads that may change the setting, which is looked at before and behind each.

    One that it was changed in is computed again. One that adds in place is computed again from a copy, or, where copies
    would cost too much (not `is_repeatable`), costs its step. A change there and back within one product is not seen.
    """

    def __init__(self, exact: ExactProducts, *, is_repeatable: bool) -> None:
        self._exact = exact
        self._is_repeatable = is_repeatable

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        for _ in range(_MAX_TRIES):
            self._exact.make_exact()
            found = super().linear(x_TI, weight_OI, bias_O)
            if not self._exact.is_short():
                return found
        raise _disturbed()

    def linear_out(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> None:
        for _ in range(_MAX_TRIES):
            self._exact.make_exact()
            super().linear_out(x_TI, weight_OI, out_TO)
            if not self._exact.is_short():
                return
        raise _disturbed()

    def linear_add_(self, target_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        before = target_TO.clone() if self._is_repeatable else None
        for _ in range(_MAX_TRIES):
            self._exact.make_exact()
            super().linear_add_(target_TO, x_TI, weight_OI, bias_O)
            if not self._exact.is_short():
                return
            if before is None:
                break
            target_TO.copy_(before)
        raise _disturbed()


def _disturbed() -> StepDisturbed:
    return StepDisturbed("the precision of float32 products was changed while a step was computed")


def _name() -> str:
    """The setting's name for all devices; "" where they differ."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""
