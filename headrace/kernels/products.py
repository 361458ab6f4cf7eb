"""How matrices are multiplied. Owns the one place where torch's setting for float32 products can have its way, or not.

Who has the process for itself calls torch (`Products`). Beside a trainer's threads, which may change that setting at
any moment, `DirectProducts` calls the same library on a CPU as torch does, and gets the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


class Products:
    """Shapes: x [T, I], weight [O, I], bias [O] or None."""

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b."""
        return F.linear(x_TI, weight_OI, bias_O)

    def linear_out(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> None:
        """out = x W^T."""
        torch.mm(x_TI, weight_OI.t(), out=out_TO)

    def linear_add_(self, target_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """target += x W^T, rounded once; then target += b."""
        target_TO.addmm_(x_TI, weight_OI.t())
        if bias_O is not None:
            target_TO.add_(bias_O)

    def compound(self, operation: Callable[..., Tensor], *operands: Tensor | str | None, **options: Any) -> Tensor:
        """The result of an operation of torch that makes products of its own."""
        return operation(*operands, **options)


PLAIN = Products()


class WideProducts(Products):
    """Compound operations on float32 are computed in float64, which no setting shortens."""

    def compound(self, operation: Callable[..., Tensor], *operands: Tensor | str | None, **options: Any) -> Tensor:
        found = operation(*(_wide(each) for each in operands), **options)
        return found.float() if found.dtype == torch.float64 else found


class DirectProducts(WideProducts):
    """Float32 products on a CPU by the function that torch calls for them in the end, whatever it is set to."""

    def __init__(self) -> None:
        """Raises `OSError` or `AttributeError` where that function cannot be had."""
        assert torch.__file__ is not None
        self._sgemm = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).sgemm_
        self._sgemm.restype = None

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        if x_TI.dtype != torch.float32:
            return super().linear(x_TI, weight_OI, bias_O)
        if bias_O is None:
            out_TO = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
            self._multiply(x_TI, weight_OI, out_TO, _ZERO)
        else:
            out_TO = bias_O.repeat(x_TI.shape[0], 1)
            self._multiply(x_TI, weight_OI, out_TO, _ONE)
        return out_TO

    def linear_out(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> None:
        if x_TI.dtype == torch.float32:
            self._multiply(x_TI, weight_OI, out_TO, _ZERO)
        else:
            super().linear_out(x_TI, weight_OI, out_TO)

    def linear_add_(self, target_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        if x_TI.dtype != torch.float32:
            super().linear_add_(target_TO, x_TI, weight_OI, bias_O)
            return
        self._multiply(x_TI, weight_OI, target_TO, _ONE)
        if bias_O is not None:
            target_TO.add_(bias_O)

    def _multiply(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor, beta: ctypes.c_float) -> None:
        """out = x W^T + beta * out. What is rows here are columns there."""
        if out_TO.shape[0] == 0:
            return
        assert out_TO.dtype == weight_OI.dtype == torch.float32 and out_TO.is_contiguous() and out_TO.is_cpu
        x_TI, weight_OI = x_TI.contiguous(), weight_OI.contiguous()
        size, address, ref = ctypes.c_int64, ctypes.c_void_p, ctypes.byref
        num_rows, num_inputs, num_outputs = size(x_TI.shape[0]), size(x_TI.shape[1]), size(weight_OI.shape[0])
        x, weight, out = address(x_TI.data_ptr()), address(weight_OI.data_ptr()), address(out_TO.data_ptr())
        sizes = ref(num_outputs), ref(num_rows), ref(num_inputs)
        self._sgemm(
            *(b"T", b"N", *sizes, ref(_ONE), weight, ref(num_inputs), x, ref(num_inputs)),
            *(ref(beta), out, ref(num_outputs)),
        )


def direct_products() -> DirectProducts | None:
    """None where they cannot be had, or are not bit for bit those of torch, which must be set to exact ones now."""
    try:
        direct = DirectProducts()
    except (OSError, AttributeError):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    for num_rows, num_inputs, num_outputs in ((1, 64, 48), (16, 130, 70), (37, 512, 96)):
        values = torch.randn(num_rows + num_outputs, num_inputs, generator=generator, dtype=torch.float32, device="cpu")
        x, weight = values[:num_rows], values[num_rows:]
        if not torch.equal(direct.linear(x, weight, weight[:, 0]), PLAIN.linear(x, weight, weight[:, 0])):
            return None
    return direct


def _wide(operand: Tensor | str | None) -> Tensor | str | None:
    return operand.double() if isinstance(operand, Tensor) and operand.dtype == torch.float32 else operand
