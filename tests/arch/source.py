"""The package's source as the gates see it: files, their modules, and every import with the place it stands."""

from __future__ import annotations

import ast
import functools
import os
from pathlib import Path

import msgspec

from headrace.ipc.spawn import python_path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "headrace"

ORDER = (
    "types",
    "config",
    "telemetry",
    "ipc",
    "cache",
    "scheduler",
    "kernels",
    "parallel",
    "attention",
    "weights",
    "lora",
    "layers",
    "models",
    "sampling",
    "runner",
    "core",
    "text",
    "engine",
    "server",
    "client",
    "rl",
    "cluster",
    "simulation",
    "compare",
    "cli",
    "bench",
)
"""A package may import only packages before it. `lora` is not there yet: this is its place."""

TORCH_FREE_PACKAGES = (
    "types",
    "config",
    "telemetry",
    "ipc",
    "cache",
    "scheduler",
    "text",
    "engine",
    "server",
    "client",
    "cluster",
    "simulation",
    "compare",
    "cli",
    "bench",
)


class Import(msgspec.Struct, frozen=True):
    """`importer` (a dotted module) names `imported` (a dotted module) at `line`; `is_lazy` inside a function."""

    importer: str
    imported: str
    line: int
    is_lazy: bool


def child_environment(**added: str) -> dict[str, str]:
    """The environment of a process that a test starts: it finds this repo, and whatever packages this process was told
    to look for."""
    return {**os.environ, "PYTHONPATH": python_path(), **added}


def source_files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """A file of the package, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(tree: ast.Module) -> tuple[ast.AST, ...]:
    """All that is in a tree, as `ast.walk` finds it."""
    return tuple(ast.walk(tree))


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """The second part of a dotted name; "" for the root package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@functools.cache
def imports_of(path: Path) -> list[Import]:
    """Imports of headrace modules in a file of the package."""
    return imports_in(tree_of(path), module_name(path), is_package=path.name == "__init__.py")


def imports_in(tree: ast.Module, importer: str, *, is_package: bool = False) -> list[Import]:
    """Imports of headrace modules in a module, type-only ones and names handed to `import_module` included."""
    lazy = {
        id(node)
        for function in nodes_of(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    return [
        Import(importer, imported, getattr(node, "lineno", 0), id(node) in lazy)
        for node in nodes_of(tree)
        for imported in _imported(node, importer, is_package=is_package)
        if imported.split(".")[0] == "headrace"
    ]


def _imported(node: ast.AST, importer: str, *, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = importer.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
            base = ".".join([*parents, *filter(None, [base])])
        return [f"{base}.{alias.name}" for alias in node.names] if base == "headrace" else [base]
    if isinstance(node, ast.Call) and _called(node.func) == "import_module" and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
    return []


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
