"""The Dockerfile, read: no image is built here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headrace.cli.main import parse
from headrace.cli.serve import DEFAULT_PORT
from tests.arch.source import ROOT

LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
INSTRUCTIONS = [line.partition(" ")[::2] for line in LINES if line.strip() and not line.startswith("#")]
KNOWN = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def of(name: str) -> list[str]:
    return [rest.strip() for word, rest in INSTRUCTIONS if word == name]


def test_instructions_are_known_and_in_order() -> None:
    words = [word for word, _ in INSTRUCTIONS]
    assert set(words) == KNOWN
    assert words[:2] == ["ARG", "FROM"] and of("FROM") == ["${BASE}"], "the base is an argument"
    assert words.index("USER") > words.index("RUN"), "it does not run as root"
    arguments = {each.partition("=")[0] for each in of("ARG")}
    assert set(re.findall(r"\$\{(\w+)", " ".join(rest for _, rest in INSTRUCTIONS))) <= arguments


def test_what_it_copies_is_there_and_let_in() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in of("COPY") for word in line.split()[:-1]}
    assert copied == let_in and all((ROOT / name).exists() for name in copied)


def test_pip_leaves_no_cache_and_versions_have_bounds() -> None:
    (run,) = of("RUN")
    assert run.count("pip install") == run.count("--no-cache-dir") == 2
    torch = re.search(r'"(torch>=[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert torch is not None and torch[1] in run


def test_a_base_may_have_a_user_of_that_id() -> None:
    """As images of Ubuntu do. The folder of downloads is its own, for a volume takes its owner from there."""
    (run,) = of("RUN")
    steps = [shlex.split(step) for step in run.split("&&")]
    (user,) = (step for step in steps if step[0] == "useradd")
    assert "--non-unique" in user and user[-1] == of("USER")[0]
    mounted = [re.search(r"-v \w+:(\S+)", line) for line in LINES]
    assert {found[1] for found in mounted if found} == {f"/home/{user[-1]}/.cache"}
    assert ["install", "--directory", f"--owner={user[-1]}", f"/home/{user[-1]}/.cache"] in steps


def test_commands_are_ours() -> None:
    (entry,) = of("ENTRYPOINT")
    assert json.loads(entry) == ["headrace"]
    shown = [shlex.split(line.lstrip("# ")) for line in LINES if re.match(r"#.*docker run --rm", line)]
    served = [parse(words[words.index("serve") :]) for words in shown]
    assert len(served) == 2 and served[0].host == "0.0.0.0" and of("EXPOSE") == [str(DEFAULT_PORT)]


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_the_health_check_asks_the_server_whatever_proxy_is_set(status: int, exit_code: int) -> None:
    asked = []

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    (check,), (port,) = of("HEALTHCHECK"), of("EXPOSE")
    name, option, program = json.loads(check.partition("CMD ")[2])
    assert (name, option) == ("python", "-c") and program.count(port) == 1
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = program.replace(port, str(server.server_port))
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
        done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60)
        server.shutdown()
    assert (done.returncode, asked) == (exit_code, ["/health"])
