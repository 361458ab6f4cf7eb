"""Every "auto" is decided, explained and bounded, whatever the machine has: devices and software are given here."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.config import CudaDevice, EngineConfig, ResolvedConfig, Software, machine, resolve
from headrace.config.engine_config import SettledConfig
from headrace.config.machine import available_cores, available_memory
from headrace.engine.core_host import model_folder, resolve_settings
from headrace.types.errors import ConfigError

H200 = CudaDevice("NVIDIA H200", 150_754_820_096, (9, 0), 132)
A100 = CudaDevice("NVIDIA A100", 80 << 30, (8, 0), 108)
T4 = CudaDevice("Tesla T4", 16 << 30, (7, 5), 40)
FULL = Software(torch_cuda="13.0", has_triton=True, has_flashinfer=True)
INTERPRETED = Software(has_triton=True, interprets_triton=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(values))


def resolved(
    folder: Path, *, devices: tuple[CudaDevice, ...] = (), software: Software = FULL, **settings: Any
) -> ResolvedConfig:
    config = EngineConfig.from_dict({"model": str(folder), **settings})
    return resolve(config, folder, devices=devices, software=software)


def on_cuda(folder: Path, **settings: Any) -> ResolvedConfig:
    return resolved(folder, devices=(H200,), **settings)


def why(result: ResolvedConfig, setting: str) -> str:
    """Value and reason of one explained setting."""
    (found,) = [f"{value}: {text}" for name, value, text in result.explanations if name == setting]
    return found


OPEN = {
    "device",
    "dtype",
    "kv_dtype",
    "context_length",
    "num_threads",
    "kv_pool_tokens",
    "attention_backend",
    "max_running_requests",
    "max_num_batched_tokens",
    "prefill_step_tokens",
    "overlap_depth",
    "seed",
}


@pytest.mark.parametrize("devices", [(), (H200,)])
def test_everything_auto_is_explained(folder: Path, devices: tuple[CudaDevice, ...]) -> None:
    result = resolved(folder, devices=devices)
    assert {name for name, _, _ in result.explanations} == OPEN
    assert all(value and text for _, value, text in result.explanations)


def test_the_defaults_of_a_cpu(folder: Path) -> None:
    result = resolved(folder)
    assert (result.device, result.dtype, result.kv_dtype, result.context_length) == ("cpu", "float32", "float32", 512)
    assert (result.engine.max_running_requests, result.engine.overlap_depth) == (256, 0)
    assert (result.attention_backend, result.cuda) == ("cpu", None)


def test_the_defaults_of_a_cuda_device(folder: Path) -> None:
    write(folder, torch_dtype="bfloat16")
    result = on_cuda(folder)
    assert (result.device, result.dtype, result.kv_dtype) == ("cuda", "bfloat16", "bfloat16")
    assert (result.engine.max_running_requests, result.engine.overlap_depth) == (512, 1)
    assert (result.attention_backend, result.cuda) == ("triton", H200)
    assert "H200" in why(result, "device") and "9.0" in why(result, "device")
    assert "docs/benchmarks.md" in why(result, "attention_backend")


def test_what_was_resolved_travels(folder: Path) -> None:
    for result in (resolved(folder), on_cuda(folder)):
        copy = msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=ResolvedConfig)
        assert copy == result and isinstance(copy.engine, SettledConfig)


@pytest.mark.parametrize(
    ("devices", "software", "missing"),
    [
        ((), FULL, "no CUDA device"),
        ((T4, H200), FULL, "Tesla T4 of compute capability 7.5, below 8.0"),
        ((H200,), Software(has_triton=True), "CPU build"),
        ((H200,), Software(torch_cuda="13.0"), "triton is not installed"),
    ],
)
def test_a_device_that_cannot_be_used_is_said_to_be_so(
    folder: Path, devices: tuple[CudaDevice, ...], software: Software, missing: str
) -> None:
    result = resolved(folder, devices=devices, software=software)
    assert result.device == "cpu" and result.cuda is None and missing in why(result, "device")
    with pytest.raises(ConfigError, match=missing) as caught:
        resolved(folder, devices=devices, software=software, device="cuda")
    assert caught.value.field == "device"


def test_the_least_capability_is_enough_and_the_first_device_counts(folder: Path) -> None:
    assert resolved(folder, devices=(A100, T4)).cuda == A100
    assert resolve(EngineConfig(model="m"), folder, devices=(T4, A100), software=FULL, first_device=1).cuda == A100


def test_a_given_device_is_not_explained(folder: Path) -> None:
    assert on_cuda(folder, device="cpu").device == "cpu"
    for device in ("cpu", "cuda"):
        assert "device" not in {name for name, _, _ in on_cuda(folder, device=device).explanations}


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("float8_e4m3fn", "bfloat16")],
)
def test_a_device_takes_the_checkpoints_dtype(folder: Path, checkpoint: str, expected: str) -> None:
    write(folder, dtype=checkpoint)
    assert on_cuda(folder).dtype == expected
    assert on_cuda(folder, dtype="float16").dtype == "float16"
    assert resolved(folder).dtype == "float32"


BACKENDS: list[tuple[str, tuple[CudaDevice, ...], Software, str | None]] = [
    ("reference", (), FULL, None),
    ("reference", (H200,), FULL, None),
    ("cpu", (), FULL, None),
    ("cpu", (H200,), FULL, "does not run on cuda"),
    ("triton", (H200,), FULL, None),
    ("triton", (), FULL, "TRITON_INTERPRET=1"),
    ("triton", (), Software(interprets_triton=True), "TRITON_INTERPRET=1"),
    ("triton", (), INTERPRETED, None),
    ("flashinfer", (H200,), FULL, None),
    ("flashinfer", (H200,), Software(torch_cuda="13.0", has_triton=True), "not installed"),
    ("flashinfer", (), FULL, "does not run on cpu"),
]


@pytest.mark.parametrize(("backend", "devices", "software", "refusal"), BACKENDS)
def test_backends_run_where_they_can(
    folder: Path, backend: str, devices: tuple[CudaDevice, ...], software: Software, refusal: str | None
) -> None:
    settings: dict[str, Any] = {"devices": devices, "software": software, "attention_backend": backend}
    if refusal is None:
        result = resolved(folder, **settings)
        assert result.attention_backend == backend
        assert "attention_backend" not in {name for name, _, _ in result.explanations}
        return
    with pytest.raises(ConfigError, match=refusal) as caught:
        resolved(folder, **settings)
    assert caught.value.field == "attention_backend"


EXPERTS = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}


def test_experts_run_on_a_cpu_and_by_the_reference_alone(folder: Path) -> None:
    write(folder, **EXPERTS)
    found = on_cuda(folder)
    assert (found.device, found.attention_backend) == ("cpu", "cpu") and "experts" in why(found, "device")
    with pytest.raises(ConfigError, match="'cuda' cannot be used: NVIDIA H200 .* has no kernels for layers of") as no:
        on_cuda(folder, device="cuda")
    assert no.value.field == "device"
    for backend in ("triton", "flashinfer"):
        for devices in ((), (H200,)):
            with pytest.raises(ConfigError, match="has no kernels for layers of experts") as no:
                resolved(folder, devices=devices, software=INTERPRETED, attention_backend=backend)
            assert no.value.field == "attention_backend"
    reference = on_cuda(folder, attention_backend="reference")
    assert (reference.device, resolved(folder, attention_backend="reference").device) == ("cuda", "cpu")
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=ResolvedConfig)
    assert copy == found and copy.model.has_experts


@pytest.mark.parametrize(
    ("devices", "backend", "is_possible"),
    [
        ((H200,), "auto", True),
        ((H200,), "flashinfer", True),
        ((H200,), "reference", False),
        ((A100,), "triton", False),  # no float8_e4m3fn below 8.9
        ((), "triton", True),
        ((), "auto", False),
    ],
)
def test_fp8_keys_and_values_need_kernels_and_hardware(
    folder: Path, devices: tuple[CudaDevice, ...], backend: str, is_possible: bool
) -> None:
    software = FULL if devices else INTERPRETED
    settings: dict[str, Any] = {
        "devices": devices,
        "software": software,
        "attention_backend": backend,
        "kv_dtype": "fp8_e4m3",
    }
    if is_possible:
        result = resolved(folder, **settings)
        assert result.kv_dtype == "float8_e4m3fn"
        assert result.kv_bytes_per_token * 4 == result.model.kv_bytes_per_token(4)
        assert "kv_dtype" not in {name for name, _, _ in result.explanations}
        return
    with pytest.raises(ConfigError) as caught:
        resolved(folder, **settings)
    assert caught.value.field == "kv_dtype"


def test_the_pool_of_a_device_is_unknown_until_it_is_measured(folder: Path) -> None:
    result = on_cuda(folder, memory_fraction=0.5)
    assert (result.num_pages, result.max_total_num_tokens) == (0, 0)
    assert "measured at start" in why(result, "kv_pool_tokens") and "0.5" in why(result, "kv_pool_tokens")
    measured = (("kv_pool_tokens", "160", "measured"),)
    known = result.with_pool(160, measured)
    assert (known.num_pages, known.max_total_num_tokens, known.explanations) == (11, 160, measured)
    assert known.with_pool(0, ()).max_total_num_tokens == 0


def test_a_given_pool_is_taken_as_given_on_a_device_too(folder: Path) -> None:
    assert on_cuda(folder, kv_pool_tokens=64, page_size=4).num_pages == 17
    with pytest.raises(ConfigError) as caught:
        on_cuda(folder, kv_pool_tokens=3, page_size=4)
    assert caught.value.field == "kv_pool_tokens"


def test_a_pool_already_known_stays_as_it_is(folder: Path) -> None:
    result = resolved(folder, kv_pool_tokens=100)
    assert result.with_pool(result.max_total_num_tokens, result.explanations) == result


@pytest.mark.parametrize("devices", [(), (H200,)])
def test_given_sizes_are_kept_wherever_it_runs(folder: Path, devices: tuple[CudaDevice, ...]) -> None:
    result = resolved(folder, devices=devices, max_running_requests=3, overlap_depth=2, max_waiting_requests=4)
    assert (result.engine.max_running_requests, result.engine.overlap_depth) == (3, 2)
    assert result.engine.max_sequences == 7
    assert not {"max_running_requests", "overlap_depth"} & {name for name, _, _ in result.explanations}


def test_what_was_asked_is_otherwise_untouched(folder: Path) -> None:
    asked = EngineConfig(model=str(folder), page_size=4, seed=7, cuda_graphs=False, max_graph_tokens=64)
    settled = resolve(asked, folder, devices=(H200,), software=FULL).engine
    differing = {name for name in EngineConfig.__struct_fields__ if getattr(asked, name) != getattr(settled, name)}
    assert differing == {"max_running_requests", "max_num_batched_tokens", "prefill_step_tokens", "overlap_depth"}


def test_without_a_seed_every_start_has_its_own_and_says_which(folder: Path) -> None:
    starts = [resolved(folder) for _ in range(8)]
    seeds = [start.engine.seed for start in starts]
    assert len(set(seeds)) == 8 and all(0 <= seed < 1 << 53 for seed in seeds)
    for start in starts:
        (explained,) = [value for name, value, _ in start.explanations if name == "seed"]
        assert explained == str(start.engine.seed)
    given = [resolved(folder, seed=seed) for seed in (0, 7, (1 << 64) - 1)]
    assert [start.engine.seed for start in given] == [0, 7, (1 << 64) - 1]
    assert not any(name == "seed" for start in given for name, _, _ in start.explanations)


def test_prompts_of_wide_models_ride_along_with_decode_steps(folder: Path) -> None:
    assert resolved(folder).engine.max_num_batched_tokens == on_cuda(folder).engine.max_num_batched_tokens == 2048
    write(folder, hidden_size=4096)
    assert resolved(folder).engine.max_num_batched_tokens == 2048
    assert on_cuda(folder).engine.max_num_batched_tokens == 512 + 256
    assert on_cuda(folder, max_running_requests=100).engine.max_num_batched_tokens == 356
    assert on_cuda(folder, max_num_batched_tokens=9000).engine.max_num_batched_tokens == 9000


def test_prompts_come_in_large_pieces_while_few_rows_decode(folder: Path) -> None:
    """On a device, unless the size of steps is given: one number then says it all."""
    write(folder, hidden_size=4096)
    assert on_cuda(folder).engine.prefill_step_tokens == on_cuda(folder).engine.max_step_tokens == 8192
    assert resolved(folder).engine.prefill_step_tokens == 2048
    assert on_cuda(folder, max_num_batched_tokens=1000).engine.prefill_step_tokens == 1000
    assert on_cuda(folder, max_running_requests=9000).engine.prefill_step_tokens == 9256
    both = on_cuda(folder, max_num_batched_tokens=1000, prefill_step_tokens=300).engine
    assert (both.prefill_step_tokens, both.max_step_tokens) == (300, 1000)


def test_the_kernel_cache_is_a_folder_by_its_whole_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert resolved(folder).engine.kernel_cache is None
    assert resolved(folder, kernel_cache="built").engine.kernel_cache == str(folder.resolve() / "built")
    (folder / "file").touch()
    with pytest.raises(ConfigError) as caught:
        resolved(folder, kernel_cache="file")
    assert caught.value.field == "kernel_cache"


def test_given_settings_are_kept_and_not_explained(folder: Path) -> None:
    result = resolved(folder, dtype="bfloat16", context_length=100, kv_pool_tokens=64, page_size=4, num_threads=1)
    assert (result.dtype, result.context_length, result.max_total_num_tokens, result.num_pages) == (
        "bfloat16",
        100,
        64,
        17,
    )
    assert result.max_columns == 25
    assert "kv_pool_tokens" not in {name for name, _, _ in result.explanations}


def test_the_pool_is_no_larger_than_two_gibibytes(folder: Path) -> None:
    write(folder, num_hidden_layers=64, hidden_size=4096, max_position_embeddings=131072)
    result = resolved(folder)
    page_bytes = result.model.kv_bytes_per_token(4) * result.engine.page_size
    assert 0 < (result.num_pages - 1) * page_bytes <= 2 << 30


def test_a_sliding_window_bounds_the_context(folder: Path) -> None:
    write(folder, architectures=["MistralForCausalLM"], sliding_window=128)
    assert resolved(folder).context_length == 128
    with pytest.raises(ConfigError) as caught:
        resolved(folder, context_length=129)
    assert caught.value.field == "context_length"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": 65}, "page_size"),
        ({"page_size": "16"}, "page_size"),
        ({"overlap_depth": -1}, "overlap_depth"),
        ({"numerics": "exact"}, "numerics"),
        ({"context_length": 513}, "context_length"),
        ({"kv_pool_tokens": 3}, "kv_pool_tokens"),
        ({"memory_fraction": 2.0}, "memory_fraction"),
        ({"device": "cuda"}, "device"),
        ({"device": "tpu"}, "device"),
        ({"kv_dtype": "fp8"}, "kv_dtype"),
        ({"kv_dtype": "fp8_e4m3"}, "kv_dtype"),
        ({"attention_backend": "cudnn"}, "attention_backend"),
        ({"max_running_requests": 0}, "max_running_requests"),
        ({"max_graph_tokens": 0}, "max_graph_tokens"),
        ({"cuda_graphs": 1}, "cuda_graphs"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_bad_settings_are_named(folder: Path, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(folder, **settings)
    assert caught.value.field == field


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("", None), ("0", None), ("4,2", None)])
def test_the_thread_count_of_the_environment_is_honoured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert resolved(folder).num_threads == (expected or available_cores())
    assert on_cuda(folder).num_threads == (expected or min(4, available_cores()))
    for result in (resolved(folder, num_threads=2), on_cuda(folder, num_threads=2)):
        assert result.num_threads == 2


def test_the_reference_backend_measures_no_pool(folder: Path) -> None:
    result = on_cuda(folder, attention_backend="reference")
    assert result.max_total_num_tokens > 0 and "2 GiB" in why(result, "kv_pool_tokens")
    assert on_cuda(folder).num_pages == 0


def test_paths_of_users_nobody_knows_are_refused_or_taken_as_they_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        model_folder("~nobody-by-this-name/model")
    assert "~nobody-by-this-name" in str(resolved(folder, kernel_cache="~nobody-by-this-name/x").engine.kernel_cache)


CGROUPS = {
    "v2": ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    "v1": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
}


@pytest.mark.parametrize("version", CGROUPS)
def test_files_read_long_ago_are_no_used_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    limit, usage, statistics, cached = (tmp_path / name for name in CGROUPS[version])
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_meminfo_available", lambda: 64 << 30)
    assert available_memory() == 64 << 30
    limit.parent.mkdir(exist_ok=True)
    limit.write_text(f"{16 << 30}\n")
    usage.write_text(f"{15 << 30}\n")
    statistics.write_text(f"anon 5\n{cached.name} {14 << 30}\nactive_file 7\n")
    assert available_memory() == 15 << 30
    statistics.write_text("anon 5\n")
    assert available_memory() == 1 << 30
    statistics.unlink()
    assert available_memory() == 1 << 30, "a sandbox may show the limit alone"
    limit.write_text("max\n")
    assert available_memory() == 64 << 30


@pytest.mark.parametrize(
    "files",
    [("cpu.max", "{quota} 100000\n"), ("cpu/cpu.cfs_quota_us", "{quota}\n", "cpu/cpu.cfs_period_us", "100000\n")],
    ids=CGROUPS,
)
def test_a_quota_of_processor_time_bounds_the_cores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    """As of `docker run --cpus`, which takes no core away: a thread for each would wait for the quota."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu").mkdir()
    for quota, cores in {"max": 64, "-1": 64, "400000": 4, "150000": 2, "1000": 1, "9900000": 64}.items():
        for name, text in zip(files[::2], files[1::2], strict=True):
            (tmp_path / name).write_text(text.format(quota=quota))
        assert resolved(folder).num_threads == available_cores() == cores, quota


