"""Tensor operations, each as a plain oracle, a fast CPU path, and a CPU path whose bits never depend on the batch."""

from headrace.kernels.kernel_set import KernelSet, select_kernels

__all__ = ["KernelSet", "select_kernels"]
