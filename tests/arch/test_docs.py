"""The files that the documents name are there, and what tables say is in a file is."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from tests.arch.source import PACKAGE, ROOT

DOCUMENTS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*)`|\]\(([\w./-]+\.md)\)")
ROW = re.compile(r"^\| `([\w/]+\.py)` \| ((?:`[\w.]+`(?:, )?)+) \|", re.MULTILINE)
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


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{each}" for each in DOCUMENTS)])
def test_what_pages_install_is_an_extra_and_brings_a_torch_for_cpus(name: str) -> None:
    """A command that stands alone is one that a machine without a GPU can run as it is, without gigabytes of CUDA."""
    text = (ROOT / name).read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install '\.\[(\w+)\]'", text)) <= set(extras)
    for command in re.findall(r"^pip install .*$", text, re.MULTILINE):
        assert command.endswith(" --extra-index-url https://download.pytorch.org/whl/cpu"), command


def defined_in(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """What a module defines; what a class does is behind its name and a dot."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(prefix + node.name)
            found |= defined_in(node.body, f"{prefix}{node.name}.") if isinstance(node, ast.ClassDef) else set()
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_table_finds_in_a_file_is_there(name: str) -> None:
    """Rows that begin with a file and go on with names."""
    text, lost = (ROOT / "docs" / name).read_text(encoding="utf-8"), []
    for path, names in ROW.findall(text):
        file = next(base / path for base in (PACKAGE, ROOT) if (base / path).exists())
        known = defined_in(ast.parse(file.read_text(encoding="utf-8")).body)
        lost += [f"{path}: {each}" for each in names.replace("`", "").split(", ") if each not in known]
    assert lost == []
    assert name != "one-token.md" or len(ROW.findall(text)) == text.count("\n| `")


def test_the_gate_sees_names_in_tables() -> None:
    text = "| `core/loop.py` | `CoreLoop.turn`, `CoreLoop` | says |\n| `Other` | `x` | |"
    assert ROW.findall(text) == [("core/loop.py", "`CoreLoop.turn`, `CoreLoop`")]
    source = "async def f(): ...\nclass A:\n    x = 1\n    def y(self): ...\nb: int = 1"
    assert defined_in(ast.parse(source).body) == {"f", "A", "A.x", "A.y", "b"}


def test_the_gate_sees_paths_and_nothing_else() -> None:
    text = "`headrace/core/loop.py`, `kernels/`, `a/b`, [x](architecture.md), `tests/kernels/test_*.py`, `/x`"
    assert named_in(text) == ["headrace/core/loop.py", "kernels/", "architecture.md", "tests/kernels/test_*.py"]
