"""How long the way of a request is: the functions of the package that one `/generate` of one token runs, by HTTP, with
the core in the same process, on a CPU.

    python bench/count_calls.py           functions, calls, and the frames from a turn of the step loop to a kernel
    python bench/count_calls.py --list    each function too, by module, with the number of its calls

A call is a call as Python's profile function sees it: a generator or coroutine that goes on counts again, and so does a
comprehension. What the loops do in the 0.3 s from the request on is in it, such as the server's ticks. The package is
that of the script's own tree. Figures are in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PACKAGE = f"{ROOT / 'headrace'}/"
KERNELS = f"{PACKAGE}kernels/"
SECONDS = 0.3
BODY = json.dumps({"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}})


class CallCount:
    """A profile function for all threads: (module, function) -> calls, while it `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self.calls: collections.Counter[tuple[str, str]] = collections.Counter()
        self.deepest: list[str] = []
        """Frames from `CoreLoop.turn` to a kernel's first, the longest way."""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if self.is_on and event == "call" and code.co_filename.startswith(PACKAGE):
            self.calls[code.co_filename.removeprefix(PACKAGE), code.co_qualname] += 1
            if _is_kernel(frame) and not _is_kernel(frame.f_back):
                self.deepest = max(self.deepest, _frames_of_turn(frame), key=len)


def _is_kernel(frame: FrameType | None) -> bool:
    """`KernelSet` only chooses one."""
    return frame is not None and frame.f_code.co_filename.startswith(KERNELS) and "KernelSet" not in _name(frame)


def _name(frame: FrameType) -> str:
    return frame.f_code.co_qualname


def _frames_of_turn(frame: FrameType | None) -> list[str]:
    """The package's frames from the loop's turn to this one; none where no turn is behind it."""
    names: list[str] = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(_name(frame))
            if names[-1] == "CoreLoop.turn":
                return names[::-1]
        frame = frame.f_back
    return []


def generate(port: int) -> None:
    """One token, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/generate", BODY, {"content-type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    reply.read()
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name every function")
    is_listed = parser.parse_args().list
    counted = CallCount()
    threading.setprofile(counted)  # before any thread starts

    from headrace import Engine, serve
    from tests.parity.models import make_model, save_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = save_model(make_model("qwen3"), Path(scratch) / "model")
        settings = {"skip_tokenizer_init": True, "device": "cpu", "kv_pool_tokens": 1024}
        with Engine(folder, inprocess=True, **settings) as engine:
            port = serve(engine).port
            for _ in range(2):  # the first makes what is made once
                generate(port)
            counted.is_on = True
            generate(port)
            time.sleep(SECONDS)
            counted.is_on = False
    print(f"{len(counted.calls)} functions in {counted.calls.total()} calls")
    print(f"{len(counted.deepest)} frames from the loop to a kernel: {' > '.join(counted.deepest)}")
    for (module, name), number in sorted(counted.calls.items() if is_listed else ()):
        print(f"{number:5} {module} {name}")


if __name__ == "__main__":
    main()