@pytest.mark.parametrize("name", ["model", "tokenizer", "initial_version", "served_model_name", "kernel_cache"])
def test_a_setting_that_could_not_be_sent_to_a_core_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be Unicode text") as caught:
        EngineConfig.from_dict({"model": "m", name: "a\udcff"})
    assert caught.value.field == name


def test_a_folder_whose_name_could_not_be_sent_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a\udcff"
    folder.mkdir()
    write(folder)
    with pytest.raises(ConfigError, match="not Unicode text"):
        resolve(EngineConfig(model="m"), folder)


def test_a_kernel_cache_that_may_not_be_looked_at_or_is_no_path_is_refused(folder: Path) -> None:
    for name in (f"/tmp/{'x' * 300}", "a\0b"):
        with pytest.raises(ConfigError) as caught:
            resolved(folder, kernel_cache=name)
        assert caught.value.field == "kernel_cache"


def test_nothing_starts_where_the_working_directory_is_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="working directory is gone"):
        resolve_settings(EngineConfig(model=str(folder)))
    with pytest.raises(ConfigError) as caught:
        resolved(folder, kernel_cache="built")
    assert caught.value.field == "kernel_cache"


def test_ranks_have_as_many_devices_one_after_the_other(folder: Path) -> None:
    devices = tuple(msgspec.structs.replace(each, index=index) for index, each in enumerate((A100, H200, H200, T4)))
    config = EngineConfig(model="m", tp_size=2)
    result = resolve(config, folder, devices=devices, software=FULL, first_device=1)
    assert [(each.cuda or T4).index for each in map(result.of_rank, range(2))] == [1, 2]
    for shown in (devices, devices[:3]):
        with pytest.raises(ConfigError, match="from device 2 on there are 1 of") as refusal:
            resolve(config, folder, devices=shown, software=FULL, first_device=2)
        assert refusal.value.field == "tp_size"
    on_cpu = resolve(msgspec.structs.replace(config, device="cpu"), folder, devices=(), software=FULL)
    assert on_cpu.of_rank(1) == on_cpu


def test_stages_have_devices_too_and_as_many_steps_in_flight(folder: Path) -> None:
    devices = tuple(msgspec.structs.replace(H200, index=index) for index in range(4))
    config = EngineConfig(model="m", tp_size=2, pp_size=2)
    result = resolve(config, folder, devices=devices, software=FULL)
    assert result.num_ranks == 4 and (result.of_rank(3).cuda or T4).index == 3
    assert (result.engine.overlap_depth, result.num_cohorts) == (1, 2)
    with pytest.raises(ConfigError, match="pp_size 2 of 2 ranks each needs 4 CUDA devices here") as refusal:
        resolve(config, folder, devices=devices[:3], software=FULL)
    assert refusal.value.field == "pp_size"
    for depth, expected in ((None, 1), (0, 0), (3, 3)):
        given = msgspec.structs.replace(config, device="cpu", overlap_depth=depth)
        on_cpu = resolve(given, folder, devices=(), software=FULL)
        assert (on_cpu.engine.overlap_depth, on_cpu.num_cohorts) == (expected, expected + 1)
