"""What holds for checks with any framework."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """A framework's source is compiled when it is first imported, and warns then of what its authors wrote."""
    config.addinivalue_line("filterwarnings", "ignore:invalid escape sequence")
