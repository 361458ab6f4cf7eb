"""What a benchmark runs, and what its report says of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from headrace.bench.engine_setup import EngineSetup, describe, flag_words, metric_deltas, prepare, versions
from headrace.bench.request_style import RequestStyle
from headrace.bench.start import phases_of
from headrace.cli.flags import given
from headrace.cli.main import parse
from headrace.config import EngineConfig
from headrace.types.errors import ConfigError


def test_public_shapes_get_no_file_and_small_ones_do(tmp_path: Path) -> None:
    public = prepare(EngineSetup(shape="qwen3-0.6b", engine={"device": "cpu"}), tmp_path)
    assert public.settings["load_format"] == "dummy" and not list(public.folder.glob("*.safetensors"))
    small = prepare(EngineSetup(shape="tiny"), tmp_path)
    assert "load_format" not in small.settings and list(small.folder.glob("*.safetensors"))
    with pytest.raises(ConfigError, match="enormous"):
        prepare(EngineSetup(shape="enormous", engine={"load_format": "dummy"}), tmp_path)


def test_what_the_user_sets_wins(tmp_path: Path) -> None:
    prepared = prepare(EngineSetup(shape="tiny", engine={"max_running_requests": 3}), tmp_path, dummy=True)
    assert prepared.with_defaults(max_running_requests=9, page_size=4) == {
        "skip_tokenizer_init": True, "seed": 0, "load_format": "dummy", "max_running_requests": 3, "page_size": 4,
    }  # fmt: skip
    report = describe(EngineSetup(shape="tiny", engine={"max_running_requests": 3}), prepared)
    assert report["settings"] == {"max_running_requests": 3} and report["versions"] == versions()
    assert report["device"] == prepared.resolved.device and ("gpu" in report) != prepared.is_cpu


def test_settings_become_the_flags_that_give_them_back() -> None:
    settings = {
        "skip_tokenizer_init": True, "prefix_cache": False, "cuda_graphs": True, "page_size": 8,
        "memory_fraction": 0.5, "kernel_cache": "/x y", "numerics": "invariant",
    }  # fmt: skip
    unsaid = {"kv_pool_tokens": None}
    arguments = parse(["serve", "model", *flag_words({**settings, **unsaid})])
    assert given(arguments, EngineConfig, skip=("model",)) == settings
    assert flag_words({"skip_tokenizer_init": False}) == []


def test_deltas_are_per_run_and_shares_of_all_runs() -> None:
    before = {"num_steps": 10.0, "gpu_busy_s": 1.0, "gpu_idle_s": 0.5, "num_compiled_after_ready": 0.0}
    after = {"num_steps": 30.0, "gpu_busy_s": 4.0, "gpu_idle_s": 1.5, "num_compiled_after_ready": 2.0, "uptime_s": 9.0}
    found = metric_deltas(before, after, 2)
    assert found["num_steps"] == 10.0 and found["num_compiled_after_ready"] == 2.0
    assert (found["gpu_busy_s"], found["gpu_idle_s"], found["gpu_idle_share"]) == (1.5, 0.5, 0.25)
    assert metric_deltas({}, {"num_steps": 3.0}, 1) == {"num_steps": 3.0}


def test_phases_of_a_log() -> None:
    lines = [
        "2026-11-20 10:11:12 info    core:0 runner: weights 1.2 s, sizing 0.4 s, 35 graphs 3.0 s",
        "2026-11-20 10:11:13 info    core:0 runner: loading weights: 5 of 10 tensors",
        "2026-11-20 10:11:14 info    core:0 core: ready total_s=4.75 num_pages=12",
    ]
    assert phases_of(lines) == {"weights": 1.2, "sizing": 0.4, "graphs": 3.0, "total": 4.75}


def test_a_style_reports_what_is_not_plain() -> None:
    assert RequestStyle().report() == {}
    assert RequestStyle(top_k=50).report() == {"top_k": 50}
    params = RequestStyle(top_p=0.5).params(7)
    assert (params.max_new_tokens, params.temperature, params.top_p, params.ignore_eos) == (7, 1.0, 0.5, True)
    assert msgspec.structs.fields(RequestStyle)[0].name == "top_p"
