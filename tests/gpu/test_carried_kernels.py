"""A folder of built kernels serves at another path: the engine that is given it builds nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from headrace import Engine
from headrace.bench.models import write_config
from headrace.config.kernel_cache import is_complete
from tools.kernels import main

SIZES = {"max_running_requests": 8, "max_num_batched_tokens": 128, "kv_pool_tokens": 4096}


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder, with the time it was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_carried_folder_is_all_that_a_start_needs(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    words = [word for name, value in SIZES.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert main(["build", "--shape", "tiny", "--out", str(here), *words]) == 0
    assert is_complete(here)
    shutil.move(here, there)
    before = files(there)
    assert sum(name.endswith(".cubin") for name in before) > 5
    with Engine(
        write_config(tmp_path / "tiny", "tiny"),
        device="cuda",
        load_format="dummy",
        skip_tokenizer_init=True,
        kernel_cache=str(there),
        max_running_requests=SIZES["max_running_requests"],
        max_num_batched_tokens=SIZES["max_num_batched_tokens"],
        kv_pool_tokens=SIZES["kv_pool_tokens"],
    ) as engine:
        engine.generate(input_ids=[[1, 2, 3]] * 3, sampling_params={"max_new_tokens": 8, "ignore_eos": True})
        assert engine.metrics()["num_compiled_after_ready"] == 0
    assert files(there) == before
