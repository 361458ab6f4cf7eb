"""Built kernels are kept where asked, found again wherever the folder is carried to, and counted."""
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from headrace.config.kernel_cache import MANIFEST, is_complete, seal, use_kernel_cache
from headrace.kernels.compile_counter import CompileCounter
from headrace.kernels.triton.carried_cache import CarriedCacheManager
from headrace.types.errors import ConfigError
from tests.arch.source import ROOT, child_environment

COMPILE = """
import os, sys
from headrace.config.kernel_cache import use_kernel_cache
from headrace.kernels.compile_counter import CompileCounter

use_kernel_cache(None)
assert "TRITON_CACHE_DIR" not in os.environ
use_kernel_cache(sys.argv[1])
use_kernel_cache(sys.argv[1])
print(*(os.environ[n] for n in ("TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TORCHINDUCTOR_CACHE_DIR")))
assert not {"triton", "flashinfer"} & set(sys.modules)

import triton
assert triton.knobs.cache.dir == os.environ["TRITON_CACHE_DIR"]
use_kernel_cache(sys.argv[1])
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(x_ptr, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(x_ptr + columns, tl.load(x_ptr + columns, mask=columns < n) * 2, mask=columns < n)


counter = CompileCounter()
counter.arm()
signature = {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
source = ASTSource(fn=double, signature=signature, constexprs={(2,): 128})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(counter.num_compiled, counter.num_loaded, len(kernel.asm["cubin"]) > 0)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test puts into the environment is taken out again."""
    for name in (
        "TRITON_CACHE_DIR",
        "TRITON_CACHE_MANAGER",
        "TRITON_STORE_BINARY_ONLY",
        "FLASHINFER_WORKSPACE_BASE",
        "TORCHINDUCTOR_CACHE_DIR",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def run_python(script: Path | str, *words: str) -> str:
    """What a fresh process, whose Triton compiles for a device, prints."""
    command = [sys.executable, *(["-c", script] if isinstance(script, str) else [str(script)]), *words]
    variables = child_environment()
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_built_kernel_is_found_again_at_another_path(tmp_path: Path) -> None:
    script = tmp_path / "compile_double.py"
    script.write_text(COMPILE, encoding="utf-8")
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, counts in ((here, "1 0 True"), (there, "0 1 True")):
        if folder == there:
            shutil.move(here, there)
        places, found = run_python(script, str(folder)).splitlines()
        assert places.split() == [str(folder / name) for name in ("triton", "flashinfer", "inductor")]
        assert all(Path(path).is_dir() for path in places.split()), "every library is pointed at a folder of its own"
        assert found == counts
    assert not here.exists()
    assert {path.suffix for path in (there / "triton").glob("*/*double*")} == {".cubin", ".json", ".source"}


def test_half_a_kernel_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "here"))
    writer = CarriedCacheManager("KEY")
    files = {name: writer.put("text", name) for name in ("a.cubin", "a.json")}
    writer.put_group("a.json", files)
    assert writer.get_group("a.json") == files
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    moved = {name: path.replace("/here/", "/there/") for name, path in files.items()}
    assert CarriedCacheManager("KEY").get_group("a.json") == moved
    assert CarriedCacheManager("KEY").get_group("b.json") is None
    Path(moved["a.cubin"]).unlink()
    assert CarriedCacheManager("KEY").get_group("a.json") is None


def test_it_is_too_late_once_triton_is_imported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="imported already") as caught:
        use_kernel_cache(str(tmp_path))
    assert caught.value.field == "kernel_cache"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_folder_that_cannot_be_written_must_be_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").symlink_to("/proc/nowhere")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        use_kernel_cache(str(tmp_path))
    assert caught.value.field == "kernel_cache"
    seal(tmp_path, headrace="1", device="a device", models=("small",))
    use_kernel_cache(str(tmp_path))
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path / "flashinfer")


def test_a_set_of_another_triton_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    manifest = seal(tmp_path, headrace="1", device="a device", models=("small",))
    assert manifest.triton == triton.__version__
    assert is_complete(tmp_path)
    text = (tmp_path / MANIFEST).read_text(encoding="utf-8")
    (tmp_path / MANIFEST).write_text(text.replace(manifest.triton, "0.0.1"), encoding="utf-8")
    assert not is_complete(tmp_path)
    (tmp_path / MANIFEST).write_text("{", encoding="utf-8")
    assert not is_complete(tmp_path)


def compiled(cache_hit: bool) -> None:
    """As the end of Triton's `compile` tells its listener."""
    listener = triton.knobs.compilation.listener
    if listener:
        listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)


def test_the_counter_counts_only_while_armed() -> None:
    counter = CompileCounter()
    compiled(False)
    counter.arm()
    counter.arm()
    try:
        for hit in (False, True, True):
            compiled(hit)
        assert (counter.num_compiled, counter.num_loaded, counter.num_calls) == (1, 2, 3)
    finally:
        counter.disarm()
    compiled(False)
    assert counter.num_calls == 3
    assert triton.knobs.compilation.listener is None


def test_two_counters_count_beside_each_other() -> None:
    first, second = CompileCounter(), CompileCounter()
    first.arm()
    second.arm()
    try:
        compiled(True)
    finally:
        second.disarm()
        first.disarm()
    assert (first.num_loaded, second.num_loaded) == (1, 1)
    assert triton.knobs.compilation.listener is None


def test_one_that_stops_first_does_not_stop_the_one_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)  # put back at the end
    first, second = CompileCounter(), CompileCounter()
    first.arm()
    second.arm()
    first.disarm()
    compiled(False)
    assert (first.num_calls, second.num_calls) == (0, 1)
    first.arm()
    compiled(True)
    assert (first.num_loaded, second.num_loaded) == (1, 1)
    second.disarm()
    compiled(True)
    assert (first.num_loaded, second.num_loaded) == (2, 1)
    first.disarm()
    assert triton.knobs.compilation.listener is None
