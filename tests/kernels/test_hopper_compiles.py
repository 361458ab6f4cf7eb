"""The kernel of prompts on Hopper is built for it where there is none: its source suits the Triton that is installed.

In a process of its own, without the interpreter that other tests of kernels run in.
"""

from __future__ import annotations

import os
import subprocess
import sys

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from headrace.kernels.triton.hopper_prefill import hopper_prefill_kernel as kernel

pages = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
constants = dict(
    NUM_KV=2, GQA=7, HEAD_DIM=64, PAGE=64, BLOCK_N=64, STAGES=2, GROUPS=2, PDL=True, WIDE=232, NARROW=40
)
types = dict(
    q_ptr="*bf16", key_pages=pages, value_pages=pages, table_ptr="*i32", metadata_ptr="*i32", partial_ptr="*fp32",
    lse_ptr="*fp32", out_ptr="*bf16", scale_log2="fp32",
)
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
source = GluonASTSource(kernel, signature, constexprs=constants)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168})
print(built.metadata.num_warps, built.metadata.shared)
print(built.asm["ptx"])
"""


def test_it_is_built_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sizes, ptx = done.stdout.split("\n", 1)
    num_warps, shared = map(int, sizes.split())
    assert num_warps == 12 and shared <= 232448, "two groups and the warps that fetch, on one multiprocessor"
    for name in ("wgmma.mma_async", "cp.async.bulk.tensor.2d", "setmaxnreg", "griddepcontrol.wait"):
        assert name in ptx
