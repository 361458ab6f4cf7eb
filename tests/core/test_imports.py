"""Imports of a core's own process."""

from __future__ import annotations

import subprocess
import sys

from tests.arch.source import ROOT, child_environment

SCRIPT = """
import gc
from headrace.core.imports import uncollected

gc.collect()
walks = []
gc.callbacks.append(lambda phase, info: walks.append(phase))
with uncollected():
    import torch
seen = len(walks)
assert gc.isenabled() and gc.get_freeze_count() > 100_000, "what was imported is walked by no later collection"
try:
    with uncollected():
        raise ImportError
except ImportError:
    pass
assert gc.isenabled()
print(seen)
"""


def test_imports_are_never_walked_by_the_collector() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
