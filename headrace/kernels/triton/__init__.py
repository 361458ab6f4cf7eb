"""Kernels for CUDA devices, held against `tests.kernels.oracles`. Nothing here is imported before one is chosen.

Every operation writes into tensors it is given and neither allocates nor waits for the device, so that a step of them
can be captured as one graph. Counts that change from step to step are read on the device from int32 arrays.
`work_items` needs neither triton nor torch.
"""
