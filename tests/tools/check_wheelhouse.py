"""Downloads a small closure from the configured package index and installs it into a new environment without one.

Not collected by `make test`, which needs no network: run by `make wheelhouse-check`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arch.source import ROOT
from tests.tools.projects import make_project
from tools.wheelhouse import main, read_manifest


def test_a_closure_from_the_index_works_in_a_new_environment(tmp_path: Path) -> None:
    """openai and msgspec bring compiled wheels, and a dozen others behind them."""
    project = make_project(tmp_path / "project", ["openai>=2.0", "starlette", "uvicorn", "msgspec"], ROOT)
    folder = tmp_path / "wheels"
    assert main(["download", str(folder), "--project", str(project)]) == 0
    assert {"starlette", "pydantic_core", "anyio", "click", "h11"} <= {p.name.split("-")[0] for p in folder.iterdir()}
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    offline = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_FIND_LINKS": "", "PYTHONPATH": ""}
    subprocess.run([python, ROOT / "tools" / "wheelhouse.py", "install", folder], env=offline, check=True)
    script = "import openai, starlette, uvicorn, msgspec, mill; print(openai.__version__)"
    found = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=offline, capture_output=True, text=True, check=True
    )
    assert f"openai-{found.stdout.strip()}-py3-none-any.whl" in read_manifest(folder)["wheels"]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_headrace_itself_for_a_host_that_has_torch(tmp_path: Path, python: str) -> None:
    have = ["torch==2.11.0+cu130", "triton==3.6.0", "transformers==5.17.0", "numpy==2.5.2", "safetensors==0.8.0"]
    have += ["huggingface-hub==1.33.0", "rich==14.2.0", "jinja2==3.1.6"]
    folder = tmp_path / "wheels"
    assert main(["download", str(folder), "--python", python, "--glibc", "2.39", "--have", *have]) == 0
    manifest = read_manifest(folder)
    assert {"torch", "transformers", "numpy"} <= set(manifest["keep"])
    found = {name.split("-")[0] for name in manifest["wheels"]}
    assert {"headrace", "msgspec", "uvicorn", "starlette", "anyio", "click"} <= found
    tag = f"cp{python.replace('.', '')}"
    assert all(tag in name for name in manifest["wheels"] if name.startswith("msgspec"))
