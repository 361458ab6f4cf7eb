"""Triton kernels run on the device where there is one, and in Triton's interpreter where there is none."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
