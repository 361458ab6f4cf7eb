"""Rules that a reader of the source relies on: nothing decodes objects, no hidden state, small functions and files."""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.source import ORDER, PACKAGE, ROOT, nodes_of, source_files, tree_of

FORBIDDEN = re.compile(
    r"\b(pickle|cloudpickle|dill|marshal|shelve|joblib|multiprocessing|broadcast_object_list|all_gather_object)\b"
    r"|(?<![\w.])(eval|exec)\("
    r"|\btrust_remote_code\s*=\s*True"
)
"""Names of what decodes objects or runs foreign code. `model.eval()` is a method and fine."""

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
P90_FUNCTION_LINES = 30
KERNELS = PACKAGE / "kernels"

BROAD_EXCEPT_ALLOWED = {
    "headrace/cluster/front.py": "a request that fails costs itself, and is answered",
    "headrace/cli/main.py": "process entry point",
    "headrace/core/commands.py": "a command or a request that fails costs itself",
    "headrace/core/follower.py": "a step or a message that fails on one rank is told to rank 0",
    "headrace/core/rank_process.py": "process entry point",
    "headrace/core/rank_thread.py": "a rank's whole life, in a process of somebody else",
    "headrace/core/executor.py": "where steps meet the device",
    "headrace/core/reading.py": "where reads meet the device",
    "headrace/core/releasing.py": "where memory meets the device",
    "headrace/core/service.py": "process entry point: the core's whole life",
    "headrace/core/updating.py": "where updates meet the device",
    "headrace/rl/tools.py": "what a user's tool raises is told to the model",
    "headrace/weights/stage_buffers.py": "hands whatever came to who asks for the memory",
    "headrace/engine/starting.py": "hands whatever came to everybody who waits for the start",
}
"""Where whatever comes may be caught and not raised again, and why. Cleaning up and raising is fine anywhere."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in source_files():
        yield path, tree_of(path)


def _functions(tree: ast.Module) -> list[Function]:
    return [node for node in nodes_of(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _num_lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


NAMES_AS_DATA = {
    "headrace/weights/foreign_table.py": "names of others' modules, which are compared and never looked up"
}
"""Where strings may hold forbidden names, and why."""


NAMES_COMPARED = {"headrace/rl/openrlhf.py": "torch's own functions that make a tensor of a handle, and no others"}
"""Where the module of `multiprocessing` is read for what it has, and why."""


def _forbidden_in(text: str) -> list[str]:
    return [match.group(0) for match in FORBIDDEN.finditer(text)]


def _without_strings(text: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return tokenize.untokenize(
        token._replace(string='""') if token.type == tokenize.STRING else token for token in tokens
    )


def _code(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if _relative(path) in NAMES_COMPARED:
        return text.replace("torch.multiprocessing", "")
    return _without_strings(text) if _relative(path) in NAMES_AS_DATA else text


def test_nothing_decodes_objects_or_runs_foreign_code() -> None:
    found = [
        f"{_relative(path)}:{number}: {name}"
        for path in source_files()
        for number, line in enumerate(_code(path).splitlines(), 1)
        for name in _forbidden_in(line)
    ]
    assert not found, "\n".join(found)


def test_the_gate_lets_names_pass_as_data_only() -> None:
    assert not _forbidden_in(_without_strings('NAME = "multiprocessing"\n'))
    assert _forbidden_in(_without_strings('import multiprocessing\nNAME = "multiprocessing"\n')) == ["multiprocessing"]
    assert all(_forbidden_in((ROOT / path).read_text(encoding="utf-8")) for path in NAMES_AS_DATA)


@pytest.mark.parametrize(
    "line",
    ["import pickle", "x = eval(text)", "from multiprocessing import shared_memory", "dist.broadcast_object_list(x)"],
)
def test_the_gate_sees_forbidden_names(line: str) -> None:
    assert _forbidden_in(line)


def test_the_gate_lets_methods_called_eval_pass() -> None:
    assert not _forbidden_in("model.eval()") and not _forbidden_in("re.compile(text)")


def _unsafe_loads(tree: ast.Module) -> list[int]:
    return [
        node.lineno
        for node in nodes_of(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "load"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("torch", "np", "numpy")
        and not any(
            keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            for keyword in node.keywords
        )
    ]


def test_torch_load_reads_weights_only() -> None:
    found = [f"{_relative(path)}:{line}" for path, tree in _trees() for line in _unsafe_loads(tree)]
    assert not found, "\n".join(found)
    assert _unsafe_loads(ast.parse("torch.load(p)")) == [1]
    assert _unsafe_loads(ast.parse("torch.load(p, weights_only=True)")) == []


def test_no_module_global_is_rebound() -> None:
    found = [
        f"{_relative(path)}:{node.lineno}: global {', '.join(node.names)}"
        for path, tree in _trees()
        for node in nodes_of(tree)
        if isinstance(node, ast.Global)
    ]
    assert not found, "\n".join(found)


def _mutable_module_state(tree: ast.Module) -> list[str]:
    """Module variables bound to an empty mutable container: nothing could fill them but hidden state."""
    found = []
    for node in tree.body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        is_empty = isinstance(value, (ast.List, ast.Set)) and not value.elts
        is_empty |= isinstance(value, ast.Dict) and not value.keys
        is_empty |= (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id in ("dict", "list", "set", "defaultdict", "deque", "OrderedDict", "Counter")
            and not value.args
        )
        if is_empty:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_module_holds_mutable_state() -> None:
    found = [f"{_relative(path)}:{line}" for path, tree in _trees() for line in _mutable_module_state(tree)]
    assert not found, "\n".join(found)
    assert _mutable_module_state(ast.parse("CACHE: dict[str, int] = {}"))


def test_functions_and_files_are_small() -> None:
    lengths: list[int] = []
    too_long = []
    for path, tree in _trees():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            too_long.append(f"{_relative(path)}: {num_lines} lines")
        for function in _functions(tree):
            lengths.append(_num_lines(function))
            if _num_lines(function) > MAX_FUNCTION_LINES and not path.is_relative_to(KERNELS):
                too_long.append(f"{_relative(path)}:{function.lineno} {function.name}: {_num_lines(function)} lines")
    assert not too_long, "\n".join(too_long)
    assert statistics.quantiles(lengths, n=10)[-1] <= P90_FUNCTION_LINES


def _broad_handlers(tree: ast.Module) -> list[int]:
    return [
        node.lineno
        for node in nodes_of(tree)
        if isinstance(node, ast.ExceptHandler)
        and not isinstance(node.body[-1], ast.Raise)
        and (node.type is None or {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} & _BROAD)
    ]


_BROAD = {"Exception", "BaseException", "FAULTS"}


def test_only_listed_places_swallow_everything() -> None:
    found = [
        f"{_relative(path)}:{line}"
        for path, tree in _trees()
        for line in _broad_handlers(tree)
        if _relative(path) not in BROAD_EXCEPT_ALLOWED
    ]
    assert not found, "\n".join(found)


def test_no_two_public_classes_have_one_name() -> None:
    names = [
        node.name
        for _, tree in _trees()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not {name for name in names if names.count(name) > 1}, "docs/glossary.md has one word for one thing"


def test_every_module_says_what_it_owns() -> None:
    found = [_relative(path) for path, tree in _trees() if not ast.get_docstring(tree)]
    assert not found, "\n".join(found)


def test_there_is_no_utils() -> None:
    names = {path.stem for path in PACKAGE.rglob("*") if path.is_dir() or path.suffix == ".py"}
    assert not names & {"utils", "util", "helpers", "misc", "common"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(ORDER)


def test_no_test_is_skipped_but_for_absent_hardware() -> None:
    found = [
        f"{_relative(path)}:{number}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "gpu" not in path.relative_to(ROOT).parts and path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"pytest\.(mark\.)?(skip|skipif|xfail|importorskip)\b", line)
    ]
    assert not found, "\n".join(found)


TENSOR_MAKERS = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "linspace", "eye", "as_tensor")
MAKES_TENSORS = ("kernels", "attention", "weights", "layers", "models", "sampling", "runner", "core", "engine")


def _half_made_tensors(tree: ast.Module) -> list[str]:
    """Calls that make a tensor of the process's default dtype or on its default device."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in nodes_of(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in TENSOR_MAKERS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]


