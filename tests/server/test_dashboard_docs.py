"""What docs/dashboard.md shows works: its block runs, its command parses, and its call is answered."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from headrace.cli.main import parse
from headrace.rl.demo import POLICY
from tests.arch.source import ROOT
from tests.server.conftest import Served

TEXT = (ROOT / "docs" / "dashboard.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


def test_rewards_are_given_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python").replace("Qwen/Qwen3-0.6B", str(POLICY))
    exec(compile(code, "docs/dashboard.md", "exec"), {"__name__": "example"})
    url, answer = capsys.readouterr().out.splitlines()
    assert url.endswith("/dashboard") and answer == "4 of 4"


def test_rewards_are_given_over_http(served: Served) -> None:
    serving, call = block("sh").splitlines()
    assert parse(shlex.split(serving.removesuffix("&"))[1:]).command == "serve"
    _, address, flag, body, _, header = shlex.split(call)
    served.generate(text="x", rid="step-1", sampling_params={"n": 2, "max_new_tokens": 1})
    headers = dict([header.split(": ")])
    reply = served.http.post(address.partition("30000")[2], content=body, headers=headers)
    assert (flag, reply.status_code, reply.json()) == ("-d", 200, {"num_known": 2})
    assert json.loads(body)["rewards"].keys() == {"step-1_0", "step-1_1"}


def test_the_picture_is_there() -> None:
    (name,) = re.findall(r"!\[[^]]*\]\((\S+)\)", TEXT)
    assert (ROOT / "docs" / name).read_bytes().startswith(b"\x89PNG")
