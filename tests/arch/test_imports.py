"""The order of packages, and which of them may load torch."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.arch.source import (
    ORDER,
    PACKAGE,
    ROOT,
    TORCH_FREE_PACKAGES,
    Import,
    imports_in,
    imports_of,
    module_name,
    package_of,
    source_files,
)

LAZY_UPWARD_IMPORTS = {
    ("headrace.cli.main", "bench"): "the bench command's flags and body",
}
"""(module, package) that may be imported upward inside a function, and why. At most five."""

ROOT_RANK = ORDER.index("engine") + 0.5
"""The root package re-exports the engine: only what comes later may import it."""

TORCH_FREE_MODULES = (
    "headrace",
    "headrace.weights",
    "headrace.weights.weight_map",
    "headrace.weights.session",
    "headrace.weights.foreign",
    "headrace.weights.saved",
    "headrace.weights.save_folder",
    "headrace.weights.save_store",
)

TORCH_MODULES_OF_TORCH_FREE_PACKAGES: tuple[str, ...] = ()


def _rank(package: str) -> float:
    return ROOT_RANK if package == "" else ORDER.index(package)


def _is_allowed(found: Import) -> bool:
    importer, imported = package_of(found.importer), package_of(found.imported)
    if importer in ("", "__main__") or importer == imported:
        return True
    if found.is_lazy and (found.importer, imported) in LAZY_UPWARD_IMPORTS:
        return True
    names_root = found.imported == "headrace" or not (PACKAGE / imported).exists() and imported not in ORDER
    return _rank("" if names_root else imported) < _rank(importer)


def test_every_package_has_a_place_in_the_order() -> None:
    packages = {package_of(module_name(path)) for path in source_files()} - {"", "__main__"}
    assert packages <= set(ORDER), f"not in the order: {sorted(packages - set(ORDER))}"


def test_a_package_imports_only_packages_before_it() -> None:
    upward = [found for path in source_files() for found in imports_of(path) if not _is_allowed(found)]
    assert not upward, "\n".join(f"{i.importer}:{i.line} imports {i.imported}" for i in upward)


def test_lazy_upward_imports_are_few_and_all_in_use() -> None:
    assert len(LAZY_UPWARD_IMPORTS) <= 5
    found = {(i.importer, package_of(i.imported)) for path in source_files() for i in imports_of(path) if i.is_lazy}
    assert set(LAZY_UPWARD_IMPORTS) <= found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from headrace.engine import Engine", "headrace.engine"),
        ("import headrace.runner.runner", "headrace.runner.runner"),
        ("def f():\n    from headrace.core import loop", "headrace.core"),
        ("if TYPE_CHECKING:\n    from ..engine import Engine", "headrace.engine"),
        ("importlib.import_module('headrace.server')", "headrace.server"),
        ("from headrace import Engine", "headrace.Engine"),
        ("import headrace", "headrace"),
    ],
)
def test_the_gate_sees_every_kind_of_import(text: str, expected: str) -> None:
    (found,) = imports_in(ast.parse(text), "headrace.cache.probe")
    assert found.imported == expected
    assert not _is_allowed(found)


def _modules_of(packages: tuple[str, ...]) -> list[str]:
    return [module_name(path) for path in source_files() if package_of(module_name(path)) in packages]


def test_torch_free_layers_do_not_load_torch() -> None:
    modules = [*TORCH_FREE_MODULES, *_modules_of(TORCH_FREE_PACKAGES)]
    modules = [m for m in modules if m not in TORCH_MODULES_OF_TORCH_FREE_PACKAGES and not m.endswith(".__main__")]
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(name + " loads torch")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_headrace_is_fast() -> None:
    """The promise is one second; the best of three, in processor time, so that a busy machine does not decide."""
    script = "import time; t = time.process_time(); import headrace; print(time.process_time() - t)"
    command = [sys.executable, "-c", script]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 1.0
