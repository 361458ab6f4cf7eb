"""What docs/simulation.md shows: commands parse and are what can be simulated, its profile is one, pictures exist."""

from __future__ import annotations

import json
import re
import shlex

import msgspec
import pytest

from headrace.cli.flags import given
from headrace.cli.main import main, parse
from headrace.simulation.front_model import FrontCosts
from headrace.simulation.options import SimulationOptions, check_replicas
from headrace.simulation.step_times import PROFILES, DeviceProfile
from tests.arch.source import ROOT

TEXT = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_commands_are_what_can_be_simulated() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        arguments = parse(shlex.split(line)[1:])
        options = SimulationOptions.from_dict(given(arguments, SimulationOptions))
        for number in arguments.replicas:
            check_replicas(number, options)


def test_the_first_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(blocks("sh")[0].splitlines()[0])[1:]
    assert main([*words, "--steps", "1", "--grain", "64"]) == 0
    assert capsys.readouterr().out.startswith("8 replicas: ")


def test_the_profile_is_that_of_8b() -> None:
    (block,) = blocks("json")
    shown = msgspec.convert(json.loads(block), DeviceProfile)
    named = PROFILES["qwen3-8b-h200"]
    for name in DeviceProfile.__struct_fields__:
        assert getattr(shown, name) == pytest.approx(getattr(named, name), rel=0.02), name


def test_pictures_are_there_and_costs_are_those_of_the_model() -> None:
    names = re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", TEXT)
    assert len(names) == 2 and all((ROOT / "docs" / name).stat().st_size < 150_000 for name in names)
    costs = FrontCosts()
    assert f"{1e6 * costs.request:.0f} µs for a request, {1e6 * costs.compare:.1f} µs more" in TEXT
    assert f"({1e6 * costs.offer:.2f} µs" in TEXT and f"{1e6 * costs.look:.0f} µs a second" in TEXT
