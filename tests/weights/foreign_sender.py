"""Another process with torch, whose tensors are sent from there."""

from __future__ import annotations

import base64
import subprocess
import sys
from typing import IO

from headrace.types.foreign import Payload
from headrace.weights.foreign import read_payload
from tests.arch.source import ROOT

SENDER = """
import base64, sys
import torch
from tests.weights.foreign_payloads import flattened, local, serialized

base = torch.arange(24, dtype=torch.float32, device=sys.argv[1]).reshape(4, 6)
half = base.to(torch.bfloat16)
kept = {"base": base, "half": half}
for line in sys.stdin:
    answer = eval(line)
    print(base64.b64encode(answer).decode() if isinstance(answer, bytes) else answer, flush=True)
"""


class Sender:
    """That process: `base` is 4 x 6 float32 from 0 to 23, `half` the same in bfloat16, `kept` holds what is to stay."""

    def __init__(self, device: str = "cpu") -> None:
        command = [sys.executable, "-c", SENDER, device]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, expression: str) -> str:
        """The value of a Python expression there."""
        _stream(self._process.stdin).write(expression + "\n")
        _stream(self._process.stdin).flush()
        return _stream(self._process.stdout).readline().strip()

    def send(self, expression: str) -> Payload:
        """The payload that it makes."""
        return read_payload(base64.b64decode(self.ask(expression)))

    def end(self) -> None:
        """Wait until it has ended."""
        _stream(self._process.stdin).close()
        self._process.wait(30)
        _stream(self._process.stdout).close()


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