def test_no_tensor_of_an_engine_depends_on_default_dtype_or_device() -> None:
    found = [
        f"{_relative(path)}:{call}"
        for path, tree in _trees()
        if path.relative_to(PACKAGE).parts[0] in MAKES_TENSORS
        for call in _half_made_tensors(tree)
    ]
    assert not found, "\n".join(found)
    assert len(_half_made_tensors(ast.parse("torch.zeros(3); torch.ones(1, dtype=x); torch.full(1, 2, device=y)"))) == 3


def test_a_module_that_is_run_does_not_log_under_the_name_that_it_has_then() -> None:
    """`__main__` is none of ours: its records would come past the handler, as bare text among lines of JSON."""
    texts = {_relative(path): path.read_text(encoding="utf-8") for path in source_files()}
    run = {name for name, text in texts.items() if 'if __name__ == "__main__":' in text}
    assert {"headrace/core/process.py", "headrace/core/rank_process.py"} <= run
    assert not [name for name in run if "getLogger(__name__)" in texts[name]]


def test_no_advice_names_a_package_that_no_index_has() -> None:
    """Headrace is installed from its source tree: `headrace[demo]` is nothing that pip can find."""
    texts = [*source_files(), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [_relative(path) for path in texts if re.search(r"headrace\[\w", path.read_text(encoding="utf-8"))]
    assert not found, found
