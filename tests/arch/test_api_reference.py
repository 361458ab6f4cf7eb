"""docs/api.md says what the docstrings say, and every public name is in it."""

from __future__ import annotations

import headrace
from tests.arch.source import ROOT
from tools.api_reference import SECTIONS, api_reference

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    assert api_reference() == PAGE, "run: python -m tools.api_reference > docs/api.md"


def test_every_public_name_is_in_it() -> None:
    listed = {name for _, module, names in SECTIONS for name in names if module == "headrace"}
    errors = {name for name in headrace.__all__ if name.endswith("Error")}
    assert listed | errors == {*headrace.__all__} - {"__version__"}
    assert all(name in PAGE for name in errors)


def test_nothing_of_a_docstring_is_lost() -> None:
    """A method whose text is another's refers to it; a table keeps its rows."""
    assert PAGE.count("Open a weight update.") == 1 and "As above: `abort`" in PAGE
    rows = [line for line in PAGE.splitlines() if line.startswith("| `") and "`overlap_depth`" in line]
    assert len(rows) == 1 and "stages one less than they are at least" in rows[0]
    assert "UpdateConflictError" in PAGE and " at 0x" not in PAGE, "no address of an object"
