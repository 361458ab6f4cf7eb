"""Tensor operations, each as a plain oracle, a fast CPU path, and a CPU path whose bits never depend on the batch."""

from headrace.kernels.kernel_set import ExpertKernels, KernelSet, LayerKernels, PartialSum, select_kernels

__all__ = ["ExpertKernels", "KernelSet", "LayerKernels", "PartialSum", "select_kernels"]
