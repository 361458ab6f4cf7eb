"""The files that the documents name are there."""

from __future__ import annotations

import re

import pytest

from tests.arch.source import PACKAGE, ROOT

DOCUMENTS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*)`|\]\(([\w./-]+\.md)\)")
OURS = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir()) if path.is_dir()}


def named_in(text: str) -> list[str]:
    """Paths in backticks whose first part is a folder of the repository or of the package, and links to documents."""
    found = (code or link for code, link in NAMED.findall(text))
    return [path for path in found if path.endswith(".md") or path.split("/")[0] in OURS]


def exists(path: str) -> bool:
    """A file, a folder or a module."""
    return any(any(base.glob(f"{path}{end}")) for base in (ROOT, PACKAGE, ROOT / "docs") for end in ("", ".py"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_exist(name: str) -> None:
    paths = [path for path in named_in((ROOT / "docs" / name).read_text(encoding="utf-8")) if "NAME" not in path]
    assert [path for path in paths if not exists(path)] == []


def test_the_gate_sees_paths_and_nothing_else() -> None:
    text = "`headrace/core/loop.py`, `kernels/`, `a/b`, [x](architecture.md), `tests/kernels/test_*.py`, `/x`"
    assert named_in(text) == ["headrace/core/loop.py", "kernels/", "architecture.md", "tests/kernels/test_*.py"]
