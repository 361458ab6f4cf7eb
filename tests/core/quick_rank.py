"""`headrace.core.rank_process` whose Triton kernels are interpreted as quickly as those of the tests."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    import triton.runtime.interpreter  # type: ignore[import-untyped]  # noqa: F401

    from headrace.core import rank_process
    from tests.quick_interpreter import quicken

    quicken()
    os._exit(rank_process.main(sys.argv[1:]))
