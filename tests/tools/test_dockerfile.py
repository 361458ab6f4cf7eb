"""The Dockerfile, read: no image is built here."""

from __future__ import annotations

import json
import re
import shlex

from headrace.cli.main import parse
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


def test_commands_are_ours() -> None:
    (entry,), (check,) = of("ENTRYPOINT"), of("HEALTHCHECK")
    assert json.loads(entry) == ["headrace"]
    program = json.loads(check.partition("CMD ")[2])
    compile(program[2], "Dockerfile", "exec")
    shown = [line for line in LINES if "docker run" in line]
    for line in shown:
        words = shlex.split(line.lstrip("# "))
        assert parse(words[words.index("serve") :]).command == "serve"
    assert len(shown) == 2 and str(parse(["serve", "m"]).run)
