"""Ctrl-C and SIGTERM at any moment of a start end the process at once, with no traceback and no core left; standard
streams that the caller closed change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.arch.source import ROOT, child_environment
from tests.processes import children_of

POLICY = ROOT / "headrace" / "rl" / "policy"
ENVIRONMENT = child_environment()
SMALL = ["--num-threads", "1", "--kv-pool-tokens", "4096"]
COMMANDS = {
    "generate": ["-m", "headrace", "generate", str(POLICY), "1+1=", *SMALL],
    "serve": ["-m", "headrace", "serve", str(POLICY), "--port", "0", *SMALL],
    "script": ["-c", f"from headrace import Engine\nEngine({str(POLICY)!r}, num_threads=1)"],
    "async script": [
        "-c",
        "import asyncio\nfrom headrace import AsyncEngine\nasync def main():\n"
        f"    async with AsyncEngine({str(POLICY)!r}, num_threads=1): pass\nasyncio.run(main())",
    ],
}
AT_ONCE = 5.0
"""Seconds; a start takes longer than that only where it hangs: the core it would wait for is stopped."""


def launch(words: list[str]) -> subprocess.Popen[str]:
    """The interpreter, hearing signals also where whoever runs the tests ignores them, as nohup does."""
    hearing = ["env", "--default-signal=INT,HUP,TERM", sys.executable]
    return subprocess.Popen(
        [*hearing, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )


def core_of(parent: int) -> int:
    """The process id of the core, once there is one; stopped, so that it never gets ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for core in children_of(parent, word="headrace.core.process"):
            os.kill(core, signal.SIGSTOP)
            return core
        time.sleep(0.01)
    raise AssertionError("no core was started")


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + AT_ONCE
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_while_the_core_starts_ends_at_once(command: str) -> None:
    with launch(COMMANDS[command]) as process:
        core = core_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=AT_ONCE)
    assert is_gone(core)
    if "script" in command:  # an interrupt that a script does not catch
        # 1: Python forgets that it ends by an interrupt if a thread calls `exec` meanwhile, as imports in a start do.
        assert process.returncode in (-signal.SIGINT, 130, 1), errors
        assert errors.rstrip().endswith("KeyboardInterrupt")
    else:
        assert process.returncode == 130 and "Traceback" not in errors
        assert errors.splitlines()[-1] == f"headrace {command}: interrupted"


def test_a_termination_while_the_core_starts_leaves_none() -> None:
    with launch(COMMANDS["serve"]) as process:
        core = core_of(process.pid)
        os.kill(core, signal.SIGCONT)  # it watches its parent itself
        process.terminate()
        process.communicate(timeout=AT_ONCE)
    assert process.returncode != 0 and is_gone(core)


TERMINATED = """
import os, signal, sys
from headrace.cli import simulate

def run(arguments):
    try:
        os.kill(os.getpid(), {number})
        signal.sigtimedwait([], 5)
    finally:
        print("tidied up")

simulate.run = run
sys.argv = ["headrace", "simulate"]
from headrace.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_termination_takes_the_road_of_an_interrupt(number: signal.Signals) -> None:
    """So that what a command started ends, and temporary folders go."""
    with launch(["-c", TERMINATED.format(number=int(number))]) as process:
        output, errors = process.communicate(timeout=60)
    said = "tidied up\n", "headrace simulate: terminated\n"
    assert (process.returncode, output, errors) == (128 + number, *said)


INTERRUPTED_IMPORT = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Interrupter(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
sys.argv = ["headrace", {command!r}, {folder!r}]
from headrace.__main__ import main
sys.exit(main())
"""


IMPORTS = [
    *(("generate", module) for module in ("logging", "headrace.ipc", "headrace.cli", "numpy", "headrace.bench")),
    *(("check", module) for module in ("torch", "torch.utils", "tokenizers")),
    ("bench", "torch._C"),
]


@pytest.mark.parametrize(("command", "module"), IMPORTS)
def test_an_interrupt_while_modules_are_imported_leaves_no_traceback(command: str, module: str) -> None:
    """Nor is it swallowed, nor does it abort the process in the middle of a library's own start."""
    folder = "offline" if command == "bench" else str(POLICY)
    with launch(["-c", INTERRUPTED_IMPORT.format(module=module, command=command, folder=folder)]) as process:
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "headrace: interrupted\n")


def test_an_interrupt_that_was_ignored_at_the_start_stays_so() -> None:
    code = INTERRUPTED_IMPORT.format(module="numpy", command="simulate", folder="--json")
    with launch(["-c", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + code]) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_the_command_line_starts_whatever_stream_is_closed(closed: str, tmp_path: Path) -> None:
    line = f'exec "$0" "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable, *COMMANDS["generate"], "--json"],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "1>&-" not in closed:
        assert json.loads(done.stdout)["finish_reason"]


SCRIPT = f"""
import os, sys
import torch
from headrace import Engine
children = []
for inprocess in (False, True):
    children.append(os.fork())  # as one that begins here: no descriptor was opened for either yet
    if children[-1] == 0:
        with Engine({str(POLICY)!r}, num_threads=1, inprocess=inprocess) as engine:
            found = engine.generate("1+1=", sampling_params={{"max_new_tokens": 3, "ignore_eos": True}})
            weights = engine.get_weights_by_name("model.norm.weight")
            os.write(2, b"printed by some library")  # it must not land in a buffer or a link of ours
            engine.update_weights_from_tensor([("model.norm.weight", weights)], "x", partial=True)
            open(sys.argv[1] + str(inprocess), "w").write(str(len(found[0].token_ids)))
        sys.exit()
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_an_engine_starts_in_a_script_whose_streams_are_closed(tmp_path: Path) -> None:
    line = 'exec "$0" "$@" 0<&- 1>&- 2>&-'
    command = ["sh", "-c", line, sys.executable, "-c", SCRIPT, str(tmp_path / "inprocess is ")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, timeout=120)
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert (done.returncode, found) == (0, {"inprocess is False": "3", "inprocess is True": "3"})
