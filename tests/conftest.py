"""Shared by all tests: an offline, quiet environment, set before any library reads it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

if not torch.cuda.is_available():
    # Triton kernels then run in its interpreter. Read when triton is first imported, which other libraries do too.
    os.environ["TRITON_INTERPRET"] = "1"
