"""The products of a decoder layer on a CUDA device, with what is fused into them. As `headrace.kernels.LayerKernels`.

`FastKernels`: a library's products with norms and gates between them in kernels of their own, and for few rows ours,
whose launches overlap: `multiply_row` for one row, `multiply_fused` where `choose_product` has a tile for it.
`InvariantKernels`: every product through `multiply_tiles`, so a row's bits never depend on its batch. Both allocate
their outputs, which a captured graph keeps in its own pool.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.kernels import LayerKernels
from headrace.kernels.products import PLAIN, Products
from headrace.kernels.triton.fused_products import ProductTile, ProductWorkspace, multiply_fused
from headrace.kernels.triton.linear_rows import RowTile, multiply_row
from headrace.kernels.triton.ordered_products import multiply_tiles
from headrace.kernels.triton.product_choice import ProductKind, choose_product
from headrace.kernels.triton.row_operations import rms_norm, silu_and_mul

ProductChoice = Callable[[ProductKind, int, int, int, torch.dtype], ProductTile | RowTile | None]


def device_kernels(numerics: str, device: torch.device, products: Products = PLAIN) -> LayerKernels:
    """The set for "fast" or "invariant"."""
    pdl = device.type == "cuda"
    if numerics == "invariant":
        return InvariantKernels(pdl=pdl)
    return FastKernels(device, pdl=pdl, products=products)


def _normed(x_TI: Tensor, norm_I: Tensor | None, eps: float, *, pdl: bool = False) -> Tensor:
    if norm_I is None:
        return x_TI
    out = torch.empty_like(x_TI)
    rms_norm(x_TI, norm_I, eps, out, pdl=pdl)
    return out


def _gated(x_T2F: Tensor, *, pdl: bool = False) -> Tensor:
    out = x_T2F.new_empty(x_T2F.shape[0], x_T2F.shape[1] // 2)
    silu_and_mul(x_T2F, out, pdl=pdl)
    return out


class FastKernels:
    """A library's products, and ours where they are faster.

    pdl      our launches may begin before the one ahead ends (programmatic dependent launch)
    choose   as `product_choice.choose_product`
    products the library's
    """

    experts = None

    def __init__(
        self, device: torch.device, *, pdl: bool, choose: ProductChoice = choose_product, products: Products = PLAIN
    ) -> None:
        self._products = products
        self._pdl = pdl
        self._choose = choose
        self._workspace = ProductWorkspace(device)

    def normed_linear(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        (num_rows, num_inputs), num_outputs, pdl = x_TI.shape, weight_OI.shape[0], self._pdl
        tile = self._choose("plain", num_rows, num_outputs, num_inputs, x_TI.dtype)
        if isinstance(tile, RowTile):
            out = x_TI.new_empty(num_rows, num_outputs)
            multiply_row(x_TI, weight_OI, out, norm_K=norm_I, eps=eps, bias_N=bias_O, pdl=pdl, tile=tile)
            return out
        return self._multiply(_normed(x_TI, norm_I, eps, pdl=pdl), weight_OI, bias_O, tile)

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        (num_rows, num_inputs), num_outputs = x_TI.shape, weight_OI.shape[0]
        tile = self._choose("plain", num_rows, num_outputs, num_inputs, x_TI.dtype)
        return self._multiply(x_TI, weight_OI, bias_O, tile)

    def _multiply(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tile: ProductTile | RowTile | None
    ) -> Tensor:
        if tile is None:
            return self._products.linear(x_TI, weight_OI, bias_O)
        out = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
        if isinstance(tile, RowTile):
            multiply_row(x_TI, weight_OI, out, bias_N=bias_O, pdl=self._pdl, tile=tile)
        else:
            multiply_fused(x_TI, weight_OI, bias_O, out, tile, self._workspace, pdl=self._pdl)
        return out

    def normed_gate(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        (num_rows, num_inputs), num_outputs, pdl = x_TI.shape, weight_OI.shape[0] // 2, self._pdl
        tile = self._choose("gate", num_rows, num_outputs, num_inputs, x_TI.dtype) if bias_O is None else None
        if isinstance(tile, RowTile):
            out = x_TI.new_empty(num_rows, num_outputs)
            multiply_row(x_TI, weight_OI, out, norm_K=norm_I, eps=eps, gated=True, pdl=pdl, tile=tile)
            return out
        normed = _normed(x_TI, norm_I, eps, pdl=pdl)
        if tile is None:
            return _gated(self._products.linear(normed, weight_OI, bias_O), pdl=pdl)
        out = x_TI.new_empty(num_rows, num_outputs)
        multiply_fused(normed, weight_OI, None, out, tile, self._workspace, gated=True, pdl=pdl)
        return out

    def linear_add_(self, residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        (num_rows, num_inputs), num_outputs, pdl = x_TI.shape, weight_OI.shape[0], self._pdl
        tile = self._choose("add", num_rows, num_outputs, num_inputs, x_TI.dtype)
        if isinstance(tile, RowTile):
            multiply_row(x_TI, weight_OI, residual_TO, bias_N=bias_O, adds=True, pdl=pdl, tile=tile)
        elif tile is not None:
            multiply_fused(x_TI, weight_OI, bias_O, residual_TO, tile, self._workspace, adds=True, pdl=pdl)
        else:
            self._products.linear_add_(residual_TO, x_TI, weight_OI, bias_O)

    def normed_logits(self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_VI: Tensor) -> Tensor:
        if x_TI.shape[0] == 1:
            out = x_TI.new_empty(1, weight_VI.shape[0], dtype=torch.float32)
            multiply_row(x_TI, weight_VI, out, norm_K=norm_I, eps=eps, pdl=self._pdl)
            return out
        normed = _normed(x_TI, norm_I, eps, pdl=self._pdl)
        if normed.is_cuda and normed.dtype != torch.float32:
            return torch.mm(normed, weight_VI.t(), out_dtype=torch.float32)  # sums as they are, not rounded
        return self._products.linear(normed, weight_VI, None).float()


class InvariantKernels:
    """Every product in the same steps along its inputs, whatever the number of rows. `pdl` as in `FastKernels`."""

    experts = None

    def __init__(self, *, pdl: bool) -> None:
        self._pdl = pdl

    def normed_linear(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        return self.linear(_normed(x_TI, norm_I, eps, pdl=self._pdl), weight_OI, bias_O)

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        out = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
        multiply_tiles(x_TI, weight_OI, bias_O, out, pdl=self._pdl)
        return out

    def normed_gate(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        return _gated(self.normed_linear(x_TI, norm_I, eps, weight_OI, bias_O), pdl=self._pdl)

    def linear_add_(self, residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        multiply_tiles(x_TI, weight_OI, bias_O, residual_TO, adds=True, pdl=self._pdl)

    def normed_logits(self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_VI: Tensor) -> Tensor:
        out = x_TI.new_empty(x_TI.shape[0], weight_VI.shape[0], dtype=torch.float32)
        normed = _normed(x_TI, norm_I, eps, pdl=self._pdl)
        multiply_tiles(normed, weight_VI, None, out, pdl=self._pdl)
        return out
