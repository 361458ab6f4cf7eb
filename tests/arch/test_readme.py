"""What the README shows works: every Python block runs, every command parses, every curl line gets its answer.

The blocks run as they stand, but for the model's name and the server's port.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from headrace.cli.main import parse
from tests.arch.readme import README, blocks, commands
from tests.arch.source import ROOT, child_environment

POLICY = ROOT / "headrace" / "rl" / "policy"
MODEL = "Qwen/Qwen3-0.6B"
ADDRESS = "http://127.0.0.1:30000"
START_SECONDS = 120


@pytest.fixture(scope="module")
def address(warm: None) -> Iterator[str]:
    """The README's server, started by its command, on a free port. It must drain and end well on SIGTERM."""
    (command,) = [words for words in commands() if words[:3] == ["headrace", "serve", MODEL]]
    words = [str(POLICY) if word == MODEL else "0" if word == "30000" else word for word in command[1:]]
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", *words, "--num-threads", "1", "--kv-pool-tokens", "8192"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=child_environment(),
    )
    assert process.stderr is not None
    try:
        lines = []
        while (found := re.search(r"url=(http://\S+)", line := process.stderr.readline())) is None:
            lines.append(line)
            assert line, f"the server ended: {lines}"
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _run(block: str, address: str) -> str:
    text = block.replace(MODEL, str(POLICY)).replace(ADDRESS, address)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(text, str(README), "exec"), {"__name__": "readme"})
    return out.getvalue()


@pytest.mark.parametrize("block", [pytest.param(b, id=str(i)) for i, b in enumerate(blocks("python"))])
def test_python_blocks_run(block: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(block, address)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_headrace_commands_parse() -> None:
    lines = [words[1:] for words in commands() if words[0] == "headrace"]
    assert {words[0] for words in lines} == {"serve", "generate", "check", "demo", "bench"}
    for words in lines:
        assert parse(words).command == words[0]


def test_curl_lines_are_answered(address: str) -> None:
    lines = [words for words in commands() if words[0] == "curl"]
    assert len(lines) >= 4
    for words in lines:
        url = words[1].replace(ADDRESS, address)
        assert url != words[1]
        data = words[words.index("-d") + 1] if "-d" in words else None
        answer = httpx.get(url) if data is None else httpx.post(url, json=json.loads(data))
        assert answer.status_code == 200, (url, answer.text)


def test_no_other_kind_of_command_is_shown() -> None:
    assert {words[0] for words in commands()} == {"make", "headrace", "curl", "pip"}


DOCUMENTS = [
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert all((path.parent / link).exists() for link in links), links
