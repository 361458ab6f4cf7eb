"""The recorder of bits: an engine differs nowhere from itself, another computation does, and so does a lost value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.record_bits import FACTORS, all_cases, checkpoint, covering_rows, differences, environment, main

CASE = "engine/qwen2-gqa-tied/invariant-float32-page_size=16"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    name = next(case.name for case in all_cases() if case.name.startswith(CASE))
    return [str(tmp_path / "bits.json"), "--only", f"^{name}$", "--checkpoints", str(tmp_path / "models")]


def test_only_what_computes_otherwise_differs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["record", *words]) == 0
    assert main(["compare", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 differences in ")
    config = checkpoint("qwen2-gqa-tied", tmp_path / "models") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 2e-6}))
    assert main(["compare", *words]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(".logprobs[" in line for line in lines) and int(lines[-1].split()[0]) == len(lines) - 1


def test_a_case_younger_than_the_record_is_named_and_a_lost_one_is_a_difference(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"environment": environment(), "cases": {"gone": {"ids": [1]}}}
    (tmp_path / "bits.json").write_text(json.dumps(record))
    assert main(["compare", words[0], "--only", "experts|gone"]) == 1
    captured = capsys.readouterr()
    assert len([line for line in captured.err.splitlines() if line.startswith("not in the record: engine/")]) == 12
    assert captured.out.splitlines() == ["cases gone ids[0]: 1 -> nothing", "1 differences in 4 values of 0 cases"]


def test_one_bit_or_one_value_more_is_a_difference() -> None:
    before = {"case": {"logprobs": [(-0.5).hex(), None], "ids": [3]}}
    after = {"case": {"logprobs": ["-0x1.0000000000001p-1", None], "ids": [3, 4]}}
    assert differences(before, before) == []
    assert [line.split(":")[0] for line in differences(before, after)] == ["case logprobs[0]", "case ids[1]"]


def test_any_three_values_of_three_settings_occur_together() -> None:
    rows = covering_rows()
    for name, values in FACTORS.items():
        assert {row[name] for row in rows} == set(values)
    for model in FACTORS["model"]:
        kinds = {(row["kernels"], row["dtype"]) for row in rows if row["model"] == model}
        assert len(kinds) == len(FACTORS["kernels"]) * len(FACTORS["dtype"])
