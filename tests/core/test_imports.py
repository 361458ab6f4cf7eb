"""Imports of a core's own process."""

from __future__ import annotations

import subprocess
import sys

from tests.arch.source import ROOT, child_environment

SCRIPT = """
import gc, inspect, sys
from headrace.core.imports import quick_imports

gc.collect()
walks = []
gc.callbacks.append(lambda phase, info: walks.append(phase))
find = inspect.findsource
with quick_imports():
    import torch
    told = inspect.getframeinfo(sys._getframe())
    assert told.lineno and told.code_context is None, "which is what takes long"
    assert inspect.getsource(inspect.isframe).startswith("def isframe"), "what is no frame has its source"
seen = len(walks)
assert inspect.findsource is find
assert gc.isenabled() and gc.get_freeze_count() > 100_000, "what was imported is walked by no later collection"
try:
    with quick_imports():
        raise ImportError
except ImportError:
    pass
assert gc.isenabled() and inspect.findsource is find
print(seen)
"""


def test_imports_are_never_walked_by_the_collector() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
