"""The wheelhouse from end to end without a network: an index of handmade wheels, and folders to install into.

`check_wheelhouse.py` beside this file does it with the configured package index (`make wheelhouse-check`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arch.source import ROOT
from tests.tools.projects import make_project, make_wheel
from tools.closure import Host, WheelhouseError
from tools.wheelhouse import (
    MANIFEST,
    check_folder,
    check_host,
    main,
    offline_environment,
    read_have,
    read_manifest,
    read_pins,
)

HERE = Host.here()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds wheels."""
    folder = tmp_path / "index"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    make_wheel(folder, "sluice", "1.0", ["gate>=1"])
    make_wheel(folder, "sluice", "2.0", ["gate>=1"])
    make_wheel(folder, "gate", "1.0", tag=f"cp312-cp312-manylinux_2_34_{HERE.machine}")
    make_wheel(folder, "gate", "1.0", tag=f"cp{HERE.python.replace('.', '')}-none-linux_{HERE.machine}")
    make_wheel(folder, "pump", "1.0")
    return folder


def download(tmp_path: Path, requires: list[str], *words: str) -> Path:
    """Fill a folder for a project with these requirements; `sluice` is pinned to 1.0."""
    project = make_project(tmp_path / "project", requires, ROOT)
    pins = tmp_path / "pins.txt"
    pins.write_text("sluice==1.0  # old\n\n# nothing\n", encoding="utf-8")
    folder = tmp_path / "wheels"
    command = ["download", str(folder), "--project", str(project), "--constraints", str(pins), *words]
    assert main(command) == 0
    return folder


def names(folder: Path) -> set[str]:
    return {path.name.rsplit("-", 3)[0] for path in folder.glob("*.whl")}


def test_from_a_project_to_a_folder_to_an_import(
    tmp_path: Path, index: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(
        tmp_path, ["sluice", "packaging", 'pump; extra == "fast"'], "--extras", "fast", "--have", "packaging==26.0"
    )
    assert names(folder) == {"mill-1.0", "sluice-1.0", "gate-1.0", "pump-1.0"}
    assert "the host keeps: packaging 26.0" in capfd.readouterr().out
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    target = tmp_path / "site"
    assert main(["install", str(folder), "--target", str(target)]) == 0
    assert f"PYTHONPATH={target}" in capfd.readouterr().out
    script = "import mill, sluice, gate, pump; print(sluice.VERSION)"
    found = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(target)}, capture_output=True, check=True
    )
    assert found.stdout == b"1.0\n"


def test_wheels_are_for_the_host_and_not_for_this_machine(tmp_path: Path, index: Path) -> None:
    make_wheel(index, "packaging", "26.0")
    have = tmp_path / "have.txt"
    have.write_text(f"# python 3.12\n# machine {HERE.machine}\n# glibc 2.35\nsluice==2.0\n", encoding="utf-8")
    folder = download(tmp_path, ["sluice", "gate"], "--have", str(have))
    assert names(folder) == {"mill-1.0", "packaging-26.0", "gate-1.0"}
    (gate,) = folder.glob("gate-*")
    assert "cp312" in gate.name
    manifest = read_manifest(folder)
    assert manifest["host"] == {"python": "3.12", "machine": HERE.machine, "glibc": "2.35"}
    assert manifest["keep"] == {"sluice": ""}


def test_an_index_that_lacks_something_and_an_unknown_extra_are_refused(
    tmp_path: Path, index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path / "project", ["gate>=9"], ROOT)
    command = ["download", str(tmp_path / "wheels"), "--project", str(project), "--have", "packaging==26.0"]
    assert main(command) == 2
    assert "gate" in capfd.readouterr().err
    assert main([*command, "--extras", "fast,slow"]) == 2
    assert "no extra slow; there are fast" in capfd.readouterr().err


def test_a_host_that_is_another_is_refused_before_anything_is_installed(
    tmp_path: Path, index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = download(tmp_path, ["pump"], "--have", "packaging==26.0", "headgate==1")
    manifest = read_manifest(folder)
    check_host(manifest)
    other = {**manifest, "host": {**manifest["host"], "python": "3.9"}}
    with pytest.raises(WheelhouseError, match=r"made for Python 3\.9 on"):
        check_host(other)
    with pytest.raises(WheelhouseError, match=r"neither on this host nor in the folder: headgate>=1"):
        check_host({**manifest, "keep": {"headgate": ">=1", "packaging": ""}})
    pump = next(folder.glob("pump-*"))
    pump.write_bytes(pump.read_bytes() + b"x")
    with pytest.raises(WheelhouseError, match="damaged: pump"):
        check_folder(folder, manifest)
    pump.unlink()
    assert main(["install", str(folder), "--target", str(tmp_path / "site")]) == 2
    assert "lacks pump-1.0-py3-none-any.whl; nothing was installed" in capfd.readouterr().err
    assert not (tmp_path / "site").exists()
    assert main(["install", str(tmp_path), "--target", str(tmp_path / "site")]) == 2
    assert "is not a wheelhouse" in capfd.readouterr().err


def test_verify_tells_what_is_missing_and_what_is_too_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {
        "roots": ["packaging>=9999", "msgspec", "no-such-package; python_version > '3'"],
        "wheels": {},
        "omit": [],
        "keep": {},
    }
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["verify", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("packaging is ") and lines[0].endswith("you asked for packaging>=9999")
    assert lines[1].startswith("no-such-package is missing; you asked for no-such-package")
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "roots": ["openai", "packaging"]}), encoding="utf-8")
    assert main(["verify", str(tmp_path)]) == 0


def test_list_is_what_have_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    (tmp_path / "have.txt").write_text(capsys.readouterr().out, encoding="utf-8")
    have, facts = read_have([str(tmp_path / "have.txt"), "Some_Package==1.0+cu130"])
    assert facts == {"python": HERE.python, "machine": platform.machine(), "glibc": HERE.glibc}
    assert {"torch", "msgspec", "packaging"} <= set(have)
    assert have["some-package"] == "1.0+cu130"


@pytest.mark.parametrize("value", ["torch", "/no/such/file"])
def test_a_have_that_says_nothing_is_refused(value: str) -> None:
    with pytest.raises(WheelhouseError, match="neither NAME==VERSION nor a file"):
        read_have([value])


def test_the_repositorys_own_pins_are_read() -> None:
    pins = read_pins(ROOT / "constraints.txt")
    assert {"torch", "msgspec", "pydantic-core", "flashinfer-python"} <= set(pins)


def test_no_setting_of_pips_reaches_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    environment = offline_environment()
    assert {name for name in environment if name.startswith("PIP_")} == {"PIP_CONFIG_FILE"}
    assert environment["PIP_CONFIG_FILE"] == "/dev/null"
