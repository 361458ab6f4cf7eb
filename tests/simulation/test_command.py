"""`headrace simulate` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from headrace.cli.main import EXIT_REFUSED, main
from headrace.simulation.step_times import PROFILES

QUICK = [
    "--groups-per-replica",
    "2",
    "--group-size",
    "2",
    "--steps",
    "1",
    "--median-output-tokens",
    "64",
    "--grain",
    "16",
]


def test_one_object_on_the_last_line_and_a_picture_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sweep.svg"
    assert main(["simulate", "--replicas", "1,2,4", *QUICK, "--json", "--plot", str(picture)]) == 0
    found = capsys.readouterr()
    report = json.loads(found.out.splitlines()[-1])
    assert [run["num_replicas"] for run in report["runs"]] == [1, 2, 4]
    assert report["options"]["group_size"] == 2 and report["runs"][2]["num_requests"] == 16
    assert len(found.err.splitlines()) == 3 and "tokens/s" in found.err
    assert picture.read_text().lstrip().startswith("<?xml")


def test_a_line_for_each_run_and_a_picture_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--replicas", "2", *QUICK, "--plot", str(tmp_path / "run.png")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 replicas: ") and "one cache" in line
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "slow.json"
    slow = msgspec.structs.replace(PROFILES["qwen3-8b-h200"], fixed=1.0)
    path.write_bytes(msgspec.json.encode(slow))
    times = []
    for profile in ("qwen3-8b-h200", str(path)):
        assert main(["simulate", *QUICK, "--json", "--profile", profile]) == 0
        times.append(json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["seconds"])
    assert times[1] > 20 * times[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "qwen3-8b"], "qwen3-8b-h200"),
        (["--profile", "PATH"], "unknown field"),
        (["--replicas", "0"], "replicas must be in"),
        (["--fronts", "9"], "fronts"),
        (["--plot", "picture.bmpx"], "plot"),
    ],
)
def test_what_is_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.json"
    path.write_text('{"fixed": 1, "token": 1, "colour": 3}')
    words = [str(path) if word == "PATH" else word for word in words]
    assert main(["simulate", *QUICK, *words]) == EXIT_REFUSED
    assert said in capsys.readouterr().err
