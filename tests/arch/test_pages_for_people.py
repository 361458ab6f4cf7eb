"""Tables for those who come from elsewhere, of what there is, and of messages: held to the code."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import headrace
from headrace.cli.main import build_parser
from headrace.engine import GenerateOptions
from headrace.server.app import all_endpoints
from headrace.server.options import ServerOptions
from headrace.types import plain_values
from tests.arch.source import ROOT, nodes_of, source_files, tree_of

DOCS = ROOT / "docs"
QUOTED = re.compile(r"`([^`]+)`")


def rows(page: str) -> list[list[str]]:
    """Cells of every row of every table, without heads."""
    lines = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@functools.cache
def words_of_commands() -> tuple[frozenset[str], frozenset[str]]:
    """All flags of `headrace serve`, and the names of all commands."""
    (commands,) = [each for each in build_parser()._actions if each.dest not in ("help", "version")]
    assert isinstance(commands.choices, dict)
    return frozenset(commands.choices["serve"]._option_string_actions), frozenset(commands.choices)


@functools.cache
def paths() -> frozenset[str]:
    state = MagicMock()
    state.options = ServerOptions()
    return frozenset(endpoint.path for endpoint in all_endpoints(state))


def exists(name: str) -> bool:
    """A flag, a command, a route, a name of `headrace`, of a module of it, or of a class of it."""
    flags, commands = words_of_commands()
    if name.startswith("-"):
        return name in flags
    if name.startswith("headrace "):
        return name.split()[1] in commands
    if name.startswith("/"):
        return name in paths()
    first, *rest = name.split(".")
    if first == "headrace":
        module = importlib.import_module(name.rpartition(".")[0])
        return hasattr(module, rest[-1])
    if first == "GenerateOptions":
        return rest[0] in GenerateOptions.__annotations__
    found = getattr(headrace, first, None)
    return found is not None and all(hasattr(found, each) for each in rest)


@pytest.mark.parametrize("page", ["coming-from.md", "supported.md"])
def test_names_of_ours_are_there(page: str) -> None:
    column = {"coming-from.md": -1, "supported.md": 1}[page]
    names = {name for row in rows(page) for name in QUOTED.findall(row[column])}
    assert {name for name in names if not exists(name) and name not in ("input_ids", ".bin")} == set()
    assert len(names) > 15


def test_what_is_the_same_is() -> None:
    """Where a name there is said to be ours, too."""
    said = [name for row in rows("coming-from.md") if row[1] == "the same" for name in QUOTED.findall(row[0])]
    flags = {name for name in said if name.startswith("-")}
    assert flags and all(exists(name) for name in flags)
    assert {*said} - flags == {"add_generation_prompt", "continue_final_message", "chat_template_kwargs"}


def test_the_gate_sees_names_that_are_not_there() -> None:
    assert exists("Engine.chat") and exists("headrace.rl.WeightPusher") and exists("/generate")
    wrong = ("--tp", "Engine.sleep", "headrace.rl.Nobody", "/nowhere", "headrace fly", "GenerateOptions.n", "Nobody")
    assert not any(map(exists, wrong))


def test_every_name_that_is_answered_with_ours_is_marked() -> None:
    text = (DOCS / "coming-from.md").read_text(encoding="utf-8").replace("-", "_")
    for name in plain_values._NAMES_ELSEWHERE:
        assert re.search(rf"(?<![a-z]){name}(?![a-z_])[^|°]*°", text), name


def literals(path: Path) -> list[str]:
    """Texts in a file, "…" where a value is put in."""
    found = []
    for node in nodes_of(tree_of(path)):
        if isinstance(node, ast.JoinedStr):
            parts = (each.value if isinstance(each, ast.Constant) else "…" for each in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value.replace("%s", "…"))
    return found


def test_quoted_messages_are_in_the_source() -> None:
    texts = "\n".join(text for path in source_files() for text in literals(path))
    heads = [row[0] for row in rows("troubleshooting.md")]
    messages = [head[1:-1] for head in heads if head.startswith("`") and head.endswith("`") and head.count("`") == 2]
    assert len(messages) >= 25
    assert [message for message in messages if message not in texts] == []
    assert "this is no message of ours … at all" not in texts
