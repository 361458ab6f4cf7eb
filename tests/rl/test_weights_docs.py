"""What docs/weights.md shows works: its block runs, and its calls have the keys of their routes."""

from __future__ import annotations

import re

import pytest

from headrace.rl.demo import POLICY
from headrace.server.weight_groups import InitGroupBody
from tests.arch.source import ROOT

TEXT = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")


def test_three_steps(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(block.replace("Qwen/Qwen3-0.6B", str(POLICY)), "docs/weights.md", "exec"), {"__name__": "example"})
    assert re.fullmatch(r"step-2 \d+ \[\('step-2', 4\)\]\n", capsys.readouterr().out)


def test_the_calls_of_a_group() -> None:
    (calls,) = re.findall(r"^```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    paths = re.findall(r"POST (\S+)", calls)
    assert paths[::2] == ["/init_weights_update_group", "/destroy_weights_update_group"]
    assert paths[1:2] == ["/update_weights_from_distributed"]
    init = re.findall(r'"(\w+)":', calls.partition("POST /update")[0])
    assert set(init) <= {*InitGroupBody.__struct_fields__}
